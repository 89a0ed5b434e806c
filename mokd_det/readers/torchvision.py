# Copyright (c) The mokd_det authors.
"""What torchvision's detectors say about boxes. Their labels have the background first."""

import abc
import math
from collections.abc import Collection
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.image_list import ImageList as TorchvisionImages
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from .boxes import BoxOutputs, BoxReader, Features, Sizes, indices_of
from .dense import FCOS_SIDE, DenseReader, Grid, logits_of_centerness


class TorchvisionTwoStageReader(BoxReader):
    """Faster, Mask and Keypoint R-CNN."""

    exclusive = True

    def __init__(self, detector: Any, names: Collection[str] | None = None):
        """``detector``: with ``network``, ``labels`` and ``feature_shapes()``."""
        super().__init__()
        heads = detector.network.roi_heads
        self.labels: list[int] = detector.labels
        self.num_classes = len(self.labels)
        self.box_head, self.box_predictor = heads.box_head, heads.box_predictor
        self.box_coder, whole = heads.box_coder, heads.box_roi_pool
        shapes = detector.feature_shapes()
        # It is built for four maps; a backbone of MobileNet has two.
        known = [name for name in whole.featmap_names if name in shapes]
        self.in_features = [known[i] for i in indices_of(known, names)]
        # Its own: of some levels only, and torchvision's guesses from the maps that it sees first.
        self.pooler = MultiScaleRoIAlign(self.in_features, whole.output_size, whole.sampling_ratio)
        strides = [shapes[name].stride for name in self.in_features]
        self.pooler.scales = [1 / stride for stride in strides]
        least, most = (int(math.log2(f(shapes[n].stride for n in known))) for f in (min, max))
        assign = LevelMapper(least, most, whole.canonical_scale, whole.canonical_level)
        self.pooler.map_levels = self.assign = NearestLevel(
            assign, [int(math.log2(stride)) - least for stride in strides]
        )
        self._rpn = [detector.network.rpn]  # a list: no part of what is read here

    def at(self, state: Features, boxes: list[Tensor], image_sizes: Sizes) -> BoxOutputs:
        # In float32, as `pool_in_float32` of Detectron2's.
        maps = {name: state[name].float() for name in self.in_features}
        pooled = self.pooler(maps, boxes, image_sizes)
        logits, deltas = self.box_predictor(self.box_head(pooled))
        refined = self.box_coder.decode(deltas.float(), boxes)
        return BoxOutputs(_background_last(logits, self.labels), True, refined[:, self.labels])

    def propose(self, state: Features, images: ImageList, limit: int) -> list[Tensor]:
        found, _ = self._rpn[0](TorchvisionImages(images.tensor, images.image_sizes), state)
        return [boxes[:limit] for boxes in found]

    def elsewhere(self, boxes: list[Tensor]) -> int:
        levels = self.assign.whole(boxes)
        return int((~torch.isin(levels, levels.new_tensor(self.assign.levels))).sum())


class NearestLevel:
    """Which of some levels a box is pooled on: its own, or the nearest of them."""

    def __init__(self, whole: LevelMapper, levels: list[int]):
        """``whole``: says which of all levels is a box's own; ``levels``: those there are."""
        self.whole, self.levels = whole, levels

    def __call__(self, boxes: list[Tensor]) -> Tensor:
        """Return (R,) indices in ``levels``; the first of several that are as near."""
        own = self.whole(boxes)
        distances = (own[:, None] - own.new_tensor(self.levels)).abs()
        order = torch.arange(len(self.levels), device=own.device)
        return (distances * len(self.levels) + order).argmin(dim=1)


