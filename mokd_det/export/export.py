# Copyright (c) The mokd_det authors.
"""A trained student as a file for deployment, compared with its source."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from detectron2.config import CfgNode

from ..data import register_datasets
from .exporter import ExportOptions
from .images import read_images
from .metadata import Json

if TYPE_CHECKING:
    from ..tasks import Task

FORMATS = {  # format -> name of the file
    "torchscript": "model.ts",
    "onnx": "model.onnx",
    "torch_export": "model.pt2",
    "checkpoint": "model.pth",
}
METHODS = ("tracing", "scripting")
DEFAULT_OPTIONS = ExportOptions()


def check_options(format: str, method: str = "", half: bool = False, freeze: bool = False) -> None:
    """Raise ValueError for options that do not exist, or not together; see ExportOptions."""
    for option, value, known in (("format", format, FORMATS), ("method", method, METHODS)):
        if value not in known and not (option == "method" and not value):
            raise ValueError(f"--{option} is '{value}': expected one of {', '.join(known)}.")
    if method == "scripting" and format != "torchscript":
        raise ValueError(
            f"--method scripting is for --format torchscript: {format} "
            + ("holds weights only." if format == "checkpoint" else "is made by tracing.")
            + " Leave --method out."
        )
    if half and freeze:
        raise ValueError(
            "--half and --freeze exclude each other: folding BatchNorm into weights of float16 "
            "rounds them once more, and the file would not return what the model returns."
        )
    for option, is_set in (("half", half), ("freeze", freeze)):
        if is_set and format != "torchscript":
            raise ValueError(
                f"--{option} is for --format torchscript, not for '{format}': leave it out."
            )


def export_model(
    task: "Task",
    cfg: CfgNode,
    output_dir: str,
    options: ExportOptions = DEFAULT_OPTIONS,
    images: Sequence[str] = (),
    option: str = "MODEL.WEIGHTS",
) -> Json:
    """
    Write a trained model for deployment, read the file again and compare it with the model.
    Refusals (ValueError, ImportError, FileNotFoundError) come before anything is written.

    Args:
        task, cfg: of the model, with its trained ``MODEL.WEIGHTS``.
        output_dir: gets the file of ``FORMATS`` and ``export.json``.
        images: files to compare on; empty: the first of ``DATASETS.TEST``.
        option: the config key of the weights, for messages.

    Returns:
        What ``export.json`` has. ``images``: where they come from; ``parity``: see
        :func:`mokd_det.export.parity.parity`, and in it ``batch``, if two sizes go into one batch,
        with ``half`` ``float32``, the differences to the model in float32, and for ONNX ``ties``,
        what the model changes if equal scores stay in order, if it does. For a checkpoint
        only ``format``, ``bytes``, ``weights`` and ``config``.
    """
    format = options.format
    check_options(format, options.method, options.half, options.freeze)
    if format == "checkpoint":
        paths = export_checkpoint(task, cfg, output_dir)
        result = {"format": format, "bytes": os.path.getsize(paths["weights"]), **paths}
    else:
        register_datasets(cfg)
        result = _export_compared(task, cfg, output_dir, options, images, option)
    Path(output_dir, "export.json").write_text(json.dumps(result, indent=2))
    return result


def _export_compared(
    task: "Task",
    cfg: CfgNode,
    output_dir: str,
    options: ExportOptions,
    images: Sequence[str],
    option: str,
) -> Json:
    """Write what runs without Detectron2, and compare it; as :func:`export_model`."""
    format = options.format
    model, exporter = task.load_trained(cfg, option), task.exporter(cfg)
    if not options.method:
        method = exporter.default_method if format == "torchscript" else "tracing"
        options = dataclasses.replace(options, method=method)
    for parameter in model.parameters():
        parameter.requires_grad = False
    exporter.check(model, options)
    metadata = exporter.metadata(model)
    if format != "torchscript":  # those take one type only
        metadata["input"] = metadata["input"].replace("uint8 or float32", "float32")
    pictures, source = read_images(cfg, images)
    os.makedirs(output_dir, exist_ok=True)
    path = os.path.join(output_dir, FORMATS[format])
    tensors = [exporter.to_tensor(picture) for picture in pictures]
    compared = exporter.write(model, tensors, path, metadata, options)
    return {
        "format": format,
        **({"method": options.method} if format == "torchscript" else {}),
        "file": path,
        "bytes": os.path.getsize(path),
        "half": options.half,
        "frozen": options.freeze,
        "images": source,
        "parity": compared,
        "metadata": metadata,
    }


def export_checkpoint(task: "Task", cfg: CfgNode, output_dir: str) -> dict[str, str]:
    """
    Write a trained model so that stock Detectron2 loads it: ``model.pth`` (weights only: no
    optimizer, no projector) and ``config.yaml`` (the keys of
    :func:`~mokd_det.config.stock_config`, ``MODEL.WEIGHTS`` pointing to the file beside it). Return
    their paths; ValueError: weights that do not fit the config, or the folder is a run's own.
    """
    if os.path.isfile(os.path.join(output_dir, "last_checkpoint")):
        raise ValueError(
            f"--output is '{output_dir}', the OUTPUT_DIR of a run (it has a last_checkpoint), "
            "whose config.yaml would be overwritten: choose another folder."
        )
    model = task.load_trained(cfg)
    os.makedirs(output_dir, exist_ok=True)
    weights, config = (os.path.join(output_dir, name) for name in ("model.pth", "config.yaml"))
    torch.save({"model": model.state_dict(), "__author__": "mokd_det"}, weights)
    # What training started from is not needed: there is nothing to download here.
    stock = task.stock_config(task.untrained_config(cfg))
    stock.MODEL.WEIGHTS = os.path.abspath(weights)  # so that it works from any folder
    Path(config).write_text(stock.dump())
    return {"weights": weights, "config": config}
