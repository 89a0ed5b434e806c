# Copyright (c) The mokd_det authors.
"""The numbers of runs as rows of tables."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from .runs import Results, Run, has_model_of, role_of

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "PQ", "SQ", "RQ", "mIoU", "top1", "top5")
OF_CLASS, MOST_CLASSES = "AP-", 20  # of Detectron2's evaluators; columns that a page has room for
# What differs between any two runs and says nothing.
UNTOLD = ("OUTPUT_DIR", "VERSION")


@dataclasses.dataclass
class Table:
    """
    Attributes:
        head: of the columns.
        rows: cells; numbers stay numbers, None is empty. The first cell names the row.
        best: of each column the best value, to be set off; None: of none.
        form: of the numbers that are not whole.
    """

    head: list[str]
    rows: list[list[Any]]
    best: list[Any] | None = None
    form: str = ".3g"


def results_tables(runs: Sequence[Run]) -> dict[str, Table]:
    """Return a table for each data set and task, with a row for each run that was evaluated."""
    found: list[tuple[str, str, Results]] = []
    for run in runs:
        found.append((run.label, role_of(run, runs), run.results))
        if run.teacher_results:
            found.append((f"{run.label}: its teacher", "teacher", run.teacher_results))
    keys = dict.fromkeys(
        (data_set, task)
        for _, _, results in found
        for data_set in results
        for task in results[data_set]
    )
    tables = {}
    for data_set, task in keys:
        having = [
            (label, role, results[data_set][task])
            for label, role, results in found
            if task in results.get(data_set, {})
        ]
        metrics = [m for m in METRICS if any(values.get(m) is not None for *_, values in having)]
        tables[f"{data_set}, {task}"] = _results_table(having, metrics)
        of_classes = [key for key in having[0][2] if key.startswith(OF_CLASS)]
        if 1 < len(of_classes) <= MOST_CLASSES:
            tables[f"{data_set}, {task}: AP of each class"] = _results_table(having, of_classes)
    return tables


def _results_table(having: Sequence[tuple[str, str, Any]], metrics: Sequence[str]) -> Table:
    rows = [[label, role, *(values.get(m) for m in metrics)] for label, role, values in having]
    head = [metric.removeprefix(OF_CLASS) for metric in metrics]
    return Table(["run", "is", *head], rows, _best(rows), ".2f")


def _best(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """The largest number of each column, teachers left out: they are not what is compared."""
    compared = [row for row in rows if row[1] != "teacher"]
    columns = zip(*compared) if len(compared) > 1 else []
    return [max((x for x in column if isinstance(x, float)), default=None) for column in columns]


def gains(runs: Sequence[Run]) -> list[str]:
    """Return a sentence for each student beside its model from scratch, on the main metric."""
    bases = [run for run in runs if role_of(run, runs) == "from scratch"]
    sentences = []
    for run in [run for run in runs if run.is_distilled]:
        scratch = next((base for base in bases if has_model_of(base, run)), None)
        if scratch is None:
            continue
        for data_set, tasks in run.results.items():
            for task, values in tasks.items():
                base = scratch.results.get(data_set, {}).get(task, {})
                for metric in METRICS:
                    ours, theirs = values.get(metric), base.get(metric)
                    if ours is not None and theirs is not None:
                        sentences.append(
                            f"{run.label}: {ours - theirs:+.1f} {metric} on {data_set} ({task}) "
                            f"against {scratch.label}, from scratch."
                        )
                        break  # the main metric is the first one
    return sentences


def cost_table(runs: Sequence[Run]) -> Table:
    """Return what each run and its model cost; None where a file does not say it."""
    head = [
        *(
            "run",
            "iterations",
            "images a step",
            "median s / iteration",
            "training, h",
            "GPU memory, GB",
        ),
        *("parameters, M", "GFLOPs", "s / image"),
    ]
    rows = []
    for run in runs:
        student = run.summary.get("student") or {}
        count = run.zoo_row.get("parameters") or student.get("parameters")
        seconds, memory = run.median("time"), run.memory
        rows.append(
            [
                run.label,
                run.iterations or None,
                run.options.get("SOLVER.IMS_PER_BATCH"),
                seconds,
                run.hours,
                memory and memory / 1024,
                count and count / 1e6,
                run.zoo_row.get("gflops"),
                run.zoo_row.get("inference_seconds_per_image"),
            ]
        )
    # A column that nobody has says nothing.
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] is not None for row in rows)]
    return Table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def differences(runs: Sequence[Run]) -> Table:
    """Return the options that are not the same in all runs."""
    keys = sorted({key for run in runs for key in run.options} - {*UNTOLD})
    rows = [[key, *(_shown(run, key) for run in runs)] for key in keys]
    return Table(["option", *(run.label for run in runs)], [r for r in rows if len(set(r[1:])) > 1])


def _shown(run: Run, key: str) -> str:
    if key not in run.options:
        return "—"
    value = run.options[key]
    return str(value) if value != "" else '""'
