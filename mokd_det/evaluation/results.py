# Copyright (c) The mokd_det authors.
"""Results as JSON, and those of earlier runs."""

import itertools
import json
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..untrusted import markdown_row
from ..files import replace_file

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CLASSIFICATION_METRICS = ("top1", "top5")


def write_results(results: Mapping[str, Any], output_dir: str) -> str:
    """
    Write results of Detectron2's ``DefaultTrainer.test`` to ``results.json``; return its path.
    They are ``{task: {metric: value}}`` of one data set, or a dict of these by data set. Metrics
    without a value (NaN, as AP of a size that does not occur) become null.
    """
    path = os.path.join(output_dir, "results.json")
    text = json.dumps(finite(results), indent=2)
    replace_file(path, lambda f: f.write(text.encode()))
    return path


def set_aside(folder: str | Path) -> Path | None:
    """
    Rename a folder, so that new results do not mix with what is in it, to the first free one of
    ``folder.1``, ``folder.2``, ... Return the new name; None if there is no such folder.
    """
    folder = Path(folder)
    if not folder.exists():
        return None
    names = (Path(f"{folder}.{i}") for i in itertools.count(1))
    return folder.rename(next(name for name in names if not name.exists()))


def format_comparison(results_by_model: Mapping[str, Mapping[str, Any]]) -> str:
    """
    Return a Markdown table with a line for each data set, task and model. Results are by a model's
    name, all of the same data sets, in either form of :func:`write_results`; that of one data set
    does not name it.
    """
    rows = [
        (data_set, task, model, metrics)
        for model, results in results_by_model.items()
        for data_set, task, metrics in _by_set_and_task(results)
    ]
    rows.sort(key=lambda row: row[:2])
    found = _metrics_of([row[3] for row in rows])
    first = 0 if any(row[0] for row in rows) else 1
    head = ["data set", "task", "model", *found][first:]
    lines = [head, ["---"] * len(head)]
    for *names, metrics in rows:
        values = (f"{metrics[m]:.2f}" if m in metrics else "" for m in found)
        lines.append([*map(str, names[first:]), *values])
    return "\n".join(map(markdown_row, lines))


def headlines(results: Mapping[str, Any]) -> list[str]:
    """Return a line with the usual metrics for each data set and task of :func:`write_results`."""
    lines = []
    for data_set, task, metrics in _by_set_and_task(results):
        shown = ", ".join(f"{m} {metrics[m]:.1f}" for m in _metrics_of([metrics]))
        if shown:
            lines.append(f"{data_set} {task}".lstrip() + f", in percent: {shown}")
    return lines


def _by_set_and_task(results: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """The data set is "" if the results are of one."""
    nested = all(isinstance(v, dict) for task in results.values() for v in task.values())
    by_set: Mapping[str, Any] = results if nested else {"": results}
    return [
        (data_set, task, metrics)
        for data_set, tasks in by_set.items()
        for task, metrics in tasks.items()
    ]


def _metrics_of(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return [m for m in (*METRICS, *CLASSIFICATION_METRICS) if any(m in row for row in found)]


def finite(value: Any) -> Any:
    """Return nested dicts with null (None) for every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if not isinstance(value, numbers.Real) or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None
