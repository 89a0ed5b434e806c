# Copyright (c) The mokd_det authors.
"""torchvision's detectors as files, which resize and normalise images themselves."""

import copy
import math
from typing import Any, Dict, List, Optional, Tuple  # noqa: UP035  (TorchScript knows these)

import numpy as np
import torch
import torch.nn.functional as F
import torch.onnx.operators
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..config import stock_config
from .detector import OUTPUTS
from .detector_exporter import INPUT, DetectorExporter, class_names_of_set
from .exporter import ExportOptions, differences, save_and_load
from .images import SCALES, sized
from .metadata import Json, class_names_of, common_metadata
from .onnx import check_onnx, export_onnx, load_onnx
from .parity import compare_detections, parity
from .ties import StableSorting
from .torchscript import script_network

NODE = "MODEL.TORCHVISION_DETECTOR"


class DeployedTransform(GeneralizedRCNNTransform):
    """
    torchvision's, which in TorchScript and ONNX computes the new size in float32 (some images are
    then a pixel smaller than in Python): here it is float64 as in Python.
    """

    def __init__(self, stock: GeneralizedRCNNTransform):
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in vars(stock).items() if k[0] != "_"})
        self._skip_resize = False

    def resize(
        self,
        image: Tensor,
        target: Optional[Dict[str, Tensor]] = None,  # noqa: UP006, UP045
    ) -> Tuple[Tensor, Optional[Dict[str, Tensor]]]:  # noqa: UP006, UP045
        """Return the image at the size of evaluation; see torchvision's."""
        return F.interpolate(image[None], self.size_of(image), mode="bilinear")[0], target

    def size_of(self, image: Tensor) -> List[int]:  # noqa: UP006
        if self.fixed_size is not None:
            return [self.fixed_size[1], self.fixed_size[0]]
        if torchvision._is_tracing():
            return self.traced_size_of(image)
        height, width = image.shape[1], image.shape[2]
        short, long = float(min(height, width)), float(max(height, width))
        scale = min(float(self.min_size[-1]) / short, float(self.max_size) / long)
        return [math.floor(float(height) * scale), math.floor(float(width) * scale)]

    @torch.jit.unused
    def traced_size_of(self, image: Tensor) -> List[int]:  # noqa: UP006
        shape = torch.onnx.operators.shape_as_tensor(image)[-2:].to(torch.float64)
        # As tensors: torch computes a number divided by a tensor as a product, which rounds.
        sides = torch.tensor([self.min_size[-1], self.max_size], dtype=torch.float64)
        scale = (sides / torch.stack([shape.min(), shape.max()])).min()
        return (shape * scale).floor().to(torch.int64).unbind()  # type: ignore[return-value]


