# Copyright (c) The mokd_det authors.
"""Results as JSON."""

import json
import math
import os

__all__ = ["count_parameters", "write_results"]


def count_parameters(model):
    """Return the number of a module's parameters (trainable or not; buffers do not count)."""
    return sum(p.numel() for p in model.parameters())


def write_results(results, output_dir):
    """
    Write evaluation results to ``results.json``.

    Args:
        results (dict): of Detectron2's ``DefaultTrainer.test``: for one data set
            ``{task: {metric: value}}``, for several ``{data set: {task: {metric: value}}}``.
            Metrics without a value (NaN, as AP of a size that does not occur) become null.
        output_dir (str): folder.

    Returns:
        str: the file.
    """
    path = os.path.join(output_dir, "results.json")
    with open(path, "w") as f:
        json.dump(_finite(results), f, indent=2)
    return path


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    value = float(value)
    return value if math.isfinite(value) else None
