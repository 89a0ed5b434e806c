# Copyright (c) The mokd_det authors.
"""What a region proposal network says at each of its anchors."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.proposal_generator import RPN
from torch import Tensor, nn

from .torchvision import is_torchvision


@dataclasses.dataclass(frozen=True)
class AnchorOutputs:
    """
    Predictions at the anchors of some levels.

    Attributes:
        logits: for each level (N, A, H, W), objectness, a sigmoid's.
        deltas: for each level (N, A, 4, H, W), from the anchor to the box.
    """

    logits: list[Tensor]
    deltas: list[Tensor]

    def cropped_to(self, other: "AnchorOutputs") -> "AnchorOutputs":
        """Return these predictions at those positions that ``other`` has, too."""
        sizes = [y.shape[-2:] for y in other.logits]  # a slice beyond the end is the whole
        return AnchorOutputs(
            [x[..., :height, :width] for x, (height, width) in zip(self.logits, sizes)],
            [x[..., :height, :width] for x, (height, width) in zip(self.deltas, sizes)],
        )

    def flat(self) -> tuple[Tensor, Tensor]:
        """Return (N, R) logits and (N, R, 4) deltas of all anchors of each image, in float32."""
        logits = torch.cat([x.flatten(1) for x in self.logits], dim=1)
        deltas = torch.cat([x.movedim(2, -1).flatten(1, 3) for x in self.deltas], dim=1)
        return logits.float(), deltas.float()


class RPNReader(nn.Module):
    """Reads an RPN at some of its levels. Its parameters are those of the RPN's head."""

    def __init__(self, rpn: RPN, levels: Sequence[int], runs_all: bool = False):
        """
        ``levels``: indices of the RPN's ``in_features``. ``runs_all``: the head is run on all of
        these, as the RPN itself runs it, though only ``levels`` are returned.
        """
        super().__init__()
        self.rpn_head = rpn.rpn_head
        self.levels = list(levels)
        self.in_features = [rpn.in_features[i] for i in levels]
        self._run_on = list(rpn.in_features) if runs_all else self.in_features
        self._returned = self.levels if runs_all else range(len(levels))

    @property
    def heads(self) -> list[nn.Module]:
        return [self.rpn_head]

    def forward(self, features: dict[str, Tensor]) -> AnchorOutputs:
        logits, deltas = self.rpn_head([features[name] for name in self._run_on])
        return _at_levels(logits, deltas, self._returned)

    def of_whole(self, said: tuple[Sequence[Tensor], Sequence[Tensor]]) -> AnchorOutputs:
        """As :meth:`forward`, from what the RPN's head has said on all of its levels."""
        return _at_levels(said[0], said[1], self.levels)


def _at_levels(
    logits: Sequence[Tensor], deltas: Sequence[Tensor], levels: Sequence[int]
) -> AnchorOutputs:
    return AnchorOutputs(
        [logits[i] for i in levels], [deltas[i].unflatten(1, (-1, 4)) for i in levels]
    )


class TorchvisionRPN:
    """torchvision's RPN, with the names that Detectron2's has."""

    def __init__(self, detector: Any):
        rpn, shapes = detector.network.rpn, detector.feature_shapes()
        self.rpn_head, self.in_features = rpn.head, list(shapes)
        self.box2box_transform = rpn.box_coder
        self.anchor_generator = SimpleNamespace(
            strides=[shape.stride for shape in shapes.values()],
            cell_anchors=rpn.anchor_generator.cell_anchors,
            offset=0.0,
        )


def stock_rpn(detector: nn.Module) -> Any:
    """Return a detector's RPN, or None if it has none or one that cannot be read."""
    if is_torchvision(detector):
        return TorchvisionRPN(detector) if hasattr(detector.network, "rpn") else None
    rpn: Any = getattr(detector, "proposal_generator", None)
    # Exactly these: a subclass may predict something else, as the one for rotated boxes does.
    if type(rpn) is RPN and type(rpn.anchor_generator) is DefaultAnchorGenerator:
        return rpn
    return None


def build_rpn_reader(detector: nn.Module, names: Collection[str]) -> RPNReader | None:
    """Return a reader of a detector's stock RPN on these feature maps; None if it has neither."""
    rpn = stock_rpn(detector)
    levels = [i for i, name in enumerate(rpn.in_features) if name in names] if rpn else []
    return RPNReader(rpn, levels) if levels else None


def build_rpn_readers(student: nn.Module, teacher: nn.Module) -> tuple[RPNReader, RPNReader] | None:
    """
    Return readers of two detectors at the levels where they have the same anchors; None if there
    are none, or a side has no stock RPN.
    """
    rpns = [stock_rpn(student), stock_rpn(teacher)]
    if None in rpns:
        return None
    ours, theirs = ([*_anchors(rpn)] for rpn in rpns)
    common: dict[int, int] = {}  # each level of the teacher once: torchvision's may be alike
    for i, x in enumerate(ours):
        alike = (j for j, y in enumerate(theirs) if x == y and j not in common.values())
        if (j := next(alike, None)) is not None:
            common[i] = j
    if not common:
        return None
    # Of the student on all levels, so that its own run can be used again.
    return RPNReader(rpns[0], list(common), True), RPNReader(rpns[1], list(common.values()))


def _anchors(rpn: Any) -> Iterator[tuple]:
    """What a level's predictions mean: where its anchors are, and the units of the deltas."""
    generator = rpn.anchor_generator
    for stride, boxes in zip(generator.strides, generator.cell_anchors):
        yield stride, generator.offset, boxes.tolist(), tuple(rpn.box2box_transform.weights)
