#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Draw conflict, dominance and weights of one or several runs over their iterations, as one PNG.

Example:
  python tools/plot_balance.py output/quick_start/student_mokd --output balance.png

Reads balance.json of each run: every step as it was computed. Thin lines are steps, thick ones
their running median.
"""

import argparse
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

PANELS = {
    "cosine": ("conflict: cosine of distillation and task gradient", "linear"),
    "dominance": ("dominance: norm of distillation / task gradient", "log"),
    "weight": ("weights", "log"),
}


def read_balance(run_dir):
    """
    Args:
        run_dir (str): OUTPUT_DIR of a distillation run.

    Returns:
        dict[str, tuple[ndarray]]: scalar's name -> (iterations, values). Of a step that was run
        twice, because the run was resumed, the later one counts.

    Raises:
        FileNotFoundError: there is no balance.json.
    """
    path = os.path.join(run_dir, "balance.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} does not exist: {run_dir} is not the OUTPUT_DIR of a run with MOKD.ENABLED."
        )
    series = {}
    with open(path) as f:
        for line in f:
            record = json.loads(line)
            iteration = record.pop("iteration")
            for name, value in record.items():
                series.setdefault(name, {})[iteration] = value
    return {
        name: (np.array(sorted(values)), np.array([values[i] for i in sorted(values)]))
        for name, values in series.items()
    }


def running_median(values, window=25):
    """Return the median of each value and its neighbours, ``window`` in all (fewer at the ends)."""
    half = window // 2
    return np.array(
        [np.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]
    )


def plot_balance(run_dirs, output):
    """
    Args:
        run_dirs (list[str]): OUTPUT_DIR of each run.
        output (str): PNG to write.
    """
    figure, axes = plt.subplots(
        len(PANELS), len(run_dirs), figsize=(7 * len(run_dirs), 8), sharex="col", squeeze=False
    )
    for column, run_dir in enumerate(run_dirs):
        series = read_balance(run_dir)
        axes[0, column].set_title(run_dir)
        for axis, (kind, (label, scale)) in zip(axes[:, column], PANELS.items()):
            for name, (iterations, values) in sorted(series.items()):
                _, place, quantity = name.split("/")
                if not quantity.startswith(f"{kind}_"):
                    continue
                line = axis.plot(iterations, values, linewidth=0.5, alpha=0.4)[0]
                legend = f"{quantity[len(kind) + 1 :]} (at {place})"
                axis.plot(
                    iterations, running_median(values), color=line.get_color(), label=legend
                )
            axis.set_yscale(scale)
            axis.set_ylabel(label, fontsize=8)
            axis.axhline(0 if scale == "linear" else 1, color="grey", linewidth=0.5)
            axis.legend(fontsize=8)
        axes[-1, column].set_xlabel("iteration")
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--output", default="balance.png", help="PNG to write (%(default)s)")
    args = parser.parse_args()
    plot_balance(args.run_dirs, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
