# Copyright (c) The mokd_det authors.
"""
torchvision's NMS by class (or level) for ONNX.

Up to 1,000 boxes torchvision shifts the classes apart and runs one NMS, which rounds coordinates;
above, it runs one for each class. While tracing it always does the first. This writes both into the
graph: ONNX's operator takes classes, and up to 1,000 boxes all are of one.
"""

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torchvision.ops import boxes as box_ops

# Numbers of torchvision's batched_nms, of four coordinates each.
MOST_SHIFTED = {"cpu": 4000}
MOST_SHIFTED_GPU = 100_000
LEAST_SCORE = torch.finfo(torch.float32).min  # boxes of other classes are below


class _NMS(torch.autograd.Function):
    """Indices (S,) of the boxes that are kept, of (N, 4) boxes and (C, N) scores, in any order."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
        kept = []
        for row in scores:
            indices = (row > LEAST_SCORE).nonzero().flatten()
            kept.append(
                indices[torch.ops.torchvision.nms(boxes[indices], row[indices], iou_threshold)]
            )
        return torch.cat(kept)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, iou_threshold: float) -> Any:
        def constant(value: Any, dtype: torch.dtype) -> Any:
            return g.op("Constant", value_t=torch.tensor(value, dtype=dtype))

        first = constant([0], torch.int64)
        chosen = g.op(
            "NonMaxSuppression",
            g.op("Unsqueeze", boxes, first),
            g.op("Unsqueeze", scores, first),
            constant([torch.iinfo(torch.int64).max], torch.int64),
            constant([iou_threshold], torch.float32),
            constant([LEAST_SCORE], torch.float32),
        )  # (S, 3): image, class, box
        return g.op("Gather", chosen, constant(2, torch.int64), axis_i=1)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """As torchvision's: (N, 4), (N,) and classes (N,) to indices (S,) by descending score."""
    most = MOST_SHIFTED.get(boxes.device.type, MOST_SHIFTED_GPU) // 4
    is_small = (torch.ones_like(scores).sum() <= most).to(boxes)
    # No maximum of none; boxes are within the image.
    largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()
    shifted = boxes + (idxs.to(boxes) * (largest + 1) * is_small)[:, None]
    rows = torch.where(is_small > 0, torch.zeros_like(idxs), idxs)
    count: Any = torch.cat([rows, rows.new_zeros(1)]).max() + 1  # a tensor: it stays in the graph
    apart = rows[None] == torch.arange(count, device=rows.device)[:, None]
    others = torch.full_like(scores, -torch.inf)
    kept = _NMS.apply(shifted, torch.where(apart, scores[None], others[None]), iou_threshold)
    kept = kept.sort()[0]
    return kept[scores[kept].sort(descending=True)[1]]  # in ONNX equal scores stay in order


def onnx_nms() -> Any:
    """Return a context in which torchvision's (and so Detectron2's) is this one."""
    return mock.patch.object(box_ops, "batched_nms", batched_nms)
