# Copyright (c) The mokd_det authors.
"""Detectors as files."""

from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from torch import Tensor, nn

from ..config import stock_config
from .detector import (
    check_detector,
    check_scripting,
    check_tracing,
    detect,
    detect_batch,
    num_classes,
    output_names,
    score_threshold,
)
from .exporter import Exporter, ExportOptions, differences, save_and_load, stack
from .images import SCALES, sized
from .metadata import class_names_of, common_metadata, data_sets_of
from .onnx import check_onnx, export_onnx, load_onnx
from .parity import compare_detections, compare_tensors, parity
from .precision import check_half, halve_backbone
from .torch_export import BackboneAndHead, export_program, load_program
from .torchscript import script, trace

INPUT = "one image (3, H, W), uint8 or float32 in [0, 255], channels in the order of 'format'"
OUTPUTS = {
    "boxes": "(R, 4) float32, x0 y0 x1 y1 in pixels of the image given",
    "scores": "(R,) float32 in [0, 1], descending",
    "classes": "(R,) int64, index into class_names",
    "masks": "(R, M, M) float32 probabilities over each box; paste_masks() puts them on an image",
    "keypoints": "(R, K, 3) float32, x y in pixels of the image given, score",
    "sem_seg": "(C, H, W) float32 logits",
}


class DetectorExporter(Exporter):
    """See :mod:`mokd_det.export.detector` for what a deployed detector takes and returns."""

    def check(self, model: nn.Module, options: ExportOptions) -> None:
        if self.cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise ValueError(
                f"INPUT.FORMAT is '{self.cfg.INPUT.FORMAT}': only detectors of 'RGB' or 'BGR' "
                "images are deployed. Use --format checkpoint."
            )
        check_detector(model, self.cfg.MODEL.META_ARCHITECTURE)
        if options.format == "onnx":
            check_onnx(model)
        if options.method == "scripting":
            check_scripting(model)
        elif options.format != "torch_export":
            check_tracing(model)

    def metadata(self, model: nn.Module) -> dict[str, Any]:
        cfg = self.cfg
        return {
            "task": "detection",
            "class_names": class_names_of(cfg, num_classes(model), _class_names),
            # Detectron2's ResizeShortestEdge; short edge 0 leaves images as they are.
            "resize": {
                "short_edge": cfg.INPUT.MIN_SIZE_TEST,
                "longest_edge": cfg.INPUT.MAX_SIZE_TEST,
                "interpolation": "bilinear",
            },
            "score_threshold": score_threshold(model),
            "keypoint_names": self._keypoint_names(),
            "input": INPUT,
            "outputs": {name: OUTPUTS[name] for name in output_names(model)},
            **common_metadata(cfg, model, stock_config(cfg)),
        }

    def _keypoint_names(self) -> list[str] | None:
        for name in data_sets_of(self.cfg) if self.cfg.MODEL.KEYPOINT_ON else ():
            if "keypoint_names" in MetadataCatalog.get(name).as_dict():
                return list(MetadataCatalog.get(name).keypoint_names)
        return None

    def to_tensor(self, image: np.ndarray) -> Tensor:
        options = self.cfg.INPUT
        if short := options.MIN_SIZE_TEST:  # as Detectron2's DefaultPredictor
            resize = T.ResizeShortestEdge([short, short], options.MAX_SIZE_TEST)
            image = resize.get_transform(image).apply_image(image)
        if options.FORMAT == "BGR":
            image = image[:, :, ::-1]
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))

    def eager_input(self, image: Tensor) -> list[dict]:
        return [{"image": image, "height": image.shape[1], "width": image.shape[2]}]

    def exported_input(self, image: Tensor) -> Tensor:
        return image

    def write(
        self,
        model: Any,
        pictures: list[Tensor],
        path: str,
        metadata: dict[str, Any],
        options: ExportOptions,
    ) -> dict[str, Any]:
        if options.format == "torch_export":
            return _write_backbone_and_head(model, pictures, path, metadata, options.tolerance)
        device = model.pixel_mean.device
        inputs = [sized(picture, scale).to(device) for picture in pictures for scale in SCALES]
        # One colour, where a trained detector finds nothing.
        inputs.append(model.pixel_mean.round().to(torch.uint8).expand_as(inputs[0]).contiguous())
        in_float32 = expected = [detect(model, image) for image in inputs]
        if options.half:
            halve_backbone(model)
            check_half(lambda: detect(model, inputs[0]))
            expected = [detect(model, image) for image in inputs]
        # Every part of the model runs only on an example that has detections.
        example = max(zip(inputs, expected), key=lambda pair: len(pair[1]["scores"]))[0]
        if options.format == "onnx":
            export_onnx(model, example, path, metadata)
            run = load_onnx(path)
            found = [run(image) for image in inputs]
            return parity(expected, found, inputs, options.tolerance, compare_detections)
        found, result = _write_torchscript(
            model, example, inputs, expected, path, metadata, options
        )
        if options.half:
            result["float32"] = differences(in_float32, found, compare_detections)
        return result


def _write_torchscript(model, example, inputs, expected, path, metadata, options):
    """Return what the file finds in the inputs, and how it compares."""
    device = model.pixel_mean.device
    is_scripted = options.method == "scripting"
    if not is_scripted:
        metadata["traced_on"] = device.type
    exported = script(model) if is_scripted else trace(model, example)
    exported = save_and_load(exported, path, metadata, options.freeze, device)
    with torch.no_grad():
        found = [exported(image) for image in inputs]
    result = parity(expected, found, inputs, options.tolerance, compare_detections)
    if is_scripted:  # traced, it takes one image at a time
        two = inputs[:2]
        with torch.no_grad():
            batch = exported.batch(two)
        result["batch"] = parity(
            detect_batch(model, two), batch, two, options.tolerance, compare_detections
        )
        result["passed"] = result["passed"] and result["batch"]["passed"]
    return found, result


@torch.no_grad()
def _write_backbone_and_head(model, pictures, path, metadata, tolerance) -> dict:
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
        stack(pictures, height * multiple, width * multiple)[:count].to(model.pixel_mean.device)
        for height, width, count in ((8, 8, 2), (5, 9, 1), (7, 6, 3))
    ]
    module = BackboneAndHead(model).eval()
    export_program(module, inputs[0], path, metadata, multiple)
    expected, run = [module(images) for images in inputs], load_program(path)
    return parity(expected, [run(images) for images in inputs], inputs, tolerance, compare_tensors)


def _class_names(name: str, metadata) -> list[str]:
    if "thing_classes" not in metadata.as_dict():
        DatasetCatalog.get(name)  # reading COCO's JSON sets them
    return metadata.get("thing_classes", [])
