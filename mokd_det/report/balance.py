# Copyright (c) The mokd_det authors.
"""Conflict, dominance and weights of the objectives over time."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..logs import Series, read_series

# Panel: label, scale of the axis, prefixes of the scalars, lines to compare with. Weights and
# dominance may be zero, which a logarithmic axis does not show: near zero "symlog" is linear.
PANELS = (
    ("conflict: cosine with the task gradient", "linear", ("cosine_", "seen_cosine_"), (0,)),
    (
        "dominance: norm / the task gradient's",
        "symlog",
        ("dominance_", "seen_dominance_"),
        (0, 1),
    ),
    ("weights", "symlog", ("weight_",), (0, 1)),
    ("the task in the update", "linear", ("share_task", "update_cosine", "dominated"), (0, 0.1, 1)),
    ("levels' share of |g|^2", "linear", ("level_",), (0, 1)),
)
FALLBACKS = "fallbacks_"
# Powers of ten that a symlog axis shows at most below the largest value.
DECADES = 4


def read_balance(run_dir: str | os.PathLike) -> Series:
    """
    Return the scalars in ``balance.json`` of the OUTPUT_DIR of a distillation run.
    FileNotFoundError: there is none; ValueError: nothing was balanced.
    """
    path = os.path.join(run_dir, "balance.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} does not exist: {run_dir} is not the OUTPUT_DIR of a run with MOKD.ENABLED."
        )
    if not (series := read_series(path)):
        raise ValueError(f"{path} has no balance in it: {run_dir} is a run without a teacher.")
    return series


def plot_balance(run_dirs: Sequence[str], output: str) -> None:
    """Draw the runs in these folders side by side as a PNG, ``output``; errors: read_balance."""
    if not os.path.isdir(os.path.dirname(output) or "."):
        raise FileNotFoundError(f"--output '{output}': its folder does not exist.")
    figure = balance_figure([(run_dir, read_balance(run_dir)) for run_dir in run_dirs])
    FigureCanvasAgg(figure)
    figure.savefig(output, dpi=110)


def balance_figure(runs: Sequence[tuple[str, Series]]) -> Figure:
    """Return a figure with a column for each run, given with its title."""
    panels = [p for p in PANELS if any(_found(series, p[2]) for _, series in runs)]
    weights = [name for _, series in runs for name, *_ in _found(series, ("weight_",))]
    colour_of = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(map(_objective, weights)))}
    figure = Figure(figsize=(9 * len(runs), 2.4 * len(panels)))
    axes = figure.subplots(
        len(panels),
        len(runs),
        sharex="col",
        sharey="row",  # runs are to be compared
        squeeze=False,
    )
    for column, (title, series) in enumerate(runs):
        title = f"{title}\nfallbacks: {_fallbacks(series)}"
        axes[0, column].set_title(title, fontsize=9, parse_math=False)
        for axis, (label, _, prefixes, lines) in zip(axes[:, column], panels):
            axis.set_ylabel(label, fontsize=8)
            _draw(axis, _found(series, prefixes), lines, colour_of)
        axes[-1, column].set_xlabel("iteration")
    for row, (_, scale, prefixes, lines) in zip(axes, panels):
        if scale == "symlog":
            found = [values for _, series in runs for _, _, values in _found(series, prefixes)]
            threshold = _threshold(found, lines)
            row[0].set_yscale("symlog", linthresh=threshold, linscale=0.5)
            if min(map(min, found)) >= 0:
                row[0].set_ylim(bottom=-threshold / 4)  # zero is above the edge
    figure.tight_layout()
    return figure


def running_median(values: Sequence[float], window: int = 5) -> np.ndarray:
    """
    Return the median of each value and its neighbours, ``window`` in all (fewer at the ends); the
    values themselves if they are less than four windows, which would be levelled.
    """
    half = window // 2 if len(values) >= 4 * window else 0
    return np.array(
        [np.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]
    )


def _draw(
    axis: Axes, found: Sequence[tuple], lines: Iterable[float], colour_of: Mapping[str, str]
) -> None:
    for i, (name, iterations, values) in enumerate(found):
        colour = colour_of.get(_objective(name), f"C{i}")
        style = "--" if name.startswith("seen_") else "-"
        axis.plot(iterations, values, color=colour, linewidth=0.5, alpha=0.4)
        axis.plot(iterations, running_median(values), style, color=colour, label=name)
    for value in lines:
        axis.axhline(value, color="grey", linewidth=0.5)
    if found:
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))  # beside the lines


def _objective(name: str) -> str:
    """Return whose cosine, dominance or weight it is: an objective has one colour in all panels."""
    return re.sub(r"^(seen_)?(cosine|dominance|weight)_", "", name)


def _threshold(found: Iterable[Sequence[float]], lines: Iterable[float]) -> float:
    """Return where the axis becomes linear: the power of ten below nearly all that is not zero."""
    sizes = np.abs(np.concatenate([[*lines], *found]))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    least = max(np.quantile(sizes, 0.02, method="lower"), sizes.max() / 10**DECADES)
    return 10.0 ** np.floor(np.log10(least))


def _found(series: Mapping, prefixes: tuple[str, ...]) -> list[tuple]:
    """Sorted (name and where it is measured, iterations, values) of scalars with these prefixes."""
    found = []
    for full, (iterations, values) in sorted(series.items()):
        _, measured_at, name = full.split("/")
        if name.startswith(prefixes):
            found.append((f"{name} (at {measured_at})", iterations, values))
    return found


def _fallbacks(series: Series) -> str:
    counts = [
        f"{int(values[-1])} {name.split('/')[-1][len(FALLBACKS) :]}"
        for name, (_, values) in sorted(series.items())
        if name.split("/")[-1].startswith(FALLBACKS)
    ]
    return ", ".join(counts) or "not recorded"
