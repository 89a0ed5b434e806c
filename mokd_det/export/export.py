# Copyright (c) The mokd_det authors.
"""A trained student as a file for deployment, compared with its source."""

import copy
import json
import logging
import os

import torch
import torch.nn.functional as F

from ..data import register_datasets
from ..modeling import Classifier, load_trained_model
from .checkpoint import export_checkpoint
from .classifier import DeployedClassifier, HalfClassifier
from .detector import check_detector, check_scripting, check_tracing, detect, detect_batch
from .images import SCALES, read_images, sized, to_tensor
from .metadata import build_metadata
from .onnx import check_onnx, export_onnx, load_onnx
from .parity import DEFAULT_TOLERANCE, compare_detections, compare_tensors, parity
from .precision import check_half, halve_backbone
from .torch_export import BackboneAndHead, export_program, load_program
from .torchscript import freeze, load_torchscript, save_torchscript, script, trace

__all__ = ["FORMATS", "METHODS", "check_options", "export_model"]

FORMATS = {
    "torchscript": "model.ts",
    "onnx": "model.onnx",
    "torch_export": "model.pt2",
    "checkpoint": "model.pth",
}
"""Format -> name of the file."""
METHODS = ("tracing", "scripting")

logger = logging.getLogger(__name__)


def check_options(format, method="tracing", half=False, freeze=False):
    """
    Raises:
        ValueError: options that do not exist or not together.
    """
    for option, value, known in (("format", format, FORMATS), ("method", method, METHODS)):
        if value not in known:
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
    for option, value in (("half", half), ("freeze", freeze)):
        if value and format != "torchscript":
            raise ValueError(
                f"--{option} is for --format torchscript, not for '{format}': leave it out."
            )


def export_model(
    cfg,
    output_dir,
    format="torchscript",
    method="tracing",
    *,
    half=False,
    freeze=False,
    tolerance=DEFAULT_TOLERANCE,
    images=(),
    option="MODEL.WEIGHTS",
):
    """
    Write a trained model for deployment, read the file again and compare it with the model.

    Args:
        cfg (CfgNode): the student's config with its trained ``MODEL.WEIGHTS``.
        output_dir (str): folder; gets the file of ``FORMATS`` and ``export.json``.
        format (str): one of ``FORMATS``.
        method (str): one of ``METHODS``.
        half (bool): float16 for a detector's backbone, or a classifier's network.
        freeze (bool): weights as constants, BatchNorm folded.
        tolerance (float): see :mod:`mokd_det.export.parity`.
        images (sequence[str]): files to compare on; empty: the first of ``DATASETS.TEST``.
        option (str): the config key of the weights, for messages.

    Returns:
        dict: what ``export.json`` has. ``format``, ``method``, ``file``, ``bytes``, ``half``,
        ``frozen``, ``metadata``, ``images`` (where they come from) and ``parity``, of
        :func:`mokd_det.export.parity.parity`; in it also ``batch``, if two sizes go into one
        batch, and with ``half`` ``float32``, the differences to the model in float32. For a
        checkpoint only ``format``, ``bytes``, ``weights`` and ``config``.

    Raises:
        ValueError, ImportError, FileNotFoundError: see the checks; nothing has been written.
    """
    check_options(format, method, half, freeze)
    if format == "checkpoint":
        paths = export_checkpoint(cfg, output_dir)
        result = {"format": format, "bytes": os.path.getsize(paths["weights"]), **paths}
        return _write(result, output_dir)
    register_datasets(cfg)
    model = load_trained_model(cfg, option)
    for parameter in model.parameters():
        parameter.requires_grad = False
    is_classifier = isinstance(model, Classifier)
    _check(cfg, model, format, method, is_classifier)
    metadata = build_metadata(cfg, model)
    if format != "torchscript":  # those take one type only
        metadata["input"] = metadata["input"].replace("uint8 or float32", "float32")
    pictures, source = read_images(cfg, images)
    pictures = [to_tensor(cfg, picture) for picture in pictures]
    os.makedirs(output_dir, exist_ok=True)
    path = os.path.join(output_dir, FORMATS[format])
    work = _export_classifier if is_classifier else _export_detector
    compared = work(model, pictures, path, metadata, format, method, half, freeze, tolerance)
    result = {
        "format": format,
        **({"method": method} if format == "torchscript" else {}),
        "file": path,
        "bytes": os.path.getsize(path),
        "half": half,
        "frozen": freeze,
        "images": source,
        "parity": compared,
        "metadata": metadata,
    }
    return _write(result, output_dir)


def _write(result, output_dir):
    with open(os.path.join(output_dir, "export.json"), "w") as f:
        json.dump(result, f, indent=2)
    return result


def _check(cfg, model, format, method, is_classifier):
    if is_classifier:
        if format == "onnx":
            check_onnx(model)
        return
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise ValueError(
            f"INPUT.FORMAT is '{cfg.INPUT.FORMAT}': only detectors of 'RGB' or 'BGR' images are "
            "deployed. Use --format checkpoint."
        )
    check_detector(model, cfg.MODEL.META_ARCHITECTURE)
    if format == "onnx":
        check_onnx(model)
    if method == "scripting":
        check_scripting(model)
    elif format != "torch_export":
        check_tracing(model)


