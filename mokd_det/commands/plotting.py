# Copyright (c) The mokd_det authors.
"""``mokd plot-balance``: the work."""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from ..evaluation import read_json_lines  # noqa: E402

# Panel: label, scale of the axis, prefixes of the scalars, lines to compare with.
PANELS = (
    ("conflict: cosine with the task gradient", "linear", ("cosine_", "seen_cosine_"), (0,)),
    ("dominance: norm / the task gradient's", "log", ("dominance_", "seen_dominance_"), (1,)),
    ("weights", "log", ("weight_",), (1,)),
    ("the task in the update", "linear", ("share_task", "update_cosine", "starved"), (0, 0.1, 1)),
    ("levels' share of |g|^2", "linear", ("level_",), (0, 1)),
)


FALLBACKS = "fallbacks_"


def read_balance(run_dir):
    """
    Args:
        run_dir (str): OUTPUT_DIR of a distillation run.

    Returns:
        dict[str, tuple[ndarray]]: scalar's name -> (iterations, values). Of an iteration that
        is there twice, because the run was resumed, the later one counts.

    Raises:
        FileNotFoundError: there is no balance.json.
        ValueError: nothing was balanced.
    """
    path = os.path.join(run_dir, "balance.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} does not exist: {run_dir} is not the OUTPUT_DIR of a run with MOKD.ENABLED."
        )
    series: dict[str, dict[int, float]] = {}
    for record in read_json_lines(path):
        iteration = record.pop("iteration")
        for name, value in record.items():
            series.setdefault(name, {})[iteration] = value
    if not series:
        raise ValueError(f"{path} has no balance in it: {run_dir} is a run without a teacher.")
    return {
        name: (np.array(sorted(values)), np.array([values[i] for i in sorted(values)]))
        for name, values in series.items()
    }


def running_median(values, window=5):
    """Return the median of each value and its neighbours, ``window`` in all (fewer at the ends)."""
    half = window // 2
    return np.array(
        [np.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]
    )


def _series(run, prefixes):
    """Sorted (name and where it is measured, iterations, values) of scalars with these prefixes."""
    found = []
    for full, (iterations, values) in sorted(run.items()):
        _, measured_at, name = full.split("/")
        if name.startswith(prefixes):
            found.append((f"{name} (at {measured_at})", iterations, values))
    return found


def plot_balance(run_dirs, output):
    """
    Args:
        run_dirs (list[str]): OUTPUT_DIR of each run.
        output (str): PNG to write.
    """
    if not os.path.isdir(os.path.dirname(output) or "."):
        raise FileNotFoundError(f"--output '{output}': its folder does not exist.")
    runs = [read_balance(run_dir) for run_dir in run_dirs]
    panels = [p for p in PANELS if any(_series(run, p[2]) for run in runs)]
    figure, axes = plt.subplots(
        len(panels),
        len(runs),
        figsize=(7 * len(runs), 2.4 * len(panels)),
        sharex="col",
        sharey="row",  # runs are to be compared
        squeeze=False,
    )
    for column, (run_dir, run) in enumerate(zip(run_dirs, runs)):
        fallbacks = [
            f"{int(values[-1])} {name[len(FALLBACKS) :]}"
            for name, _, values in _series(run, FALLBACKS)
        ]
        title = f"{run_dir}\nfallbacks: {', '.join(fallbacks) or 'not recorded'}"
        axes[0, column].set_title(title, fontsize=9)
        for axis, (label, scale, prefixes, lines) in zip(axes[:, column], panels):
            for name, iterations, values in _series(run, prefixes):
                line = axis.plot(iterations, values, linewidth=0.5, alpha=0.4)[0]
                median = running_median(values)
                axis.plot(iterations, median, color=line.get_color(), label=name)
            axis.set_yscale(scale)
            axis.set_ylabel(label, fontsize=8)
            for value in lines:
                axis.axhline(value, color="grey", linewidth=0.5)
            if axis.has_data() and axis.get_legend_handles_labels()[1]:
                axis.legend(fontsize=7)
        axes[-1, column].set_xlabel("iteration")
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    plt.close(figure)
