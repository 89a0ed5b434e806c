# Copyright (c) The mokd_det authors.
"""Pictures of a study: a metric over iterations, balance over iterations, a metric over an axis."""

import math
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from .study import number_of  # noqa: E402

__all__ = ["plot_axis", "plot_balance", "plot_curves"]

# Panels of the balance: label, scale of the axis, prefix of the names, line to compare with.
PANELS = (
    ("conflict: cosine with the task", "linear", "cosine_", 0),
    ("dominance: norm / the task's", "log", "dominance_", 1),
    ("weight", "log", "weight_", 1),
    ("the task's share of the update", "linear", "share_task", 0.5),
)


def plot_curves(records, metrics, path):
    """
    Args:
        records (dict[str, dict[int, dict]]): method -> seed -> record, see :func:`read_run`.
        metrics (list[str]): "data set/task/metric", a panel for each; NaN is drawn as 0, see
            :func:`number_of`.
        path (str or Path): PNG to write: mean over seeds, and one standard deviation around it.

    Returns:
        bool: False, and nothing written, if no run was evaluated before its end.
    """
    found = {
        (name, metric): _mean_and_std(
            [
                [(i, number_of(value)) for i, value in record.get("curves", {}).get(metric, [])]
                for record in by_seed.values()
            ]
        )
        for name, by_seed in records.items()
        for metric in metrics
    }
    if max((len(points) for points in found.values()), default=0) < 2:
        return False
    figure, axes = plt.subplots(1, len(metrics), figsize=(6 * len(metrics), 4.5), squeeze=False)
    for axis, metric in zip(axes[0], metrics):
        for number, (name, by_seed) in enumerate(records.items()):
            points = found[name, metric]
            if points:
                label = f"{name} ({len(by_seed)} seeds)" if len(by_seed) > 1 else name
                _draw_band(axis, points, label, number)
        axis.set_title(metric, fontsize=9)
        axis.set_xlabel("iteration")
    axes[0, -1].legend(fontsize=7)
    _save(figure, path)
    return True


def plot_balance(records, path):
    """
    Args:
        records: as for :func:`plot_curves`.
        path (str or Path): PNG to write: rows conflict, dominance, weights and the task's share, a
            column for each distillation objective, a line for each method, the mean over seeds.

    Returns:
        bool: False, and nothing written, if no method balanced anything.
    """
    balances = {
        name: [record.get("balance", {}) for record in by_seed.values()]
        for name, by_seed in records.items()
    }
    objectives = sorted(
        {
            key[len("cosine_") :]
            for runs in balances.values()
            for run in runs
            for key in run
            if key.startswith("cosine_")
        }
    )
    if not objectives:
        return False
    shape = len(PANELS), len(objectives)
    figure, axes = plt.subplots(
        *shape, figsize=(6 * shape[1], 2.6 * shape[0]), sharex=True, sharey="row", squeeze=False
    )
    for row, (label, scale, prefix, line) in zip(axes, PANELS):
        for axis, objective in zip(row, objectives):
            key = prefix + objective if prefix.endswith("_") else prefix
            for number, (name, runs) in enumerate(balances.items()):
                points = _mean_and_std([run.get(key, []) for run in runs])
                if points:
                    iterations, means, _ = zip(*points)
                    axis.plot(iterations, means, color=_color(number), label=name, linewidth=1.2)
            axis.set_yscale(scale)
            axis.axhline(line, color="grey", linewidth=0.5)
        row[0].set_ylabel(label, fontsize=8)
    for axis, objective in zip(axes[0], objectives):
        axis.set_title(objective, fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("iteration")
    axes[0, -1].legend(fontsize=7)
    _save(figure, path)
    return True


def plot_axis(lines, reference, label, metric, path):
    """
    Args:
        lines (dict[str, dict[float, list[float]]]): line -> x -> values of its seeds.
        reference (tuple): name and values of the method that is drawn as a horizontal line.
        label (str): of the x axis, which is logarithmic.
        metric (str): of the y axis.
        path (str or Path): PNG to write: mean over seeds, and one standard deviation around it.
    """
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for number, (name, by_x) in enumerate(lines.items()):
        points = [(x, statistics.mean(v), _std(v)) for x, v in sorted(by_x.items())]
        _draw_band(axis, points, name, number, marker="o")
    name, values = reference
    axis.axhline(statistics.mean(values), color="black", linestyle="--", linewidth=1, label=name)
    axis.set_xscale("log")
    axis.set_xlabel(label)
    axis.set_ylabel(metric)
    axis.legend(fontsize=8)
    _save(figure, path)


def _mean_and_std(series):
    """Points (iteration, mean, std over runs) where all runs that have any have one."""
    series = [dict(map(tuple, points)) for points in series if points]
    if not series:
        return []
    common = sorted(set.intersection(*map(set, series)))
    values = {iteration: [run[iteration] for run in series] for iteration in common}
    return [(i, statistics.mean(v), _std(v)) for i, v in values.items()]


def _std(values):
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _draw_band(axis, points, label, number, **style):
    x, mean, std = zip(*points)
    axis.plot(x, mean, color=_color(number), label=label, linewidth=1.4, **style)
    low, high = ([m + sign * s for m, s in zip(mean, std)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=_color(number), alpha=0.15, linewidth=0)


def _color(number):
    number %= 20  # ten dark colours, then their light ones
    return plt.get_cmap("tab20")(2 * number if number < 10 else 2 * number - 19)


def _save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
