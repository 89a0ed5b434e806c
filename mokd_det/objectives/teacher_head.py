# Copyright (c) The mokd_det authors.
"""The objective that lets the teacher's own heads read the student's features."""

import abc
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detectron2.config import CfgNode
from torch import Tensor, nn

from ..readers import BoxReader, RPNReader
from ..teachers import TeacherOutputs
from .base import OBJECTIVES, Objective, StudentOutputs
from .features import Level, key_of
from .output_losses import box_loss, check_weights, class_loss
from .output_losses import kl_divergence, rpn_losses
from .projector import normalise_like

if TYPE_CHECKING:
    from ..tasks import Task

logger = logging.getLogger(__name__)

PROJECTORS = ("Linear", "none")


class HeadReader(abc.ABC):
    """A teacher's frozen heads, and how what they say about two features is compared."""

    @abc.abstractmethod
    def losses(
        self, features: dict[str, Tensor], teacher: Any, temperature: float
    ) -> dict[str, Tensor]:
        """
        Return scalars: what the heads say about ``features``, (N, C_t, H, W) by the teacher's
        names, beside what they say about the teacher's own.
        """


class DetectorHeads(HeadReader):
    """Classes and boxes at the teacher's proposals, and what its RPN says at each anchor."""

    def __init__(
        self,
        reader: BoxReader | None,
        rpn_reader: RPNReader | None,
        class_weight: float = 1.0,
        box_weight: float = 1.0,
        rpn_weight: float = 1.0,
    ):
        """Readers of the teacher, on those features that are projected. Weights of the losses."""
        self.reader, self.rpn_reader = reader, rpn_reader
        self.class_weight, self.box_weight, self.rpn_weight = class_weight, box_weight, rpn_weight
        self._has_said = False

    def losses(
        self, features: dict[str, Tensor], teacher: Any, temperature: float
    ) -> dict[str, Tensor]:
        losses = {}
        if self.reader is not None:
            self._say(teacher.proposals)
            boxes = self.reader.locations(features, teacher.proposals)
            theirs = teacher.at(boxes)
            ours = teacher.teacher.read(self.reader, features, boxes, teacher.image_sizes)
            if self.class_weight:
                loss = class_loss(ours, theirs, temperature)
                losses["loss_teacher_head_classes"] = self.class_weight * loss
            if self.box_weight:
                losses["loss_teacher_head_boxes"] = self.box_weight * box_loss(ours, theirs)
        if self.rpn_reader is not None:
            said = teacher.anchors(self.rpn_reader)
            ours = teacher.teacher.read(self.rpn_reader, features)
            objectness, deltas = rpn_losses(ours.cropped_to(said), said.cropped_to(ours))
            losses["loss_teacher_head_rpn_cls"] = self.rpn_weight * objectness
            losses["loss_teacher_head_rpn_loc"] = self.rpn_weight * deltas
        return losses

    def _say(self, boxes: list[Tensor]) -> None:
        """Log once how many boxes are read on another level than the teacher would."""
        if self._has_said or self.reader is None:
            return
        self._has_said = True
        if moved := self.reader.elsewhere(boxes):
            logger.info(
                f"teacher_head: {moved} of the first batch's {sum(map(len, boxes))} boxes are of "
                "levels that the student does not have (usual for RetinaNet, which has no p2); "
                "they are read on the nearest one it has."
            )


class ClassifierHead(HeadReader):
    """A classifier's last layers (after SRRL, Yang et al., ICLR 2021), read at its logits."""

    def __init__(self, head: nn.Module, teacher: Any, is_vector: bool):
        """``head``: of the teacher, from the only feature to logits; whether that is (N, C)."""
        self.head, self.teacher, self.is_vector = head, teacher, is_vector

    def losses(
        self, features: dict[str, Tensor], teacher: Any, temperature: float
    ) -> dict[str, Tensor]:
        (given,) = features.values()
        # Not by its call: the teacher's own run is tapped by hooks. A copy: it may work in place.
        given = given.flatten(1) if self.is_vector else given.clone()
        logits = self.teacher.read(self.head.forward, given).flatten(1)
        return {"loss_teacher_head": kl_divergence(logits, teacher.logits, temperature)}


@OBJECTIVES.register("teacher_head")
class TeacherHeadObjective(Objective):
    """
    The student's features go through a projector into the teacher's channels, and the teacher's
    frozen heads read them: they are to say what they say about the teacher's own features.

    A distance between features treats all directions alike, and all positions. The heads know which
    of them matter, and they fix the basis: the student's own heads, which start from random
    weights, read an arbitrary one. Nothing of the student is needed but features, so that its own
    heads may be of any kind. After CrossKD (Wang et al., CVPR 2024, arXiv 2306.11369), where the
    teacher's head reads what is inside of the student's, and SRRL for classifiers.

    Each projected channel is given the mean and the variance that the teacher's has in the batch
    (ours): heads were trained on features of that distribution, and need not be reached first.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        head: HeadReader,
        projector: str = "Linear",
        temperature: float = 1.0,
    ):
        """
        ``levels``: their ``align`` brings the student's map onto the teacher's grid. ``projector``:
        "Linear" or "none", for equal channels; ValueError if they are not.
        """
        super().__init__()
        self.levels, self.head, self.temperature = tuple(levels), head, temperature
        self.taps = tuple(level.student for level in levels)
        self.projectors = nn.ModuleDict()
        for level in levels:
            channels = level.student_channels, level.teacher_channels
            if projector == "Linear":
                convolution = nn.Conv2d(*channels, 1, bias=False)
                nn.init.orthogonal_(convolution.weight)
                self.projectors[key_of(level.student)] = convolution
            elif channels[0] != channels[1]:
                raise ValueError(
                    f"MOKD.TEACHER_HEAD.PROJECTOR is 'none', but '{level.student}' of the student "
                    f"has {channels[0]} channels and '{level.teacher}' of the teacher "
                    f"{channels[1]}: use 'Linear'."
                )

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        options = cfg.MOKD.TEACHER_HEAD
        if options.PROJECTOR not in PROJECTORS:
            raise ValueError(
                f"MOKD.TEACHER_HEAD.PROJECTOR is '{options.PROJECTOR}': expected one of "
                f"{', '.join(map(repr, PROJECTORS))}."
            )
        names = ("CLASS_WEIGHT", "BOX_WEIGHT", "RPN_WEIGHT")
        check_weights("MOKD.TEACHER_HEAD", options, names)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, task: "Task", student: nn.Module, teacher: Any
    ) -> "TeacherHeadObjective":
        options = cfg.MOKD.TEACHER_HEAD
        levels, head = task.match_heads(cfg, student, teacher, options.STUDENT, options.TEACHER)
        pairs = ", ".join(f"{level.student} -> {level.teacher}" for level in levels)
        logger.info(f"teacher_head (student -> teacher): {pairs}")
        return cls(levels, head, options.PROJECTOR, options.TEMPERATURE)

    def forward(self, student: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """
        Return scalars: of detectors ``loss_teacher_head_classes`` and ``loss_teacher_head_boxes``,
        of those with an RPN also ``..._rpn_cls`` and ``..._rpn_loc``; of classifiers
        ``loss_teacher_head``.
        """
        projected = {}
        for level in self.levels:
            ours, theirs = level.align(
                student.features[level.student], teacher.features[level.teacher]
            )
            if (key := key_of(level.student)) in self.projectors:
                ours = self.projectors[key](ours)
            projected[level.teacher] = normalise_like(ours, theirs)
        return self.head.losses(projected, teacher, self.temperature)
