# Copyright (c) The mokd_det authors.
"""Runs as one HTML file that needs nothing else: style, curves and pictures are inside."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .balance import balance_figure
from .curves import colours, curves_figure, losses, main_evaluations, svg
from .markup import STYLE, TEXT, dot, note, picture_rows, table_of
from .predictions import pictures, predictions_file
from .runs import Run, read_runs, role_of
from .tables import cost_table, differences, gains, results_tables


def write_report(folders: Sequence[str], output: str, count: int = 6, score: float = 0.5) -> None:
    """
    Write a page on the runs in these folders.

    Args:
        output: the HTML file.
        count: pictures of each data set.
        score: the least of a detection that is compared and shown.

    ValueError, FileNotFoundError: an argument out of its range, see :func:`read_runs`.
    """
    if not os.path.isdir(os.path.dirname(output) or "."):
        raise FileNotFoundError(f"--output '{output}': its folder does not exist.")
    if count < 0:
        raise ValueError(f"--pictures is {count}: expected 0 or more.")
    if not 0 <= score <= 1:
        raise ValueError(f"--score is {score}: expected a number in [0, 1].")
    runs = read_runs(folders)
    Path(output).write_text(page(runs, count, score), encoding="utf-8")


def page(runs: Sequence[Run], count: int = 6, score: float = 0.5) -> str:
    """Return the page as HTML; the arguments are those of :func:`write_report`."""
    sections = {
        "Results": _results(runs),
        "Speed and size": _cost(runs),
        "Losses and metrics": _curves(runs),
        "Balance": _balance(runs),
        "Options that differ": _differences(runs),
        "Pictures": _pictures(runs, count, score),
    }
    ids = {title: title.lower().replace(" ", "-") for title in sections}
    links = "".join(f'<a href="#{ids[title]}">{title}</a>' for title in sections)
    body = "".join(
        f'<section id="{ids[title]}"><h2>{title}</h2>{"".join(parts)}</section>'
        for title, parts in sections.items()
    )
    names = ", ".join(run.label for run in runs)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TEXT(names)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>Runs</h1>{_legend(runs)}<nav>{links}</nav>{body}</main></body></html>\n"
    )


# ---- sections ------------------------------------------------------------------------------------


def _legend(runs: Sequence[Run]) -> str:
    items = [
        f'<li style="list-style:none">{dot(colour)}<b>{TEXT(run.label)}</b> '
        f'<span class="note">{TEXT(_about(run, runs))}</span></li>'
        for run, colour in zip(runs, colours(runs))
    ]
    return f'<ul style="padding:0">{"".join(items)}</ul>'


def _about(run: Run, runs: Sequence[Run]) -> str:
    parts = [role_of(run, runs), str(run.options.get("MODEL.META_ARCHITECTURE", ""))]
    if run.is_distilled:
        parts.append(f"rule {run.options.get('MOKD.BALANCING.RULE')}")
        objectives = run.summary.get("objectives") or run.options.get("MOKD.OBJECTIVES")
        parts += [" + ".join(objectives)] if objectives else []
    return " · ".join([*filter(None, parts), str(run.folder)])


def _results(runs: Sequence[Run]) -> Iterator[str]:
    tables = results_tables(runs)
    if not tables:
        yield note("No run has results: name a data set in DATASETS.TEST, and evaluate.")
    for run in runs:
        if run.results_at:
            yield note(f"{run.label} has not ended: its results are of iteration {run.results_at}.")
    if sentences := gains(runs):
        yield from (f'<p class="gain">{TEXT(sentence)}</p>' for sentence in sentences)
        yield note("One run of each kind has noise: a difference needs several seeds.")
    for title, table in tables.items():
        yield f"<h3>{TEXT(title)}</h3>{table_of(table)}"
    if tables:
        yield note("The best of the runs that are no teachers is bold.")


def _cost(runs: Sequence[Run]) -> Iterator[str]:
    table = cost_table(runs)
    yield table_of(table)
    if not {"GFLOPs", "parameters, M"} <= {*table.head}:
        yield note(
            "Parameters, GFLOPs and seconds of an image: evaluate with mokd train --eval-only "
            "--zoo-row into the run's folder."
        )


def _curves(runs: Sequence[Run]) -> Iterator[str]:
    for salt, what in (("metrics", main_evaluations), ("losses", losses)):
        if figure := curves_figure(runs, [what(run) for run in runs]):
            yield f'<h3>{salt}</h3><div class="scroll">{svg(figure, salt)}</div>'
        else:
            yield note(f"No run has logged {salt}.")
    yield note("Colours are those of the list above. A loss is the median of 20 steps.")


def _balance(runs: Sequence[Run]) -> Iterator[str]:
    balanced = [(run.label, run.balance) for run in runs if run.balance]
    if not balanced:
        yield note("No run has a balance.json: none of them is distilled (MOKD.ENABLED).")
        return
    yield f'<div class="scroll">{svg(balance_figure(balanced), "balance")}</div>'
    yield note(
        "Thin: means of 20 steps; thick: their running median. “seen” is what the rule saw. "
        "Dominance and weights: logarithmic, and linear near zero, so zeros are visible."
    )


def _differences(runs: Sequence[Run]) -> Iterator[str]:
    table = differences(runs)
    if len(runs) == 1:
        yield note("One run differs from no other: give several.")
    elif not table.rows:
        yield note("The configs are the same but for OUTPUT_DIR.")
    else:
        yield table_of(table, "option")


def _pictures(runs: Sequence[Run], count: int, score: float) -> Iterator[str]:
    data_sets = list(dict.fromkeys(n for r in runs for n in r.options.get("DATASETS.TEST") or []))
    if not count:
        data_sets = []
        yield note("Left out (--pictures 0).")
    for key, data_set in enumerate(data_sets):
        yield f"<h3>{TEXT(data_set)}</h3>"
        shown_runs = [run for run in runs if predictions_file(run, data_set)]
        if absent := [run.label for run in runs if run not in shown_runs]:
            yield note(
                f"No predictions of {', '.join(absent)} (inference/{data_set} in the run's "
                "folder): mokd train --eval-only with its config and OUTPUT_DIR writes them."
            )
        if shown_runs:
            colour_of = dict(zip((run.label for run in runs), colours(runs)))
            sides = [(run.label, colour_of[run.label]) for run in shown_runs]
            yield from picture_rows(
                str(key), sides, *pictures(shown_runs, data_set, count, score), score
            )