class TorchvisionDenseReader(DenseReader):
    """What RetinaNet, FCOS and SSD have in common."""

    def __init__(self, detector: Any, names: Collection[str] | None = None):
        """See :class:`TorchvisionTwoStageReader`."""
        super().__init__()
        network = detector.network
        self.labels: list[int] = detector.labels
        self.num_classes = len(self.labels)
        self.head, self.box_coder = network.head, network.box_coder
        self.anchor_generator = network.anchor_generator
        self.counts = self.anchor_generator.num_anchors_per_location()
        self._shapes = detector.feature_shapes()
        known = list(self._shapes)
        self.levels = indices_of(known, names)
        self.in_features = [known[i] for i in self.levels]
        self.fixed_size = network.transform.fixed_size  # (width, height)

    def anchors_of(self, maps: list[Tensor]) -> tuple[Tensor, list[Grid]]:
        height, width = self._image_size(maps)
        # Anchors depend on the size of the padded image: strides are its quotients.
        image = maps[0].new_empty(1).expand(1, 3, height, width)
        all_maps = self._all_levels(maps)
        anchors = self.anchor_generator(TorchvisionImages(image, [(height, width)]), all_maps)[0]
        parts = self._of_levels(anchors, all_maps, dim=0)
        grids = [self._grid(m, level, (height, width)) for m, level in zip(maps, self.levels)]
        return torch.cat(parts), grids

    def predict(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        all_maps = self._all_levels(maps)
        outputs = self.head(all_maps)
        parts = {
            name: torch.cat(self._of_levels(value, all_maps, dim=1), dim=1)
            for name, value in outputs.items()
        }
        return self.logits_of(parts), parts["bbox_regression"]

    @abc.abstractmethod
    def logits_of(self, outputs: dict[str, Tensor]) -> Tensor:
        """Return the logits of :class:`DenseState` from the head's outputs, (N, R, ...) each."""

    def _grid(self, map: Tensor, level: int, size: tuple[int, int]) -> Grid:
        height, width = map.shape[2:]
        stride = size[1] // width, size[0] // height
        return Grid(height, width, stride, 0.0, self.counts[level])

    def _image_size(self, maps: list[Tensor]) -> tuple[int, int]:
        stride = self._shapes[self.in_features[0]].stride
        height, width = maps[0].shape[2:]
        if self.fixed_size is not None:  # unless it sees images of another size, as a teacher
            own_width, own_height = self.fixed_size
            if (height, width) == (math.ceil(own_height / stride), math.ceil(own_width / stride)):
                return own_height, own_width
        return height * stride, width * stride

    def _all_levels(self, maps: list[Tensor]) -> list[Tensor]:
        """Heads and anchors are for all levels: those that are not read have one position."""
        given = dict(zip(self.in_features, maps))
        absent = {n: s.channels for n, s in self._shapes.items() if n not in given}
        given |= {n: maps[0].new_zeros(len(maps[0]), c, 1, 1) for n, c in absent.items()}
        return [given[name] for name in self._shapes]

    def _of_levels(self, values: Tensor, maps: list[Tensor], dim: int) -> list[Tensor]:
        sizes = [m.shape[2] * m.shape[3] * count for m, count in zip(maps, self.counts)]
        parts = values.split(sizes, dim)
        return [parts[level] for level in self.levels]


class TorchvisionRetinaNetReader(TorchvisionDenseReader):
    """RetinaNet."""

    exclusive = False

    def logits_of(self, outputs: dict[str, Tensor]) -> Tensor:
        return outputs["cls_logits"][..., self.labels]

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return self.box_coder.decode_single(deltas, anchors)


class TorchvisionFCOSReader(TorchvisionDenseReader):
    """FCOS; see :class:`mokd_det.readers.dense.FCOSReader`."""

    exclusive = False
    scale = FCOS_SIDE

    def logits_of(self, outputs: dict[str, Tensor]) -> Tensor:
        logits = outputs["cls_logits"][..., self.labels]
        return logits_of_centerness(logits, outputs["bbox_ctrness"])

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return self.box_coder.decode(deltas, anchors)


class TorchvisionSSDReader(TorchvisionDenseReader):
    """SSD and SSDlite: default boxes, and a softmax."""

    exclusive = True

    def anchors_of(self, maps: list[Tensor]) -> tuple[Tensor, list[Grid]]:
        """In an image of another size default boxes have as many pixels as in its own."""
        anchors, grids = super().anchors_of(maps)
        size = self._image_size(maps)[::-1]
        if size != tuple(self.fixed_size):
            middle, half = (anchors[:, :2] + anchors[:, 2:]) / 2, (anchors[:, 2:] - anchors[:, :2])
            half = half / 2 * half.new_tensor(self.fixed_size) / half.new_tensor(size)
            anchors = torch.cat([middle - half, middle + half], dim=1)
        return anchors, grids

    def logits_of(self, outputs: dict[str, Tensor]) -> Tensor:
        return _background_last(outputs["cls_logits"], self.labels)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return self.box_coder.decode_single(deltas, anchors)

    def _grid(self, map: Tensor, level: int, size: tuple[int, int]) -> Grid:
        height, width = map.shape[2:]
        steps = self.anchor_generator.steps
        stride = (size[1] / width, size[0] / height) if steps is None else (steps[level],) * 2
        return Grid(height, width, stride, 0.5, self.counts[level])


def _background_last(logits: Tensor, labels: list[int]) -> Tensor:
    return logits[..., [*labels, 0]]


READERS: dict[type[nn.Module], type[BoxReader]] = {
    FasterRCNN: TorchvisionTwoStageReader,
    RetinaNet: TorchvisionRetinaNetReader,
    FCOS: TorchvisionFCOSReader,
    SSD: TorchvisionSSDReader,
}


def is_torchvision(detector: Any) -> bool:
    """Whether it holds one of torchvision's detectors as ``network``."""
    return isinstance(getattr(detector, "network", None), tuple(READERS))


def feature_shapes(detector: Any) -> dict[str, ShapeSpec]:
    """Return channels and stride of the feature maps that a detector's heads may read."""
    if is_torchvision(detector):
        return detector.feature_shapes()
    return detector.backbone.output_shape()


def build_torchvision_reader(detector: Any, names: Collection[str] | None = None) -> BoxReader:
    """Return the reader of a torchvision detector, on these feature maps only (None: on all)."""
    reader = next(r for kind, r in READERS.items() if isinstance(detector.network, kind))
    return reader(detector, names)