def _export_detector(model, pictures, path, metadata, format, method, half, frozen, tolerance):
    device = model.pixel_mean.device
    if format == "torch_export":
        return _export_backbone_and_head(model, pictures, path, metadata, tolerance)
    inputs = [sized(picture, scale).to(device) for picture in pictures for scale in SCALES]
    # One colour, where a trained detector finds nothing.
    inputs.append(model.pixel_mean.round().to(torch.uint8).expand_as(inputs[0]).contiguous())
    in_float32 = [detect(model, image) for image in inputs]
    if half:
        halve_backbone(model)
        check_half(lambda: detect(model, inputs[0]))
    expected = [detect(model, image) for image in inputs] if half else in_float32
    # Every part of the model runs only on an example that has detections.
    example = max(zip(inputs, expected), key=lambda pair: len(pair[1]["scores"]))[0]

    if format == "onnx":
        export_onnx(model, example, path, metadata)
        run = load_onnx(path)
        found = [run(image) for image in inputs]
        return parity(expected, found, inputs, tolerance, compare_detections)

    if method == "tracing":
        metadata["traced_on"] = device.type
    exported = script(model) if method == "scripting" else trace(model, example)
    exported = _save_and_load(exported, path, metadata, frozen, device)
    with torch.no_grad():
        found = [exported(image) for image in inputs]
    result = parity(expected, found, inputs, tolerance, compare_detections)
    if method == "scripting":  # traced, it takes one image at a time
        two = inputs[:2]
        with torch.no_grad():
            batch = exported.batch(two)
        result["batch"] = parity(
            detect_batch(model, two), batch, two, tolerance, compare_detections
        )
        result["passed"] = result["passed"] and result["batch"]["passed"]
    if half:
        result["float32"] = _differences(in_float32, found, compare_detections)
    return result


def _differences(expected, found, compare):
    """What float16 costs: for information, so without a tolerance."""
    result = parity(expected, found, [], float("inf"), compare)
    return {
        k: v for k, v in result.items() if "difference" in k or k in ("unmatched", "detections")
    }


def _save_and_load(module, path, metadata, frozen, device):
    save_torchscript(freeze(module) if frozen else module, path, metadata)
    # Not by ``to``, which leaves constants where they are: those of a frozen file are its weights.
    return load_torchscript(path, device)[0]


@torch.no_grad()
def _export_backbone_and_head(model, pictures, path, metadata, tolerance):
    multiple = max(model.backbone.size_divisibility, 32)
    metadata["input"] = (
        f"images (N, 3, H, W) float32 in [0, 255], H and W multiples of {multiple}, at least "
        f"{5 * multiple}; padding has the value of pixel_mean"
    )
    metadata["outputs"] = {
        "features": "dict of maps (N, C, H / stride, W / stride)",
        "head": "tuple of lists of maps, one for each level: logits, box deltas, ...",
    }
    inputs = [
        _stack(pictures, height * multiple, width * multiple)[:count].to(model.pixel_mean.device)
        for height, width, count in ((8, 8, 2), (5, 9, 1), (7, 6, 3))
    ]
    module = BackboneAndHead(model).eval()
    export_program(module, inputs[0], path, metadata, multiple)
    expected, run = [module(images) for images in inputs], load_program(path)
    return parity(expected, [run(images) for images in inputs], inputs, tolerance, compare_tensors)


def _stack(pictures, height, width):
    """Three of the pictures (again, if they are fewer), float32 at one size."""
    pictures = [pictures[i % len(pictures)].to(torch.float32) for i in range(3)]
    return torch.stack([F.interpolate(p[None], (height, width))[0] for p in pictures])


@torch.no_grad()
def _export_classifier(model, pictures, path, metadata, format, method, half, frozen, tolerance):
    in_float32 = DeployedClassifier(copy.deepcopy(model)).eval()
    module = HalfClassifier(model).eval() if half else in_float32
    device, side = model.device, pictures[0].shape[-1]
    batch = _stack(pictures, side, side).to(device)
    if half:
        check_half(lambda: module(batch))
    inputs = [batch, batch[:1].to(torch.uint8)]
    others = [_stack(pictures, more, more)[:2].to(device) for more in (side + 32, side * 3 // 2)]
    any_size = format != "torch_export" and _takes(module, others)
    exported = None
    if format != "torch_export":
        exported = script(module) if method == "scripting" else trace(module, batch)
        # A trace may have kept the example's size where the network computes with it.
        any_size = any_size and _agrees(module, exported, others, tolerance)
    metadata["image_size"] = "any" if any_size else side
    inputs += others if any_size else []

    if format == "onnx":
        export_onnx(module, batch, path, metadata)
        run = load_onnx(path)
    elif format == "torch_export":
        export_program(module, batch, path, metadata, multiple=0)
        program = load_program(path)
        inputs = [x.to(torch.float32) for x in inputs]
        run = program
    else:
        run = _save_and_load(exported, path, metadata, frozen, device)
    found = [run(x) for x in inputs]
    result = parity([module(x) for x in inputs], found, inputs, tolerance, compare_tensors)
    if half:
        expected = [in_float32(x) for x in inputs]
        result["float32"] = _differences(expected, found, compare_tensors)
    return result


def _takes(module, inputs):
    """Whether a network takes images of other sizes: vision transformers say no by an error."""
    try:
        for images in inputs:
            module(images)
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def _agrees(module, exported, inputs, tolerance):
    return _takes(exported, inputs) and all(
        compare_tensors(module(x), exported(x))["outputs"] <= tolerance for x in inputs
    )
