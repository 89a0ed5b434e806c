# Copyright (c) The mokd_det authors.
"""
What a detector says about given boxes: one form for the outputs of every family.

Student and teacher may belong to different families, so outputs are compared at boxes, not at
positions of a head. A two-stage detector is asked about a box as if it were a proposal. A dense
one answers with its anchor that overlaps the box most; about one of its own anchors that is the
anchor itself. No detector is changed: readers call the stock modules of its heads.
"""

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
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.poolers import convert_boxes_to_pooler_format
from detectron2.modeling.roi_heads.rotated_fast_rcnn import RROIHeads
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, ImageList
from torch import Tensor, nn
from torchvision.ops import nms

Features = dict[str, Tensor]
Sizes = list[tuple[int, int]]

PROPOSAL_NMS = 0.7  # as Detectron2's MODEL.RPN.NMS_THRESH


@dataclasses.dataclass(frozen=True)
class BoxOutputs:
    """
    Predictions at R boxes of a batch, image by image.

    Attributes:
        logits: (R, C + 1) with the background last if ``exclusive``, else (R, C).
        exclusive: the logits are a softmax's; else each class has a sigmoid of its own.
        boxes: (R, C, 4), or (R, 1, 4) if all classes share one; refined boxes, XYXY in
            pixels of the image that the detector was given.
    """

    logits: Tensor
    exclusive: bool
    boxes: Tensor

    def log_probabilities(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return (R, C) log p and log (1 - p) of every class but the background."""
        logits = self.logits.float() / temperature
        if not self.exclusive:
            return F.logsigmoid(logits), F.logsigmoid(-logits)
        logs = F.log_softmax(logits, dim=1)
        # 1 - p of the most probable class is summed over the others: near p = 1 the difference
        # would be rounded to zero.
        top = logs.argmax(dim=1, keepdim=True)
        rest = logs.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True)
        p = logs.exp().scatter(1, top, 0.0)
        return logs[:, :-1], torch.log1p(-p).scatter(1, top, rest)[:, :-1]

    def confidence(self) -> tuple[Tensor, Tensor]:
        """Return (R,) the probability of the most probable class, and (R,) which one it is."""
        values, classes = self.log_probabilities()[0].exp().max(dim=1)
        return values, classes

    def boxes_of(self, classes: Tensor) -> Tensor:
        """Return (R, 4) the boxes refined for the given (R,) classes."""
        if self.boxes.shape[1] == 1:
            return self.boxes[:, 0]
        return self.boxes[torch.arange(len(classes), device=classes.device), classes]


class BoxReader(nn.Module, metaclass=abc.ABCMeta):
    """
    Reads one detector's outputs, on some or all of the feature maps ``in_features`` that its heads
    look at. Its parameters are those of the heads that are read.
    """

    num_classes: int
    in_features: list[str]
    exclusive: bool  # see BoxOutputs

    def forward(self, features: Features, boxes: list[Tensor], image_sizes: Sizes) -> BoxOutputs:
        """
        Return outputs at boxes, for each image (R_i, 4) XYXY in pixels; ``image_sizes`` are
        (height, width) before padding.
        """
        return self.at(self.run(features), boxes, image_sizes)

    def run(self, features: Features) -> Any:
        """Return what :meth:`at` and :meth:`propose` need of the feature maps."""
        return features

    @abc.abstractmethod
    def at(self, state: Any, boxes: list[Tensor], image_sizes: Sizes) -> BoxOutputs:
        """Return the :class:`BoxOutputs` at ``boxes``, given what :meth:`run` returned."""

    @abc.abstractmethod
    def propose(self, state: Any, images: ImageList, limit: int) -> list[Tensor]:
        """Return, for each image, at most ``limit`` (P_i, 4) boxes likely to hold an object."""

    def locations(self, features: Features, boxes: list[Tensor]) -> list[Tensor]:
        """Return, for each image, the boxes where this detector predicts nearest to ``boxes``."""
        return boxes

    def elsewhere(self, boxes: list[Tensor]) -> int:
        """Return how many boxes the whole detector would read on maps that this reader has not."""
        return 0


class TwoStageReader(BoxReader):
    """Faster, Mask, Keypoint and Cascade R-CNN, panoptic FPN, and those with Res5ROIHeads (C4)."""

    def __init__(self, detector: Any, names: Collection[str] | None = None):
        super().__init__()
        heads = detector.roi_heads
        self.num_classes = heads.num_classes
        # Its head leaves that to its caller.
        self.mean_over_positions = isinstance(heads, Res5ROIHeads)
        if self.mean_over_positions:
            self.in_features, self.pooler = heads.in_features, heads.pooler
            stages = [(heads.res5, heads.box_predictor)]
        else:
            self.in_features, self.pooler = heads.box_in_features, heads.box_pooler
            stages = [(heads.box_head, heads.box_predictor)]
            if isinstance(heads, CascadeROIHeads):
                stages = list(zip(heads.box_head, heads.box_predictor))
        levels = _indices(self.in_features, names)
        if len(levels) < len(self.in_features):
            self.in_features = [self.in_features[i] for i in levels]
            self.pooler = NearestLevelPooler(self.pooler, levels)
        self.box_heads = nn.ModuleList(head for head, _ in stages)
        self.box_predictors: Any = nn.ModuleList(predictor for _, predictor in stages)
        self.exclusive = not getattr(self.box_predictors[0], "use_sigmoid_ce", False)
        # A list, so that the first stage is no part of what is read (or trained) here.
        self._proposal_generator = [detector.proposal_generator]

    def at(self, state: Any, boxes: list[Tensor], image_sizes: Sizes) -> BoxOutputs:
        maps = [state[name] for name in self.in_features]
        counts = [len(b) for b in boxes]
        logits: list[Tensor] = []
        refined: Any = None
        for box_head, predictor in zip(self.box_heads, self.box_predictors):
            if logits:  # as at inference, a cascade's next stage looks at the refined boxes
                clipped = [Boxes(b.detach()) for b in refined[:, 0].split(counts)]
                for b, size in zip(clipped, image_sizes):
                    b.clip(size)
                boxes = [b.tensor for b in clipped]
            pooled = box_head(self.pooler(maps, [Boxes(b) for b in boxes]))
            if self.mean_over_positions:
                pooled = pooled.mean(dim=[2, 3])
            scores, deltas = predictor(pooled)
            # Boxes stay float32 whatever the deltas are: float16 has steps of a pixel from 1024 on.
            refined = predictor.box2box_transform.apply_deltas(deltas.float(), torch.cat(boxes))
            refined = refined.view(len(scores), refined.shape[1] // 4, 4)
            logits.append(scores)
        if not self.exclusive:
            if len(logits) > 1:
                mean: Any = sum(x.float().sigmoid() for x in logits) / len(logits)
                logits = [torch.logit(mean, eps=1e-7)]
            return BoxOutputs(logits[0][:, : self.num_classes], False, refined)
        if len(logits) > 1:  # probabilities are averaged over the stages
            mean = sum(F.softmax(x.float(), dim=1) for x in logits) / len(logits)
            logits = [mean.clamp_min(1e-12).log()]
        return BoxOutputs(logits[0], True, refined)

    def propose(self, state: Any, images: ImageList, limit: int) -> list[Tensor]:
        found, _ = self._proposal_generator[0](images, state, None)
        return [x.proposal_boxes.tensor[:limit] for x in found]

    def elsewhere(self, boxes: list[Tensor]) -> int:
        if not isinstance(self.pooler, NearestLevelPooler):
            return 0
        assigned = self.pooler.levels_of([Boxes(b) for b in boxes])
        return int((~torch.isin(assigned, assigned.new_tensor(self.pooler.levels))).sum())


class NearestLevelPooler(nn.Module):
    """An ROIPooler with some of its levels: boxes of another are pooled on the nearest of them."""

    def __init__(self, pooler: ROIPooler, levels: list[int]):
        """``levels``: indices, those that the maps given to :meth:`forward` are of."""
        super().__init__()
        self.pooler, self.levels = pooler, levels

    def levels_of(self, boxes: list[Boxes]) -> Tensor:
        """Return (R,) the level, among all of the pooler's, that it would choose for each box."""
        p = self.pooler
        return assign_boxes_to_levels(
            boxes, p.min_level, p.max_level, p.canonical_box_size, p.canonical_level
        )

    def forward(self, maps: list[Tensor], boxes: list[Boxes]) -> Tensor:
        """Return (R, C, S, S) as the pooler does."""
        rois, levels = convert_boxes_to_pooler_format(boxes), self.levels_of(boxes)
        distances = (levels[:, None] - levels.new_tensor(self.levels)).abs()
        nearest = distances.argmin(dim=1)
        shape = (len(rois), maps[0].shape[1], *self.pooler.output_size)
        pooled = torch.zeros(shape, dtype=torch.float32, device=rois.device)
        # In float32, as `pool_in_float32` of the whole pooler.
        for index, (level, map) in enumerate(zip(self.levels, maps)):
            rows = nonzero_tuple(nearest == index)[0]
            pooled.index_put_((rows,), self.pooler.level_poolers[level](map.float(), rois[rows]))
        return pooled


def _indices(known: list[str], names: Collection[str] | None) -> list[int]:
    return [i for i, name in enumerate(known) if names is None or name in names]


class RetinaNetReader(BoxReader):
    """RetinaNet: every anchor predicts."""

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
        self.levels = _indices(known, names)
        self.in_features = [known[i] for i in self.levels]
        self.head, self.head_levels = detector.head, len(known)
        self.anchor_generator = detector.anchor_generator
        if len(self.levels) < len(known):
            self.anchor_generator = _generator_of(detector.anchor_generator, self.levels)
        self.box2box_transform = detector.box2box_transform

    def run(self, features: Features) -> Any:
        maps = [features[name] for name in self.in_features]
        # The head may have a BatchNorm for each level and count calls: it is to see all of them.
        given = [maps[0].new_zeros(*maps[0].shape[:2], 1, 1)] * self.head_levels
        for level, map in zip(self.levels, maps):
            given[level] = map
        logits, deltas = (
            torch.cat([permute_to_N_HWA_K(outputs[i], size) for i in self.levels], dim=1)
            for outputs, size in zip(self.head(given), (self.num_classes, 4))
        )
        return self._anchors(maps), logits, deltas

    def at(self, state: Any, boxes: list[Tensor], image_sizes: Sizes) -> BoxOutputs:
        (anchors, grids), logits, deltas = state
        indices = [self._nearest(anchors, grids, b) for b in boxes]
        logits = torch.cat([x[i] for x, i in zip(logits, indices)])
        deltas = torch.cat([x[i] for x, i in zip(deltas, indices)])
        given = torch.cat([anchors[i] for i in indices])
        refined = self.box2box_transform.apply_deltas(deltas.float(), given)
        return BoxOutputs(logits, False, refined[:, None])

    def propose(self, state: Any, images: ImageList, limit: int) -> list[Tensor]:
        (anchors, _), logits, deltas = state
        proposals = []
        for scores, image_deltas, size in zip(logits, deltas, images.image_sizes):
            scores = scores.float().max(dim=1).values
            # Several anchors find each object, so more of them than boxes wanted.
            scores, kept = scores.topk(min(4 * limit, len(scores)))
            image_deltas = image_deltas[kept].float()
            boxes = Boxes(self.box2box_transform.apply_deltas(image_deltas, anchors[kept]))
            boxes.clip(size)
            inside = nonzero_tuple(boxes.nonempty())[0]
            boxes, scores = boxes.tensor[inside], scores[inside]
            proposals.append(boxes[nms(boxes, scores, PROPOSAL_NMS)[:limit]])
        return proposals

    def locations(self, features: Features, boxes: list[Tensor]) -> list[Tensor]:
        anchors, grids = self._anchors([features[name] for name in self.in_features])
        return [anchors[self._nearest(anchors, grids, b).unique()] for b in boxes]

    def _anchors(self, maps: list[Tensor]) -> tuple[Tensor, list[torch.Size]]:
        anchors = torch.cat([boxes.tensor for boxes in self.anchor_generator(maps)])
        return anchors, [m.shape[-2:] for m in maps]

    def _nearest(self, anchors: Tensor, grids: list[torch.Size], boxes: Tensor) -> Tensor:
        """
        Index of the anchor with the largest IoU for each box, without comparing it to all: of one
        shape that is the one whose centre is nearest.
        """
        generator = self.anchor_generator
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        parts, start = [], 0
        for (height, width), stride, count in zip(grids, generator.strides, generator.num_anchors):
            cells = (centres / stride - generator.offset).round().long()
            column, row = cells[:, 0].clamp(0, width - 1), cells[:, 1].clamp(0, height - 1)
            first = start + (row * width + column) * count
            parts.append(first[:, None] + torch.arange(count, device=boxes.device))
            start += height * width * count
        candidates = torch.cat(parts, dim=1)
        best = _iou(boxes[:, None], anchors[candidates]).argmax(dim=1)
        return candidates.gather(1, best[:, None])[:, 0]


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


def build_box_reader(
    detector: nn.Module, who: str, names: Collection[str] | None = None
) -> BoxReader:
    """
    Return the reader of the detector that is the "student" or "teacher", on the feature maps with
    these names only (None: on all that its heads look at); ValueError if it cannot be read.
    """
    heads = getattr(detector, "roi_heads", None)
    rotated = isinstance(heads, RROIHeads)
    if isinstance(heads, (StandardROIHeads, Res5ROIHeads)) and not rotated:
        if getattr(detector, "proposal_generator", None) is None and who == "teacher":
            raise ValueError(
                "The teacher has no proposal generator "
                "(MODEL.PROPOSAL_GENERATOR.NAME is 'PrecomputedProposals'), and its boxes are "
                "what outputs are compared at."
            )
        return TwoStageReader(detector, names)
    if isinstance(detector, RetinaNet):
        return RetinaNetReader(detector, names)
    asked = "'outputs' in MOKD.OBJECTIVES"
    instead = "Its features can be distilled: MOKD.OBJECTIVES ['teacher_head'] or ['features']."
    if who == "teacher":
        asked += ", 'teacher_head' there, or MOKD.FEATURES.FOREGROUND 'teacher'"
        instead = (
            "Its features can be distilled: MOKD.OBJECTIVES ['features'], with FOREGROUND '' or "
            "'ground_truth'."
        )
    raise ValueError(
        f"The heads of the {who}, a {type(detector).__name__}, cannot be read, which {asked} asks "
        f"for: expected an R-CNN with Detectron2's ROI heads, or RetinaNet. {instead}"
    )
