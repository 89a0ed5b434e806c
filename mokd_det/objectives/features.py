# Copyright (c) The mokd_det authors.
"""The objective that matches feature maps in a learned subspace."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from detectron2.config import CfgNode
from torch import Tensor, nn

from ..teachers import TeacherOutputs
from .base import OBJECTIVES, Objective, StudentOutputs
from .feature_losses import FEATURE_LOSSES
from .foreground import SOURCES, foreground_weights
from .projector import PROJECTORS, check_projector

if TYPE_CHECKING:
    from ..tasks import Task

LEVEL_WEIGHTS = ("equal", "positions")


@dataclasses.dataclass(frozen=True)
class Level:
    """
    One pair of features that are matched.

    Attributes:
        student, teacher: names of the features.
        align: from the two features to maps (N, C_s, H, W) and (N, C_t, H, W) on one grid.
        stride: of the student's map, in pixels; None where there is none (classifiers).
    """

    student: str
    teacher: str
    student_channels: int
    teacher_channels: int
    align: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    stride: int | None = None


@OBJECTIVES.register("features")
class FeatureObjective(Objective):
    """Sum over levels of the loss between both sides' maps in their common subspace."""

    def __init__(
        self,
        levels: Sequence[Level],
        projectors: dict[str, nn.Module],
        loss: Callable,
        foreground: str = "",
        foreground_share: float = 0.5,
        foreground_score: float = 0.5,
        level_weights: str = "equal",
    ):
        """
        Projectors (see ``PROJECTORS``) are by the student's feature name; for the loss see
        ``FEATURE_LOSSES``, for the rest ``MOKD.FEATURES``.
        """
        super().__init__()
        self.levels = tuple(levels)
        self.taps = tuple(level.student for level in self.levels)
        # Names of modules may not have dots.
        self.projectors = nn.ModuleDict({_key(name): p for name, p in projectors.items()})
        self.loss, self.level_weights = loss, level_weights
        self.foreground, self.share, self.score = foreground, foreground_share, foreground_score

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        options = cfg.MOKD.FEATURES
        for option, known in (("FOREGROUND", SOURCES), ("LEVEL_WEIGHTS", LEVEL_WEIGHTS)):
            if options[option] not in known:
                raise ValueError(
                    f"MOKD.FEATURES.{option} is '{options[option]}': expected one of {known}."
                )
        readers = {"FOREGROUND_SHARE": SOURCES[1:], "FOREGROUND_SCORE": ("teacher",)}
        for option, sources in readers.items():
            if not 0 <= options[option] <= 1:
                raise ValueError(
                    f"MOKD.FEATURES.{option} is {options[option]}: expected a number in [0, 1]."
                )
            if options[option] != 0.5 and options.FOREGROUND not in sources:
                raise ValueError(
                    f"MOKD.FEATURES.{option} is {options[option]}, but it is read with "
                    f"FOREGROUND {' or '.join(sources)} only: remove it."
                )
        FEATURE_LOSSES.get(options.LOSS)
        PROJECTORS.get(options.PROJECTOR)
        check_projector(options.DIM, options.TEACHER_SIDE)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, task: "Task", student: nn.Module, teacher: Any
    ) -> "FeatureObjective":
        options = cfg.MOKD.FEATURES
        if options.FOREGROUND == "teacher":
            teacher.read_boxes()
        projector = PROJECTORS.get(options.PROJECTOR)
        levels = task.match_features(cfg, student, teacher, options.STUDENT, options.TEACHER)
        pairs = ", ".join(f"{level.student} -> {level.teacher}" for level in levels)
        logging.getLogger(__name__).info("Features (student -> teacher): %s", pairs)
        sides = {"dim": options.DIM, "teacher_side": options.TEACHER_SIDE}
        return cls(
            levels,
            {x.student: projector(x.student_channels, x.teacher_channels, **sides) for x in levels},
            FEATURE_LOSSES.get(options.LOSS),
            options.FOREGROUND,
            options.FOREGROUND_SHARE,
            options.FOREGROUND_SCORE,
            options.LEVEL_WEIGHTS,
        )

    def forward(self, student: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """Return ``loss_features``, a scalar."""
        objects = self._objects(student, teacher)
        losses, positions = [], []
        for level in self.levels:
            maps = level.align(student.features[level.student], teacher.features[level.teacher])
            maps = self.projectors[_key(level.student)](*maps)
            if objects is not None:
                assert level.stride is not None, "[FeatureObjective] a foreground needs strides"
                size = maps[0].shape[-2:]
                maps = *maps, foreground_weights(objects, size, level.stride, self.share)
            losses.append(self.loss(*maps))
            positions.append(maps[0].shape[-2:].numel())
        if self.level_weights == "positions":
            scale = len(positions) / sum(positions)
            losses = [loss * (count * scale) for loss, count in zip(losses, positions)]
        return {"loss_features": sum(losses)}

    def _objects(self, student: StudentOutputs, teacher: Any) -> list[Tensor] | None:
        """For each image (B_i, 4) boxes, XYXY in pixels; None: positions count alike."""
        if self.foreground == "teacher":
            return teacher.objects(self.score)
        if self.foreground == "ground_truth":
            device = next(iter(student.features.values())).device
            return [x["instances"].gt_boxes.tensor.to(device) for x in student.batch]
        return None


def _key(name: str) -> str:
    return name.replace(".", "_")
