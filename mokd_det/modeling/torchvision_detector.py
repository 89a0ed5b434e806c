# Copyright (c) The mokd_det authors.
"""The meta-architecture of torchvision's detectors, for Detectron2's data and evaluation."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, Keypoints, PolygonMasks
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG

from .state import PlainState, eval_mode
from .torchvision_networks import build_torchvision_detector, labels_of

# Sides of the image that strides are found with; a multiple of every stride of a pyramid.
PROBE = 256
LARGEST_STRIDE = 32  # of backbones without their further levels, as torchvision pads for them


@META_ARCH_REGISTRY.register()
class TorchvisionDetector(PlainState):
    """
    A detector of ``torchvision.models.detection`` that takes and returns what Detectron2's do. Its
    state is that of ``network``, the plain torchvision module, which also resizes and normalises
    the images: so it is trained, evaluated and deployed as torchvision's own code does it.

    Attributes:
        labels: of each class the label that torchvision gives it; the background has 0.
        random: names of parameters that its weights have no values for.
    """

    # Keypoints are indices of pixels in torchvision as in COCO's files, and places in Detectron2.
    keypoint_shift = 0.5
    classes: Tensor

    @configurable
    def __init__(
        self,
        *,
        network: nn.Module,
        labels: list[int],
        input_format: str = "RGB",
        random: Sequence[str] = (),
    ):
        """``input_format``: of the images given, "RGB" or "BGR"; torchvision takes RGB."""
        super().__init__()
        if input_format not in ("RGB", "BGR"):
            raise ValueError(
                f"INPUT.FORMAT is '{input_format}': torchvision's detectors take 'RGB' (or 'BGR', "
                "which is converted)."
            )
        self.network: Any = network
        self.random = list(random)
        self.labels, self.num_classes, self.input_format = labels, len(labels), input_format
        classes = torch.full((max(labels) + 1,), -1)
        classes[labels] = torch.arange(len(labels))
        self.register_buffer("classes", classes, persistent=False)  # from label to class, or -1
        self._shapes: dict[str, ShapeSpec] | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        network, random = build_torchvision_detector(cfg)
        return {
            "network": network,
            "random": random,
            "labels": labels_of(cfg),
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        return self.classes.device

    @property
    def backbone(self) -> nn.Module:
        """What makes the features that the heads read: dict[str, Tensor]."""
        return self.network.backbone

    def feature_shapes(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of each of the backbone's feature maps."""
        if self._shapes is None:
            width, height = self.network.transform.fixed_size or (PROBE, PROBE)
            with eval_mode(self.backbone), torch.no_grad():
                maps = self.backbone(torch.zeros(1, 3, height, width, device=self.device))
            self._shapes = {
                name: ShapeSpec(channels=m.shape[1], stride=round(height / m.shape[2]))
                for name, m in maps.items()
            }
        return self._shapes

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Return images (N, 3, H, W), normalised and padded, at the size that they are given in."""
        transform = self.network.transform
        images = [transform.normalize(image) for image in self._images(batched_inputs)]
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        divisible = transform.size_divisible
        if transform.fixed_size and set(sizes) != {transform.fixed_size[::-1]}:
            divisible = LARGEST_STRIDE  # another size than SSD's own: its maps tell which
            self._check_size(sizes)
        return ImageList(transform.batch_images(images, divisible), sizes)

    def _check_size(self, sizes: list[tuple[int, int]]) -> None:
        least = min(self.network.transform.fixed_size)
        small = [size for size in sizes if min(size) < least]
        if small and isinstance(self.backbone, SSDFeatureExtractorVGG):  # not padded at its end
            raise ValueError(
                f"A teacher with SSD's VGG takes images of at least {least} pixels a side, but got "
                f"{small[0][0]} x {small[0][1]}: raise INPUT.MIN_SIZE_TRAIN of the student (or "
                "min_size in MODEL.TORCHVISION_DETECTOR.OPTIONS)."
            )

    @torch.no_grad()
    def prepare(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Return a batch for training, images and annotations in the size to which the network would
        resize them: a teacher that is given it sees what the student does.
        """
        prepared = []
        for x, image in zip(batched_inputs, self._images(batched_inputs)):
            target = self._target(x["instances"])
            image, target = self.network.transform.resize(image, target)
            instances = Instances((image.shape[1], image.shape[2]))
            instances.gt_boxes = Boxes(target["boxes"])
            instances.gt_classes = x["instances"].gt_classes.to(self.device)
            if "masks" in target:
                instances.gt_masks = BitMasks(target["masks"].bool())
            if "keypoints" in target:
                instances.gt_keypoints = Keypoints(moved(target["keypoints"], self.keypoint_shift))
            image = 255 * (image.flip(0) if self.input_format == "BGR" else image)
            prepared.append({**x, "image": image, "instances": instances, "is_resized": True})
        return prepared

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: of Detectron2's loader; in training from it or from :meth:`prepare`.

        Returns:
            in training dict[str, Tensor], torchvision's losses by names that begin with "loss_".
            Else a list of dicts whose ``instances`` have boxes in pixels of the image given, or of
            one of ``height`` and ``width`` in its dict.
        """
        images = self._images(batched_inputs)
        if self.training:
            targets = [self._target(x["instances"]) for x in batched_inputs]
            with self._resizing(not batched_inputs[0].get("is_resized", False)):
                losses = self.network(images, targets)
            return {f"loss_{name.removeprefix('loss_')}": x for name, x in losses.items()}
        found = self.network(images)
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        instances = [self._instances(x, size) for x, size in zip(found, sizes)]
        wanted = [
            (x.get("height", size[0]), x.get("width", size[1]))
            for x, size in zip(batched_inputs, sizes)
        ]
        return [{"instances": resized(x, size)} for x, size in zip(instances, wanted)]

    def _images(self, batched_inputs: list[dict[str, Any]]) -> list[Tensor]:
        """(3, H, W) RGB in [0, 1], as torchvision takes them."""
        images = [x["image"].to(self.device).float() / 255 for x in batched_inputs]
        return [x.flip(0) for x in images] if self.input_format == "BGR" else images

    def _target(self, instances: Instances) -> dict[str, Tensor]:
        instances, size = instances.to(self.device), instances.image_size
        labels = torch.tensor(self.labels, device=self.device)
        target = {
            "boxes": instances.gt_boxes.tensor.float(),
            "labels": labels[instances.gt_classes],
        }
        heads = getattr(self.network, "roi_heads", None)
        # Detectron2's loader gives images without objects neither masks nor keypoints.
        if heads is not None and heads.has_mask():
            masks = instances.gt_masks if len(instances) else BitMasks(torch.zeros(0, *size))
            if isinstance(masks, PolygonMasks):
                masks = BitMasks.from_polygon_masks(masks, *size)
            target["masks"] = masks.tensor.to(self.device, torch.uint8)
        if heads is not None and heads.has_keypoint():
            count = heads.keypoint_predictor.kps_score_lowres.out_channels
            empty = target["boxes"].new_zeros(0, count, 3)
            target["keypoints"] = (
                moved(instances.gt_keypoints.tensor, -self.keypoint_shift)
                if len(instances)
                else empty
            )
        return target

    def _instances(self, found: dict[str, Tensor], size: tuple[int, int]) -> Instances:
        classes = self.classes[found["labels"]]
        known = classes >= 0  # COCO's weights also have labels without a class
        instances = Instances(size)
        instances.pred_boxes = Boxes(found["boxes"][known])
        instances.scores = found["scores"][known]
        instances.pred_classes = classes[known]
        if "masks" in found:
            instances.pred_masks = found["masks"][known][:, 0] >= 0.5
        if "keypoints" in found:
            points, scores = found["keypoints"][known], found["keypoints_scores"][known]
            points = torch.cat([points[..., :2], scores[..., None]], dim=2)
            instances.pred_keypoints = moved(points, self.keypoint_shift)
        return instances

    @contextlib.contextmanager
    def _resizing(self, is_on: bool) -> Iterator[None]:
        transform = self.network.transform
        before, transform._skip_resize = transform._skip_resize, not is_on
        try:
            yield
        finally:
            transform._skip_resize = before


def moved(points: Tensor, shift: float) -> Tensor:
    """Return keypoints (..., 3) whose x and y are ``shift`` pixels further."""
    return torch.cat([points[..., :2] + shift, points[..., 2:]], dim=-1)


def resized(instances: Instances, size: tuple[int, int]) -> Instances:
    """Return detections in an image as those in the same image of ``size`` (height, width)."""
    if instances.image_size == size:
        return instances
    y, x = (new / old for new, old in zip(size, instances.image_size))
    found = Instances(size, **instances.get_fields())
    found.pred_boxes = instances.pred_boxes.clone()
    found.pred_boxes.scale(x, y)
    if instances.has("pred_masks"):
        found.pred_masks = F.interpolate(instances.pred_masks[:, None].float(), size)[:, 0] > 0
    if instances.has("pred_keypoints"):
        points = instances.pred_keypoints
        found.pred_keypoints = points * points.new_tensor([x, y, 1])
    return found
