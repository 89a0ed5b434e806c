# Copyright (c) The mokd_det authors.
"""What Detectron2's dense detectors say about boxes: every anchor predicts."""

import abc
import copy
import dataclasses
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import nonzero_tuple
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList
from torch import Tensor, nn
from torchvision.ops import nms

from .boxes import BoxOutputs, BoxReader, Features, Sizes, indices_of

PROPOSAL_NMS = 0.7  # as Detectron2's MODEL.RPN.NMS_THRESH
# FCOS finds objects of 8 to 16 strides on a level (a side at most 8 strides from its location).
FCOS_SIDE = 12


@dataclasses.dataclass(frozen=True)
class Grid:
    """
    Where the anchors of a level are: at (offset + column) * stride, (offset + row) * stride, row by
    row, ``count`` of them at each. ``stride``: of x and y.
    """

    height: int
    width: int
    stride: tuple[float, float]
    offset: float
    count: int


@dataclasses.dataclass(frozen=True)
class DenseState:
    """
    Attributes:
        anchors: (R, 4) XYXY in pixels, level by level as the grids are.
        logits: (N, R, K), see :class:`BoxOutputs`.
        deltas: (N, R, 4).
    """

    anchors: Tensor
    grids: list[Grid]
    logits: Tensor
    deltas: Tensor


