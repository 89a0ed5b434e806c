# Copyright (c) The mokd_det authors.
"""
A deployed detector of any family: from one image, a (3, H, W) tensor in [0, 255], uint8 or float32,
in the channel order of its metadata, of any height and width, to the ``OUTPUTS`` of its R
detections, boxes clipped to the image. Normalisation is inside, resizing is not.
"""

from typing import Any, Dict, List  # noqa: UP035  (TorchScript knows these, and not dict[...] everywhere)

import torch
import torch.nn.functional as F
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.layers import CycleBatchNormList
from detectron2.modeling import GeneralizedRCNN, PanopticFPN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes
from omegaconf import ListConfig
from torch import Tensor, nn

from ..modeling import TorchvisionBackbone

OUTPUTS = {
    "boxes": "(R, 4) float32, x0 y0 x1 y1 in pixels of the image given",
    "scores": "(R,) float32 in [0, 1], descending",
    "classes": "(R,) int64, index into class_names",
    "masks": "(R, M, M) float32 probabilities over each box; paste_masks() puts them on an image",
    "keypoints": "(R, K, 3) float32, x y in pixels of the image given, score",
    "sem_seg": "(C, H, W) float32 logits",
}


def check_detector(model: nn.Module, name: str) -> None:
    """Raise ValueError unless it is a detector of a family that can be deployed."""
    if isinstance(model, DenseDetector):
        return
    if not isinstance(model, GeneralizedRCNN) or model.proposal_generator is None:
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is '{name}', a {type(model).__name__}: expected an R-CNN "
            "with a proposal generator (GeneralizedRCNN, PanopticFPN), a dense detector "
            "(RetinaNet, FCOS) or a Classifier. Use --format checkpoint for any other model."
        )
    box_dim = len(getattr(_last_predictor(model).box2box_transform, "weights", ()))
    if not isinstance(model.roi_heads, (StandardROIHeads, Res5ROIHeads)) or box_dim > 4:
        raise ValueError(
            f"MODEL.ROI_HEADS.NAME is a {type(model.roi_heads).__name__}, whose boxes are not "
            "x0, y0, x1, y1: expected StandardROIHeads, CascadeROIHeads or Res5ROIHeads. Use "
            "--format checkpoint."
        )


def check_tracing(model: nn.Module) -> None:
    """Raise ValueError for a model whose trace would hold for the size of its example only."""
    for module in model.modules():
        if isinstance(module, TorchvisionBackbone) and module._channels_last:
            raise ValueError(
                "--method tracing: the windows of this torchvision backbone (Swin) would keep the "
                "size of the image it is traced with. Use --format torchscript --method scripting."
            )


def check_scripting(model: nn.Module) -> None:
    """Raise ValueError where Detectron2's code has parts that TorchScript cannot compile."""
    heads = getattr(model, "roi_heads", None)
    reason = ""
    if isinstance(model, PanopticFPN):
        reason = "layers of PanopticFPN's semantic head hold functions"
    elif isinstance(heads, CascadeROIHeads):
        reason = "CascadeROIHeads lacks the annotations of types"
    elif isinstance(heads, Res5ROIHeads) and not heads.mask_on:
        reason = "Res5ROIHeads without masks refers to a mask head that it does not have"
    elif any(isinstance(module, CycleBatchNormList) for module in model.modules()):
        reason = "normalisation per level in its head (BN, SyncBN) indexes layers by a variable"
    elif any(isinstance(v, ListConfig) for m in model.modules() for v in vars(m).values()):
        reason = "lists of its Python config are not Python's own"
    if reason:
        raise ValueError(
            f"--method scripting: {reason}, so TorchScript cannot compile it. Use --method tracing."
        )


def output_names(model: nn.Module) -> list[str]:
    """Return the keys of a detector's output, in this module's order."""
    heads = getattr(model, "roi_heads", None)
    optional = {
        "masks": getattr(heads, "mask_on", False),
        "keypoints": getattr(heads, "keypoint_on", False),
        "sem_seg": isinstance(model, PanopticFPN),
    }
    return ["boxes", "scores", "classes", *(name for name, is_on in optional.items() if is_on)]


def num_classes(model: Any) -> int:
    """Return the number of classes of a detector's boxes."""
    return model.num_classes if isinstance(model, DenseDetector) else model.roi_heads.num_classes


def score_threshold(model: Any) -> float:
    """Return the score that the detections of a detector exceed."""
    predictor = model if isinstance(model, DenseDetector) else _last_predictor(model)
    return float(predictor.test_score_thresh)


def _last_predictor(model: Any) -> Any:
    predictor = model.roi_heads.box_predictor
    return predictor[-1] if isinstance(predictor, nn.ModuleList) else predictor


