# Copyright (c) The mokd_det authors.
"""Pictures of a study: balance over iterations, a metric over an axis."""

import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Panels of the balance: label, scale of the axis, prefix of the names, line to compare with.
PANELS = (
    ("conflict: cosine with the task", "linear", "cosine_", 0),
    ("dominance: norm / the task's", "log", "dominance_", 1),
    ("weight", "log", "weight_", 1),
    ("the task's share of the update", "linear", "share_task", 0.5),
)

COLORS = ("#9e9e9e", "#00796b")  # fixed weights, the default


def plot_balance(records, path):
    """
    Rows conflict, dominance, weights and the task's share; a column for each distillation
    objective; a line for each method, the mean over its seeds.

    Args:
        records (dict[str, dict[int, dict]]): method -> seed -> record with ``balance``.
        path (Path): PNG to write.

    Returns:
        bool: False, and nothing written, if there is nothing to draw.
    """
    balances = {
        name: [record.get("balance", {}) for record in by_seed.values()]
        for name, by_seed in records.items()
    }
    names = {name for runs in balances.values() for run in runs for name in run}
    objectives = sorted(n.removeprefix("cosine_") for n in names if n.startswith("cosine_"))
    if not objectives:
        return False
    shape = len(PANELS), len(objectives)
    figure, axes = plt.subplots(
        *shape, figsize=(6 * shape[1], 2.4 * shape[0]), sharex=True, sharey="row", squeeze=False
    )
    for row, (label, scale, prefix, line) in zip(axes, PANELS):
        row[0].set_ylabel(label, fontsize=8)
        for axis, objective in zip(row, objectives):
            key = prefix + objective if prefix.endswith("_") else prefix
            for number, (name, runs) in enumerate(balances.items()):
                points = _mean_over([run.get(key, []) for run in runs])
                if points:
                    seeds = f"{name} ({len(runs)} seeds)" if len(runs) > 1 else name
                    axis.plot(*zip(*points), color=f"C{number}", label=seeds, linewidth=1.2)
            axis.set_yscale(scale)
            axis.axhline(line, color="grey", linewidth=0.5)
    for top, bottom, objective in zip(axes[0], axes[-1], objectives):
        top.set_title(objective, fontsize=9)
        bottom.set_xlabel("iteration")
    axes[-1, -1].legend(fontsize=7)  # the share's panel: every method has a line there
    _save(figure, path)
    return True


def plot_axis(lines, reference, label, metric, path):
    """
    Args:
        lines (dict[str, dict[float, list[float]]]): line -> x -> values of its seeds.
        reference (tuple): name and values of the method that is drawn as a horizontal line.
        label (str): of the x axis, which is logarithmic.
        metric (str): of the y axis.
        path (Path): PNG to write: mean over seeds, and one standard deviation around it.
    """
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for number, (name, by_x) in enumerate(lines.items()):
        x, mean, std = zip(*((x, statistics.mean(v), _std(v)) for x, v in sorted(by_x.items())))
        axis.plot(x, mean, color=f"C{number}", label=name, linewidth=1.4, marker="o")
        low, high = ([m + sign * s for m, s in zip(mean, std)] for sign in (-1, 1))
        axis.fill_between(x, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
    name, values = reference
    axis.axhline(statistics.mean(values), color="black", linestyle="--", linewidth=1, label=name)
    axis.set_xscale("log")
    axis.set_xlabel(label)
    axis.set_ylabel(metric)
    axis.legend(fontsize=8)
    _save(figure, path)


def plot_gains(gains, path):
    """
    Differences to training from scratch, with their intervals; a row for each data set.

    Args:
        gains (dict[str, dict[str, tuple]]): row -> method -> mean, half of the interval (None if
            there are too few seeds for one) and label.
        path (Path): SVG to write. Its text is text, so a test can read it.
    """
    methods = list(dict.fromkeys(method for row in gains.values() for method in row))
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mokd_det", "font.size": 10}):
        figure, axis = plt.subplots(figsize=(8, 0.8 + 0.72 * len(gains)))
        for place, row in enumerate(gains.values()):
            for method, (mean, half, label) in row.items():
                number = methods.index(method)
                y = place + 0.36 * (number - (len(methods) - 1) / 2)
                shown = None if place else method  # in the legend, once
                style = {"fmt": "o", "capsize": 3, "color": COLORS[number]}
                style["markerfacecolor"] = "white" if half is None else COLORS[number]
                axis.errorbar(mean, y, xerr=half or 0, label=shown, **style)
                axis.text(mean + (half or 0) + 0.5, y, label, va="center", fontsize=9)
        axis.axvline(0, color="black", linewidth=1)
        axis.text(0, -0.62, "from scratch", ha="center", fontsize=9)
        axis.set_yticks(range(len(gains)), gains)
        axis.set_ylim(len(gains) - 0.5, -0.5)
        axis.margins(x=0.14)
        axis.set_xlabel("points above training from scratch, on test, with 95 % interval")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _mean_over(series):
    """Points (iteration, mean over runs) where all runs that have any have one."""
    series = [dict(map(tuple, points)) for points in series if points]
    common = sorted(set.intersection(*map(set, series))) if series else []
    return [(i, statistics.mean(run[i] for run in series)) for i in common]


def _std(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
