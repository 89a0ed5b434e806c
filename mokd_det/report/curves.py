# Copyright (c) The mokd_det authors.
"""Losses and evaluations over time, and figures as SVG that a page can hold."""

import io
import math
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ..logs import Series
from .runs import Run, evaluations

# Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MAIN_METRICS = ("AP", "AP50", "PQ", "mIoU", "top1")
COLUMNS = 3


def svg(figure: Figure, salt: str) -> str:
    """Return a figure as an ``<svg>`` element; ``salt``: another one for each figure of a page."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        FigureCanvasSVG(figure)
        figure.savefig(text := io.StringIO(), format="svg", metadata={"Date": None})
    element = text.getvalue()[text.getvalue().index("<svg") :]
    return re.sub(r'<g id="[\w.]+"', "<g", element)  # "axes_1" is in every figure, and used by none


def losses(run: Run) -> Series:
    """Return of a run's scalars the losses, the total first."""
    found = {n: x for n, x in run.metrics.items() if "loss" in n and "/" not in n}
    if [*found] == ["total_loss"] and run.options.get("MODEL.META_ARCHITECTURE") == "Classifier":
        found = {"loss_cls": found["total_loss"]}  # Detectron2 logs no loss that is the total
    return dict(sorted(found.items(), key=lambda item: (item[0] != "total_loss", item[0])))


def main_evaluations(run: Run) -> Series:
    """Return of a run's evaluations the metrics that one looks at first."""
    return {n: x for n, x in evaluations(run.metrics).items() if n.split("/")[-1] in MAIN_METRICS}


def curves_figure(runs: Sequence[Run], of: Sequence[Series]) -> Figure | None:
    """Return a figure with a panel for each scalar, a line for each run; None: no scalar."""
    names = list(dict.fromkeys(name for series in of for name in series))
    if not names:
        return None
    rows = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(4.6 * COLUMNS, 2.6 * rows))
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axis, name in zip(axes, names):
        axis.set_title(name, fontsize=9, parse_math=False)
        axis.set_xlabel("iteration", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        for series, colour in zip(of, colours(runs)):
            if name in series:
                # A value alone is no line.
                marker = "o" if len(series[name][0]) < 10 else None
                axis.plot(*series[name], color=colour, marker=marker, markersize=3, linewidth=1.2)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    figure.tight_layout()
    return figure


def colours(runs: Sequence[Run]) -> list[str]:
    """Return a colour for each run."""
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]