class DeployedTorchvisionDetector(nn.Module):
    """
    From one image, (3, H, W) in [0, 255], to the outputs that Detectron2's exported detectors have;
    masks are (R, H, W), pasted onto the image.
    """

    is_bgr: torch.jit.Final[bool]
    keypoint_shift: torch.jit.Final[float]
    classes: Tensor

    def __init__(self, model: Any):
        super().__init__()
        self.network = copy.deepcopy(model.network)
        self.network.transform = DeployedTransform(self.network.transform)
        self.keypoint_shift = model.keypoint_shift
        self.is_bgr = model.input_format == "BGR"
        self.register_buffer("classes", model.classes)  # from label to class, or -1

    def forward(self, image: Tensor) -> Dict[str, Tensor]:  # noqa: UP006
        image = image.to(torch.float32) / 255
        if self.is_bgr:
            image = image.flip(0)
        if torch.jit.is_scripting():
            return self.outputs(self.network([image])[1][0])
        return self.outputs(self.network([image])[0])

    @torch.jit.export
    def paste_masks(self, masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
        """(R, height, width) bool, as the files of Detectron2's detectors; here they are pasted."""
        return masks >= 0.5

    def outputs(self, found: Dict[str, Tensor]) -> Dict[str, Tensor]:  # noqa: UP006
        classes = self.classes[found["labels"]]
        known = classes >= 0
        outputs = {"boxes": found["boxes"][known], "scores": found["scores"][known]}
        outputs["classes"] = classes[known]
        if "masks" in found:
            outputs["masks"] = found["masks"][known][:, 0]
        if "keypoints" in found:
            points, scores = found["keypoints"][known], found["keypoints_scores"][known]
            points = points[:, :, :2] + self.keypoint_shift
            outputs["keypoints"] = torch.cat([points, scores[:, :, None]], dim=2)
        return outputs


class _AsTuple(nn.Module):
    def __init__(self, deployed):
        super().__init__()
        self.deployed = deployed

    def forward(self, image):
        return tuple(self.deployed(image).values())


class TorchvisionDetectorExporter(DetectorExporter):
    """Files take the same image, and return the same, as those of Detectron2's detectors."""

    default_method = "scripting"

    def check(self, model: Any, options: ExportOptions) -> None:
        for is_on, option in ((options.half, "--half"), (options.freeze, "--freeze")):
            if is_on:
                raise ValueError(f"{option} is not for torchvision's detectors: leave it out.")
        if options.format == "torch_export":
            raise ValueError(
                "--format torch_export is not for torchvision's detectors, which compute with the "
                "number of boxes: use --format torchscript or onnx."
            )
        if options.format == "torchscript" and options.method != "scripting":
            raise ValueError(
                "--method tracing is not for torchvision's detectors, which are made for "
                "scripting: leave it out."
            )
        if options.format == "onnx":
            check_onnx(model.network)

    def metadata(self, model: Any) -> Json:
        cfg, transform = self.cfg, model.network.transform
        names = output_names(model)
        outputs = {name: OUTPUTS[name] for name in names}
        if "masks" in names:
            outputs["masks"] = "(R, H, W) float32 probabilities at each pixel of the image given"
        heads = getattr(model.network, "roi_heads", model.network)
        mean, std = ([255 * x for x in y] for y in (transform.image_mean, transform.image_std))
        return {
            "task": "detection",
            "class_names": class_names_of(cfg, model.num_classes, class_names_of_set),
            # The file resizes images itself: short edge 0 leaves them as they are.
            "resize": {
                "short_edge": 0,
                "longest_edge": cfg.INPUT.MAX_SIZE_TEST,
                "interpolation": "bilinear",
            },
            "score_threshold": float(heads.score_thresh),
            "keypoint_names": self._keypoint_names(),
            "input": INPUT,
            "outputs": outputs,
            **common_metadata(cfg, mean, std, stock_config(cfg, [NODE])),
        }

    def to_tensor(self, image: np.ndarray) -> Tensor:
        if self.cfg.INPUT.FORMAT == "BGR":
            image = image[:, :, ::-1]
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))

    @torch.no_grad()
    def write(
        self, model: Any, pictures: list[Tensor], path: str, metadata: Json, options: ExportOptions
    ) -> Json:
        deployed = DeployedTorchvisionDetector(model).eval()
        inputs = [sized(p, scale).to(model.device) for p in pictures for scale in SCALES]
        inputs.append(torch.full_like(inputs[0], 114))  # one colour
        expected = [self._detect(model, image) for image in inputs]
        run: Any
        if options.format == "torchscript":
            exported = script_network(deployed)
            run = save_and_load(exported, path, metadata, False, model.device)
            found = [run(image) for image in inputs]
            return parity(expected, found, inputs, options.tolerance, compare_detections)
        example = max(zip(inputs, expected), key=lambda pair: len(pair[1]["scores"]))[0]
        export_onnx(_AsTuple(deployed).eval(), example, path, metadata, output_names(model))
        run, as_it_is = load_onnx(path), expected
        with StableSorting():
            expected = [self._detect(model, image) for image in inputs]
        found = [run(image) for image in inputs]
        result = parity(expected, found, inputs, options.tolerance, compare_detections)
        ties = differences(as_it_is, expected, compare_detections)
        if any(value for name, value in ties.items() if name != "detections"):
            result["ties"] = ties
        return result

    def _detect(self, model: Any, image: Tensor) -> dict[str, Tensor]:
        """What the model itself says, in the form of its files."""
        (found,) = model(self.eager_input(image))
        found = found["instances"].get_fields()
        names = {"boxes": "pred_boxes", "classes": "pred_classes", "keypoints": "pred_keypoints"}
        outputs = {n: found[names.get(n, n)] for n in output_names(model) if n != "masks"}
        return {**outputs, "boxes": outputs["boxes"].tensor}


def output_names(model: Any) -> list[str]:
    """Return the keys of a detector's output, in this module's order."""
    heads = getattr(model.network, "roi_heads", None)
    optional = {
        "masks": heads is not None and heads.has_mask(),
        "keypoints": heads is not None and heads.has_keypoint(),
    }
    return ["boxes", "scores", "classes", *(name for name, is_on in optional.items() if is_on)]
