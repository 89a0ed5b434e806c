# Copyright (c) The mokd_det authors.
"""What a study keeps of a run besides its results: small enough for a repository."""

import json
import os
import statistics

from ..data.packages import sha256_of
from ..evaluation import read_json_lines

__all__ = ["read_run"]

POINTS = 24  # of a series that is thinned out


def read_run(run_dir):
    """
    Args:
        run_dir (str or Path): OUTPUT_DIR of a finished run of ``tools/train_net.py``.

    Returns:
        dict: ``results`` as in results.json; ``curves``, the same metrics at every evaluation, and
        ``losses``: dict[str, list[[iteration, value]]]; ``balance``, likewise, medians over equal
        parts of the training of what balance.json has (names without their prefix; empty without a
        teacher); ``weights_sha256``, of model_final.pth.

    Raises:
        FileNotFoundError: the run is not finished.
    """
    with open(os.path.join(run_dir, "results.json")) as f:
        results = json.load(f)
    lines = _lines(os.path.join(run_dir, "metrics.json"))
    metrics = set(_flat(results)) & {name for line in lines for name in line}
    losses = {name for line in lines for name in line if name.startswith(("loss_", "total_loss"))}
    balance = _lines(os.path.join(run_dir, "balance.json"))
    return {
        "results": results,
        "curves": {name: _rounded(_series(lines, name)) for name in sorted(metrics)},
        "losses": {name: _medians(_series(lines, name)) for name in sorted(losses)},
        "balance": {
            name.rsplit("/", 1)[-1]: _medians(_series(balance, name))
            for name in sorted({name for line in balance for name in line} - {"iteration"})
        },
        "weights_sha256": sha256_of(os.path.join(run_dir, "model_final.pth")),
    }


def _lines(path):
    return read_json_lines(path) if os.path.isfile(path) else []


def _flat(results, prefix=""):
    """Yield names as Detectron2 logs them: "data set/task/metric"."""
    for name, value in results.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name


def _series(lines, name):
    """Points (iteration, value); of an iteration that was run twice the later one counts."""
    return sorted({line["iteration"]: line[name] for line in lines if name in line}.items())


def _medians(points):
    parts = min(POINTS, len(points))
    edges = [round(i * len(points) / parts) for i in range(parts + 1)] if parts else []
    return _rounded(
        [
            [statistics.median(column) for column in zip(*points[start:end])]
            for start, end in zip(edges, edges[1:])
        ]
    )


def _rounded(points):
    return [[iteration, float(f"{value:.5g}")] for iteration, value in points]
