# Copyright (c) The mokd_det authors.
"""A row of a model zoo in Detectron2's form: accuracy of a detector beside what it costs."""

import itertools
import os
import re
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from ..data.paths import sha256_of
from ..logs import read_json_lines
from ..untrusted import markdown_row
from .cost import count_parameters, gflops, seconds_of

WARM_UP = 2  # images
# Task -> title and metric.
TASKS = {
    "bbox": ("box AP", "AP"),
    "segm": ("mask AP", "AP"),
    "keypoints": ("keypoint AP", "AP"),
    "classification": ("top-1", "top1"),
}


@torch.no_grad()
def zoo_row(
    cfg: CfgNode,
    model: nn.Module,
    results: Mapping[str, Any],
    config_file: str,
    data_loader: Iterable,
    images: int = 10,
) -> dict[str, Any]:
    """
    Args:
        cfg: of the run; its ``OUTPUT_DIR`` holds the logs of training, if there was any.
        model: the plain detector or classifier, on its device.
        results: of its evaluation, see :func:`write_results`.
        data_loader: of ``DATASETS.TEST``, one image at a time; ``images`` are timed and counted.

    Returns:
        ``name``, ``schedule``; ``train_seconds_per_iteration`` (median) and ``train_memory_gb``
        (GPU only), None if not known; ``inference_seconds_per_image`` (median), ``parameters``,
        ``gflops`` (mean), ``accuracy`` (AP for each task and data set, or top-1), ``config``,
        ``weights`` and their ``sha256`` (None for weights that torchvision names).
    """
    model.eval()
    batches = list(itertools.islice(data_loader, WARM_UP + images))
    seconds = [seconds_of(model, batch) for batch in batches]
    log = _training_log(cfg.OUTPUT_DIR)
    weights = cfg.MODEL.WEIGHTS
    unit = "epochs" if cfg.SOLVER.UNIT == "epoch" else f"x {cfg.SOLVER.IMS_PER_BATCH} images"
    return {
        "name": os.path.splitext(os.path.basename(config_file))[0],
        "schedule": f"{cfg.SOLVER.MAX_ITER} {unit}",
        "train_seconds_per_iteration": log["time"],
        "train_memory_gb": log["max_mem"] and log["max_mem"] / 1024,
        "inference_seconds_per_image": statistics.median(seconds[min(WARM_UP, len(seconds) - 1) :]),
        "parameters": count_parameters(model),
        "gflops": statistics.mean(gflops(model, batch) for batch in batches[-images:]),
        "accuracy": _accuracies(results),
        "config": config_file,
        "weights": weights or cfg.MODEL.CLASSIFIER.WEIGHTS,
        "sha256": sha256_of(weights) if weights else None,
    }


def format_zoo_row(row: Mapping[str, Any]) -> str:
    """Return the row as a Markdown table with its head, a string of three lines."""
    number = lambda value, form: "" if value is None else format(value, form)  # noqa: E731
    cells = {
        "Name": f"[{row['name']}]({row['config']})",
        "schedule": row["schedule"],
        "train s/iter": number(row["train_seconds_per_iteration"], ".3f"),
        "inference s/im": number(row["inference_seconds_per_image"], ".3f"),
        "train mem (GB)": number(row["train_memory_gb"], ".1f"),
        "params (M)": number(row["parameters"] / 1e6, ".2f"),
        "GFLOPs": number(row["gflops"], ".4g"),
        **{key: number(value, ".1f") for key, value in row["accuracy"].items()},
        "weights": row["weights"],
    }
    lines: list[Iterable[str]] = [cells.keys(), [":---:"] * len(cells), cells.values()]
    return "\n".join(map(markdown_row, lines))


def _accuracies(results: Mapping[str, Any]) -> dict[str, float]:
    """By task, and by data set if there are several."""
    by_set = results if not set(results) & set(TASKS) else {"": results}
    return {
        f"{title} {name}".strip(): by_set[name][task][metric]
        for task, (title, metric) in TASKS.items()
        for name in by_set
        if task in by_set[name]
    }


def _training_log(folder: str) -> dict[str, Any]:
    """Median seconds of an iteration, and most MiB on a GPU; None where Detectron2 logged none."""
    seconds, memory = [], []
    if os.path.isfile(path := os.path.join(folder, "metrics.json")):
        seconds = [entry["time"] for entry in read_json_lines(path) if "time" in entry]
    if os.path.isfile(path := os.path.join(folder, "log.txt")):  # memory is in no other file
        with open(path) as f:
            memory = [int(found) for found in re.findall(r"max_mem: (\d+)M", f.read())]
    return {
        "time": statistics.median(seconds) if seconds else None,
        "max_mem": max(memory, default=None),
    }
