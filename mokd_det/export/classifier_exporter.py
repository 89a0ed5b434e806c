# Copyright (c) The mokd_det authors.
"""Classifiers as files."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image
from torch import Tensor, nn

from ..config import stock_config
from ..data.classification import Batch, build_transform
from ..data.classification.sources import class_names
from .classifier import DeployedClassifier, HalfClassifier
from .exporter import Exporter, ExportOptions, differences, save_and_load, stack
from .metadata import Json, class_names_of, common_metadata, normalisation_of
from .onnx import check_onnx, export_onnx, load_onnx
from .parity import compare_tensors, parity
from .precision import check_half
from .torch_export import export_program, load_program
from .torchscript import script_network, trace_network

INPUT = "images (N, 3, H, W), uint8 or float32 in [0, 255], channels in the order of 'format'"


class ClassifierExporter(Exporter):
    """See :mod:`mokd_det.export.classifier` for what a deployed classifier takes and returns."""

    def __init__(self, cfg: CfgNode, stock_options: Sequence[str] = ()):
        super().__init__(cfg)
        self.stock_options = stock_options

    def check(self, model: nn.Module, options: ExportOptions) -> None:
        if options.format == "onnx":
            check_onnx(model)

    def metadata(self, model: Any) -> Json:
        options = self.cfg.INPUT.CLASSIFICATION
        return {
            "task": "classification",
            "class_names": class_names_of(self.cfg, model.num_classes, _class_names),
            # torchvision's Resize, then CenterCrop.
            "resize": {
                "short_edge": options.RESIZE_TEST,
                "crop": options.SIZE_TEST,
                "interpolation": options.INTERPOLATION,
            },
            "input": INPUT,
            "outputs": {"logits": "(N, C) float32; their softmax are probabilities"},
            **common_metadata(
                self.cfg, *normalisation_of(model), stock_config(self.cfg, self.stock_options)
            ),
        }

    def to_tensor(self, image: np.ndarray) -> Tensor:
        return build_transform(self.cfg, is_train=False)(Image.fromarray(image))

    def eager_input(self, image: Tensor) -> Batch:
        return Batch(image[None], torch.zeros(1, dtype=torch.long))

    def exported_input(self, image: Tensor) -> Tensor:
        return image[None]

    @torch.no_grad()
    def write(
        self, model: Any, pictures: list[Tensor], path: str, metadata: Json, options: ExportOptions
    ) -> Json:
        in_float32 = DeployedClassifier(copy.deepcopy(model)).eval()
        module = HalfClassifier(model).eval() if options.half else in_float32
        device, side = model.device, pictures[0].shape[-1]
        batch = stack(pictures, side, side).to(device)
        if options.half:
            check_half(lambda: module(batch))
        inputs = [batch, batch[:1].to(torch.uint8)]
        others = [stack(pictures, more, more)[:2].to(device) for more in (side + 32, side * 3 // 2)]
        any_size = options.format != "torch_export" and _takes(module, others)
        exported: Any = None
        if options.format != "torch_export":
            is_scripted = options.method == "scripting"
            exported = script_network(module) if is_scripted else trace_network(module, batch)
            # A trace may have kept the example's size where the network computes with it.
            any_size = any_size and _agrees(module, exported, others, options.tolerance)
        metadata["image_size"] = "any" if any_size else side
        inputs += others if any_size else []

        if options.format == "onnx":
            export_onnx(module, batch, path, metadata)
            run = load_onnx(path)
        elif options.format == "torch_export":
            export_program(module, batch, path, metadata, multiple=0)
            run = load_program(path)
            inputs = [x.to(torch.float32) for x in inputs]
        else:
            run = save_and_load(exported, path, metadata, options.freeze, device)
        found = [run(x) for x in inputs]
        expected = [module(x) for x in inputs]
        result = parity(expected, found, inputs, options.tolerance, compare_tensors)
        if options.half:
            result["float32"] = differences([in_float32(x) for x in inputs], found, compare_tensors)
        return result


def _takes(module, inputs) -> bool:
    """Whether a network takes images of other sizes: vision transformers say no by an error."""
    try:
        for images in inputs:
            module(images)
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def _agrees(module, exported, inputs, tolerance) -> bool:
    return _takes(exported, inputs) and all(
        compare_tensors(module(x), exported(x))["outputs"] <= tolerance for x in inputs
    )


def _class_names(name: str, metadata) -> list[str]:
    return class_names(metadata.image_path)
