# Copyright (c) The mokd_det authors.
"""What Detectron2's two-stage detectors say about boxes."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import nonzero_tuple
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.poolers import convert_boxes_to_pooler_format
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads
from detectron2.structures import Boxes, ImageList
from torch import Tensor, nn

from .boxes import BoxOutputs, BoxReader, Sizes, indices_of


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
        levels = indices_of(self.in_features, names)
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