def detect(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Return what :func:`detect_batch` does for one image."""
    return detect_batch(model, [image])[0]


@torch.no_grad()
def detect_batch(model: Any, images: list[Tensor]) -> list[dict[str, Tensor]]:
    """
    Run a detector in eval mode on images, padded to one size, as Detectron2 does, without its
    resizing to another size. Input and output: see above.
    """
    inputs = [{"image": image.to(torch.float32)} for image in images]
    sem_seg = [None] * len(images)
    if isinstance(model, DenseDetector):
        results = [found["instances"] for found in model(inputs)]
    elif isinstance(model, PanopticFPN):
        results, sem_seg = model.inference(inputs, do_postprocess=False)
    else:
        results = model.inference(inputs, do_postprocess=False)
    batch = []
    for image, result, logits in zip(images, results, sem_seg):
        boxes = result.pred_boxes.tensor
        outputs = {"boxes": boxes, "scores": result.scores, "classes": result.pred_classes}
        if result.has("pred_masks"):
            outputs["masks"] = result.pred_masks[:, 0]
        if result.has("pred_keypoints"):
            outputs["keypoints"] = result.pred_keypoints
        # Detectron2's postprocessing drops boxes that clipping left empty.
        kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        outputs = {name: value[kept] for name, value in outputs.items()}
        if logits is not None:
            # As Detectron2's sem_seg_postprocess at the image's own size: padding goes.
            outputs["sem_seg"] = logits[:, : image.shape[1], : image.shape[2]]
        batch.append(outputs)
    return batch


class TraceableDetector(nn.Module):
    """
    :func:`detect` as a module that torch.jit.trace and ONNX's exporter take. ``as_tuple``: it
    returns the values alone, in the order of :func:`output_names`.
    """

    def __init__(self, model: nn.Module, as_tuple: bool = False):
        super().__init__()
        self.model, self.as_tuple = model, as_tuple

    def forward(self, image: Tensor) -> Any:
        # Lengths that depend on the image must stay tensors while tracing.
        with patch_builtin_len():
            outputs = detect(self.model, image)
        return tuple(outputs.values()) if self.as_tuple else outputs


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """
    Sample (R, M, M) probabilities over (R, 4) XYXY boxes at the centres of an image's pixels.
    Return (R, height, width) bool: at least 0.5.
    """
    pasted = torch.zeros([masks.size(0), height, width], dtype=torch.bool, device=masks.device)
    rows = torch.arange(height, device=masks.device, dtype=torch.float32) + 0.5
    columns = torch.arange(width, device=masks.device, dtype=torch.float32) + 0.5
    # One by one: grids for all masks at once are gigabytes for a large image.
    for i in range(masks.size(0)):
        x0, y0, x1, y1 = boxes[i].unbind(0)
        y = (rows - y0) / (y1 - y0) * 2 - 1
        x = (columns - x0) / (x1 - x0) * 2 - 1
        grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=2)
        probability = F.grid_sample(masks[i][None, None].float(), grid[None], align_corners=False)
        pasted[i] = probability[0, 0] >= 0.5
    return pasted


class _DeployedDetector(nn.Module):
    """What both kinds of files have: masks can be pasted."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model

    @torch.jit.export
    def paste_masks(self, masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
        """See :func:`paste_masks`."""
        return paste_masks(masks, boxes, height, width)


class TracedDetector(_DeployedDetector):
    """What a traced :class:`TraceableDetector` is saved as: it takes any type."""

    def forward(self, image: Tensor) -> Dict[str, Tensor]:  # noqa: UP006
        return self.model(image.to(torch.float32))


class ScriptableDetector(_DeployedDetector):
    """What ``scripting_with_instances`` takes, and is saved. It also takes a batch."""

    has_masks: torch.jit.Final[bool]
    has_keypoints: torch.jit.Final[bool]
    is_dense: torch.jit.Final[bool]

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.has_masks = "masks" in output_names(model)
        self.has_keypoints = "keypoints" in output_names(model)
        self.is_dense = isinstance(model, DenseDetector)

    def forward(self, image: Tensor) -> Dict[str, Tensor]:  # noqa: UP006
        return self.batch([image])[0]

    @torch.jit.export
    def batch(self, images: List[Tensor]) -> List[Dict[str, Tensor]]:  # noqa: UP006
        """Images of any sizes, padded to one, in one pass."""
        inputs = [{"image": image.to(torch.float32)} for image in images]
        if self.is_dense:
            results = self.model(inputs)
        else:
            results = self.model.inference(inputs, do_postprocess=False)
        found: List[Dict[str, Tensor]] = []  # noqa: UP006
        for image, result in zip(images, results):
            boxes = result.pred_boxes.tensor
            if self.is_dense:  # clipped by Detectron2's postprocessing, which is not scriptable
                x, y = boxes[:, 0::2], boxes[:, 1::2]
                x, y = x.clamp(0, image.size(2)), y.clamp(0, image.size(1))
                boxes = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)
            kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            scores, classes = result.scores[kept], result.pred_classes[kept]
            outputs = {"boxes": boxes[kept], "scores": scores, "classes": classes}
            if self.has_masks:
                outputs["masks"] = result.pred_masks[kept][:, 0]
            if self.has_keypoints:
                outputs["keypoints"] = result.pred_keypoints[kept]
            found.append(outputs)
        return found


def instances_fields(model: nn.Module) -> dict[str, type]:
    """Return the fields of Instances that a detector uses, as ``scripting_with_instances`` asks."""
    fields = {"pred_boxes": Boxes, "scores": Tensor, "pred_classes": Tensor}
    if not isinstance(model, DenseDetector):
        fields.update({"proposal_boxes": Boxes, "objectness_logits": Tensor})
    if "masks" in output_names(model):
        fields["pred_masks"] = Tensor
    if "keypoints" in output_names(model):
        fields.update({"pred_keypoints": Tensor, "pred_keypoint_heatmaps": Tensor})
    return fields
