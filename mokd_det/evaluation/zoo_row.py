# Copyright (c) The mokd_det authors.
"""A row of a model zoo in Detectron2's form: accuracy of a detector beside what it costs."""

import itertools
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn

from ..data.paths import sha256_of
from .results import count_parameters, read_json_lines

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
        config_file: for the record.
        data_loader: of ``DATASETS.TEST``, one image at a time.
        images: that many of it are timed and counted.

    Returns:
        ``name``, ``schedule``; ``train_seconds_per_iteration`` (median) and
        ``train_memory_gb`` (GPU only), None if not known; ``inference_seconds_per_image``
        (median), ``parameters``, ``gflops`` (multiply-adds, as fvcore counts; mean over images),
        ``accuracy``, AP for each task and data set or top-1, ``config``, ``weights`` and their
        ``sha256`` (None for weights that torchvision names).
    """
    model.eval()
    batches = list(itertools.islice(data_loader, WARM_UP + images))
    log = _training_log(cfg.OUTPUT_DIR)
    weights = cfg.MODEL.WEIGHTS
    unit = "epochs" if cfg.SOLVER.UNIT == "epoch" else f"x {cfg.SOLVER.IMS_PER_BATCH} images"
    return {
        "name": os.path.splitext(os.path.basename(config_file))[0],
        "schedule": f"{cfg.SOLVER.MAX_ITER} {unit}",
        "train_seconds_per_iteration": log["time"],
        "train_memory_gb": log["max_mem"] and log["max_mem"] / 1024,
        "inference_seconds_per_image": _inference_seconds(model, batches),
        "parameters": count_parameters(model),
        "gflops": statistics.mean(_gflops(model, batch) for batch in batches[-images:]),
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
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    path = os.path.join(folder, "metrics.json")
    if os.path.isfile(path):
        seconds = [entry["time"] for entry in read_json_lines(path) if "time" in entry]
    path = os.path.join(folder, "log.txt")  # memory is in no other file
    if os.path.isfile(path):
        with open(path) as f:
            memory = [int(found) for found in re.findall(r"max_mem: (\d+)M", f.read())]
    return {
        "time": statistics.median(seconds) if seconds else None,
        "max_mem": max(memory, default=None),
    }


def _inference_seconds(model: nn.Module, batches: list) -> float:
    synchronise: Callable[[], None] = (
        torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    )
    seconds = []
    for batch in batches:
        synchronise()
        start = time.perf_counter()
        model(batch)
        synchronise()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[min(WARM_UP, len(seconds) - 1) :])


def _gflops(model: nn.Module, batch: Any) -> float:
    analysis = FlopCountAnalysis(model, batch)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.total() / 1e9
