# Copyright (c) The mokd_det authors.
"""Results as JSON, and those of earlier runs."""

import itertools
import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CLASSIFICATION_METRICS = ("top1", "top5")


def count_parameters(model: nn.Module) -> int:
    """Return the number of a module's parameters (trainable or not; buffers do not count)."""
    return sum(p.numel() for p in model.parameters())


def write_results(results: Mapping[str, Any], output_dir: str) -> str:
    """
    Write evaluation results to ``results.json``.

    Args:
        results: of Detectron2's ``DefaultTrainer.test``: for one data set
            ``{task: {metric: value}}``, for several ``{data set: {task: {metric: value}}}``.
            Metrics without a value (NaN, as AP of a size that does not occur) become null.
        output_dir: folder.

    Returns:
        The file.
    """
    path = os.path.join(output_dir, "results.json")
    with open(path, "w") as f:
        json.dump(finite(results), f, indent=2)
    return path


def read_json_lines(path: str) -> list[dict[str, Any]]:
    """
    Args:
        path: ``metrics.json`` or ``balance.json`` of a run.

    Returns:
        Its lines, without one that was cut off because the run was killed there (and resumed).
    """
    records = []
    with open(path) as f:
        for line in f:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def set_aside(folder: str | Path) -> Path | None:
    """
    Rename a folder, so that new results do not mix with what is in it.

    Args:
        folder: need not exist.

    Returns:
        Its new name, the first free one of ``folder.1``, ``folder.2``, ...; None if there was
        nothing to rename.
    """
    folder = Path(folder)
    if not folder.exists():
        return None
    names = (Path(f"{folder}.{i}") for i in itertools.count(1))
    return folder.rename(next(name for name in names if not name.exists()))


def format_comparison(results_by_model: Mapping[str, Mapping[str, Any]]) -> str:
    """
    Args:
        results_by_model: name of a model -> its results, all of the same data sets, in either form
            of :func:`write_results`.

    Returns:
        A Markdown table with a line for each data set, task and model.
    """
    rows = []
    for model, results in results_by_model.items():
        nested = all(isinstance(v, dict) for task in results.values() for v in task.values())
        for data_set, tasks in (results if nested else {"": results}).items():
            rows += [(data_set, task, model, metrics) for task, metrics in tasks.items()]
    rows.sort(key=lambda row: row[:2])
    found = [m for m in (*METRICS, *CLASSIFICATION_METRICS) if any(m in row[3] for row in rows)]
    lines = [["data set", "task", "model", *found], ["---"] * (3 + len(found))]
    for *head, metrics in rows:
        lines.append([*head, *(f"{metrics[m]:.2f}" if m in metrics else "" for m in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def finite(value: Any) -> Any:
    """Return nested dicts with null (None) for every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if not isinstance(value, numbers.Real) or isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None