class DenseReader(BoxReader):
    """Every anchor predicts. About a box the anchor is asked that overlaps it most."""

    # Of an anchor's side when it is compared with boxes: a location has no size of its own.
    scale = 1.0
    head: nn.Module

    @property
    def heads(self) -> list[nn.Module]:
        return [self.head]

    @abc.abstractmethod
    def anchors_of(self, maps: list[Tensor]) -> tuple[Tensor, list[Grid]]:
        """Return anchors and grids of :class:`DenseState` for maps of ``in_features``."""

    @abc.abstractmethod
    def predict(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits and deltas of :class:`DenseState`."""

    @abc.abstractmethod
    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Return (R, 4) boxes."""

    def run(self, features: Features) -> DenseState:
        maps = [features[name] for name in self.in_features]
        return DenseState(*self.anchors_of(maps), *self.predict(maps))

    def at(self, state: DenseState, boxes: list[Tensor], image_sizes: Sizes) -> BoxOutputs:
        indices = [self._nearest(state.anchors, state.grids, b) for b in boxes]
        logits = torch.cat([x[i] for x, i in zip(state.logits, indices)])
        deltas = torch.cat([x[i] for x, i in zip(state.deltas, indices)])
        refined = self.decode(deltas.float(), torch.cat([state.anchors[i] for i in indices]))
        return BoxOutputs(logits, self.exclusive, refined[:, None])

    def propose(self, state: DenseState, images: ImageList, limit: int) -> list[Tensor]:
        proposals = []
        for logits, deltas, size in zip(state.logits, state.deltas, images.image_sizes):
            if self.exclusive:
                logits = F.softmax(logits.float(), dim=1)[:, :-1]
            scores = logits.float().max(dim=1).values
            # Several anchors find each object, so more of them than boxes wanted.
            scores, kept = scores.topk(min(4 * limit, len(scores)))
            boxes = Boxes(self.decode(deltas[kept].float(), state.anchors[kept]))
            boxes.clip(size)
            inside = nonzero_tuple(boxes.nonempty())[0]
            boxes, scores = boxes.tensor[inside], scores[inside]
            proposals.append(boxes[nms(boxes, scores, PROPOSAL_NMS)[:limit]])
        return proposals

    def locations(self, features: Features, boxes: list[Tensor]) -> list[Tensor]:
        anchors, grids = self.anchors_of([features[name] for name in self.in_features])
        return [anchors[self._nearest(anchors, grids, b).unique()] for b in boxes]

    def _nearest(self, anchors: Tensor, grids: list[Grid], boxes: Tensor) -> Tensor:
        """
        Index of the anchor with the largest IoU for each box, without comparing it to all: of one
        shape that is the one whose centre is nearest.
        """
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        parts, start = [], 0
        for grid in grids:
            cells = (centres / centres.new_tensor(grid.stride) - grid.offset).round().long()
            column, row = (
                cells[:, 0].clamp(0, grid.width - 1),
                cells[:, 1].clamp(0, grid.height - 1),
            )
            first = start + (row * grid.width + column) * grid.count
            parts.append(first[:, None] + torch.arange(grid.count, device=boxes.device))
            start += grid.height * grid.width * grid.count
        candidates = torch.cat(parts, dim=1)
        there = anchors[candidates]
        if self.scale != 1:
            middle = (there[..., :2] + there[..., 2:]) / 2
            half = self.scale * (there[..., 2:] - there[..., :2]) / 2
            there = torch.cat([middle - half, middle + half], dim=-1)
        best = _iou(boxes[:, None], there).argmax(dim=1)
        return candidates.gather(1, best[:, None])[:, 0]


class RetinaNetReader(DenseReader):
    """RetinaNet."""

    exclusive = False

    def __init__(self, detector: Any, names: Collection[str] | None = None):
        super().__init__()
        if type(detector.anchor_generator) is not DefaultAnchorGenerator:
            raise ValueError(
                f"The anchors of {type(detector.anchor_generator).__name__} cannot be read: "
                "expected MODEL.ANCHOR_GENERATOR.NAME 'DefaultAnchorGenerator'."
            )
        self.num_classes = detector.num_classes
        known = detector.head_in_features
        self.levels = indices_of(known, names)
        self.in_features = [known[i] for i in self.levels]
        self.head, self.head_levels = detector.head, len(known)
        self.anchor_generator = detector.anchor_generator
        if len(self.levels) < len(known):
            self.anchor_generator = _generator_of(detector.anchor_generator, self.levels)
        self.box2box_transform = detector.box2box_transform

    def anchors_of(self, maps: list[Tensor]) -> tuple[Tensor, list[Grid]]:
        generator = self.anchor_generator
        anchors = torch.cat([boxes.tensor for boxes in generator(maps)])
        rows = zip(maps, generator.strides, generator.num_anchors)
        return anchors, [
            Grid(m.shape[2], m.shape[3], (stride, stride), generator.offset, count)
            for m, stride, count in rows
        ]

    def predict(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits, deltas = self._head(maps, (self.num_classes, 4))
        return logits, deltas

    def _head(self, maps: list[Tensor], sizes: tuple[int, ...]) -> list[Tensor]:
        # The head may have a BatchNorm for each level and count calls: it is to see all of them.
        given = [maps[0].new_zeros(*maps[0].shape[:2], 1, 1)] * self.head_levels
        for level, map in zip(self.levels, maps):
            given[level] = map
        return [
            torch.cat([permute_to_N_HWA_K(outputs[i], size) for i in self.levels], dim=1)
            for outputs, size in zip(self.head(given), sizes)
        ]

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return self.box2box_transform.apply_deltas(deltas, anchors)


class FCOSReader(RetinaNetReader):
    """FCOS: locations instead of anchors, and how central each is, which is part of its score."""

    scale = FCOS_SIDE

    def predict(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits, deltas, centerness = self._head(maps, (self.num_classes, 4, 1))
        return logits_of_centerness(logits, centerness), deltas


def logits_of_centerness(logits: Tensor, centerness: Tensor) -> Tensor:
    """
    Return (..., K) logits of FCOS's scores sqrt(p c), of the probabilities p and c that (..., K)
    ``logits`` and (..., 1) ``centerness`` are logits of (Tian et al., arXiv 2006.09214, eq. 4).
    """
    logs = (F.logsigmoid(logits.float()) + F.logsigmoid(centerness.float())) / 2
    return logs - torch.log(-torch.expm1(logs.clamp_max(-1e-6)))


def _generator_of(generator: DefaultAnchorGenerator, levels: list[int]) -> DefaultAnchorGenerator:
    """A copy that makes the anchors of these levels only."""
    part = copy.deepcopy(generator)
    part.strides = [part.strides[i] for i in levels]
    part.cell_anchors = type(part.cell_anchors)([*part.cell_anchors][i] for i in levels)
    return part


def _iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of boxes (..., 4) that broadcast."""
    corner = torch.maximum(first[..., :2], second[..., :2])
    common = (torch.minimum(first[..., 2:], second[..., 2:]) - corner).clamp_min(0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(-1) for b in (first, second)]
    return common / (areas[0] + areas[1] - common).clamp_min(1e-6)
