# Copyright (c) The mokd_det authors.
"""Detectors as files."""

from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from torch import Tensor, nn

from ..config import stock_config
from ..data.coco import read_class_names
from . import detector
from .detector import detect, detect_batch
from .exporter import Exporter, ExportOptions, differences, save_and_load, stack
from .images import SCALES, sized
from .metadata import Json, class_names_of, common_metadata, data_sets_of, normalisation_of
from .onnx import check_onnx, export_onnx, load_onnx
from .parity import compare_detections, compare_tensors, parity
from .precision import check_half, halve_backbone
from .ties import StableSorting
from .torch_export import BackboneAndHead, export_program, load_program
from .torchscript import script, trace

INPUT = "one image (3, H, W), uint8 or float32 in [0, 255], channels in the order of 'format'"


class DetectorExporter(Exporter):
    """See :mod:`mokd_det.export.detector` for what a deployed detector takes and returns."""

    def check(self, model: nn.Module, options: ExportOptions) -> None:
        if self.cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise ValueError(
                f"INPUT.FORMAT is '{self.cfg.INPUT.FORMAT}': only detectors of 'RGB' or 'BGR' "
                "images are deployed. Use --format checkpoint."
            )
        detector.check_detector(model, self.cfg.MODEL.META_ARCHITECTURE)
        if options.format == "onnx":
            check_onnx(model)
        if options.method == "scripting":
            detector.check_scripting(model)
        elif options.format != "torch_export":
            detector.check_tracing(model)

    def metadata(self, model: nn.Module) -> Json:
        cfg = self.cfg
        return {
            "task": "detection",
            "class_names": class_names_of(cfg, detector.num_classes(model), class_names_of_set),
            # Detectron2's ResizeShortestEdge; short edge 0 leaves images as they are.
            "resize": {
                "short_edge": cfg.INPUT.MIN_SIZE_TEST,
                "longest_edge": cfg.INPUT.MAX_SIZE_TEST,
                "interpolation": "bilinear",
            },
            "score_threshold": detector.score_threshold(model),
            "keypoint_names": self._keypoint_names(),
            "input": INPUT,
            "outputs": {name: detector.OUTPUTS[name] for name in detector.output_names(model)},
            **common_metadata(cfg, *normalisation_of(model), stock_config(cfg)),
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

    @torch.no_grad()
    def write(
        self, model: Any, pictures: list[Tensor], path: str, metadata: Json, options: ExportOptions
    ) -> Json:
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
        run: Any
        ties: Json = {}
        if options.format == "onnx":
            export_onnx(model, example, path, metadata)
            run = load_onnx(path)
            as_it_is = expected
            with StableSorting():
                expected = [detect(model, image) for image in inputs]
            ties = differences(as_it_is, expected, compare_detections)
        else:
            if options.method == "tracing":
                metadata["traced_on"] = device.type
            exported = trace(model, example) if options.method == "tracing" else script(model)
            run = save_and_load(exported, path, metadata, options.freeze, device)
        found = [run(image) for image in inputs]
        result = parity(expected, found, inputs, options.tolerance, compare_detections)
        if options.method == "scripting":  # traced, it takes one image at a time
            two = inputs[:2]
            both = detect_batch(model, two), run.batch(two)
            result["batch"] = parity(*both, two, options.tolerance, compare_detections)
            result["passed"] = result["passed"] and result["batch"]["passed"]
        if any(value for name, value in ties.items() if name != "detections"):
            result["ties"] = ties
        if options.half:
            result["float32"] = differences(in_float32, found, compare_detections)
        return result


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


def class_names_of_set(name: str, metadata) -> list[str]:
    if "thing_classes" not in metadata.as_dict() and "json_file" in metadata.as_dict():
        return read_class_names(metadata.json_file)
    return metadata.get("thing_classes", [])
