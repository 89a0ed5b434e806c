# Copyright (c) The mokd_det authors.
"""
What a detector says about given boxes: one form for the outputs of every family.

Student and teacher may belong to different families, so outputs are compared at boxes, not at
positions of a head. A two-stage detector is asked about a box as if it were a proposal. A dense
one answers with its anchor that overlaps the box most; about one of its own anchors that is the
anchor itself. No detector is changed: readers call the stock modules of its heads.
"""

import abc
import dataclasses
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import Tensor, nn

Features = dict[str, Tensor]
Sizes = list[tuple[int, int]]


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

    @property
    def heads(self) -> list[nn.Module]:
        """Modules that it runs on all of ``in_features``, as the detector itself does."""
        return []

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


def indices_of(known: list[str], names: Collection[str] | None) -> list[int]:
    """Return the positions in ``known`` of those that are among ``names``; None: of all."""
    return [i for i, name in enumerate(known) if names is None or name in names]
