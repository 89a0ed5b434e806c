# Copyright (c) The mokd_det authors.
"""The objective that matches feature maps in a learned subspace."""

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from detectron2.config import CfgNode
from torch import Tensor, nn

from ..config import get_cfg
from ..teachers import TeacherOutputs
from .base import OBJECTIVES, Objective, StudentOutputs
from .feature_losses import FEATURE_LOSSES
from .foreground import foreground_weights
from .projector import PROJECTORS, options_of

if TYPE_CHECKING:
    from ..tasks import Task

LEVEL_WEIGHTS = ("equal", "positions")


@dataclasses.dataclass(frozen=True)
class Level:
    """
    One pair of features that are matched.

    Attributes:
        student, teacher: names of the features.
        student_channels, teacher_channels: C_s and C_t.
        align: from the two features to maps (N, C_s, H, W) and (N, C_t, H, W) on one grid.
        stride: of the student's map, in pixels; None where there is none (classifiers).
        is_vector: the maps have a single position.
    """

    student: str
    teacher: str
    student_channels: int
    teacher_channels: int
    align: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    stride: int | None = None
    is_vector: bool = False


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
        foreground_unit: str = "image",
    ):
        """
        Projectors (see ``PROJECTORS``) are by the student's feature name; for the loss see
        ``FEATURE_LOSSES``, for the rest ``MOKD.FEATURES``.
        """
        super().__init__()
        self.levels = tuple(levels)
        self.taps = tuple(level.student for level in self.levels)
        # Names of modules may not have dots.
        self.projectors = nn.ModuleDict({key_of(name): p for name, p in projectors.items()})
        self.loss, self.level_weights = loss, level_weights
        self.foreground, self.share, self.score = foreground, foreground_share, foreground_score
        self.unit = foreground_unit

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        options = cfg.MOKD.FEATURES
        _check_weights(options)
        _check_read(options)

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
        vectors = [level.student for level in levels if level.is_vector]
        if vectors and options.LOSS == "cwd":
            raise ValueError(
                f"MOKD.FEATURES.LOSS is 'cwd', which compares positions, and {vectors} has a "
                "single one: name maps in MOKD.FEATURES.STUDENT and TEACHER, or use another LOSS."
            )
        given = options_of(projector, options)
        loss = FEATURE_LOSSES.get(options.LOSS)
        if "temperature" in inspect.signature(loss).parameters:
            loss = functools.partial(loss, temperature=options.TEMPERATURE)
        return cls(
            levels,
            {x.student: projector(x.student_channels, x.teacher_channels, **given) for x in levels},
            loss,
            options.FOREGROUND,
            options.FOREGROUND_SHARE,
            options.FOREGROUND_SCORE,
            options.LEVEL_WEIGHTS,
            options.FOREGROUND_UNIT,
        )

    def forward(self, student: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """Return ``loss_features``, a scalar."""
        objects = self._objects(student, teacher)
        losses, positions = [], []
        for level in self.levels:
            maps = level.align(student.features[level.student], teacher.features[level.teacher])
            maps = self.projectors[key_of(level.student)](*maps)
            if objects is not None:
                assert level.stride is not None, "[FeatureObjective] a foreground needs strides"
                size = maps[0].shape[-2:]
                weights = foreground_weights(objects, size, level.stride, self.share, self.unit)
                maps = *maps, weights
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


def _check_weights(options: CfgNode) -> None:
    """A loss and a foreground that do not go together."""
    wanted = inspect.signature(FEATURE_LOSSES.get(options.LOSS)).parameters
    if options.FOREGROUND and "weights" not in wanted:
        raise ValueError(
            f"MOKD.FEATURES.FOREGROUND is '{options.FOREGROUND}', but LOSS '{options.LOSS}' does "
            "not weigh positions: set it to ''."
        )
    needs = "weights" in wanted and wanted["weights"].default is inspect.Parameter.empty
    if needs and not options.FOREGROUND:
        raise ValueError(
            f"MOKD.FEATURES.LOSS is '{options.LOSS}', which weighs positions by boxes, and "
            "FOREGROUND is '': set it to 'ground_truth' or 'teacher' for a detector; for a "
            "classifier use another LOSS."
        )
    if options.LOSS == "fgd" and options.FOREGROUND_UNIT != "box":
        raise ValueError(
            "MOKD.FEATURES.LOSS is 'fgd', which gives each box the same weight, and "
            f"FOREGROUND_UNIT is '{options.FOREGROUND_UNIT}': set it to 'box'."
        )


def _check_read(options: CfgNode) -> None:
    """Options that the chosen projector, loss or foreground does not read."""
    of_loss = inspect.signature(FEATURE_LOSSES.get(options.LOSS)).parameters
    of_projector = options_of(PROJECTORS.get(options.PROJECTOR), options)
    foreground = "FOREGROUND 'ground_truth' or 'teacher'"
    readers = {
        "FOREGROUND_SHARE": (bool(options.FOREGROUND), foreground),
        "FOREGROUND_UNIT": (bool(options.FOREGROUND), foreground),
        "FOREGROUND_SCORE": (options.FOREGROUND == "teacher", "FOREGROUND 'teacher'"),
        "TEMPERATURE": ("temperature" in of_loss, "LOSS 'cwd'"),
        "MASKED": ("masked" in of_projector, "PROJECTOR 'MaskedGenerator'"),
        "DIM": ("dim" in of_projector, "PROJECTOR 'SubspaceProjector'"),
        "TEACHER_SIDE": ("teacher_side" in of_projector, "PROJECTOR 'SubspaceProjector'"),
    }
    usual = get_cfg().MOKD.FEATURES
    for option, (is_read, reader) in readers.items():
        if not is_read and options[option] != usual[option]:
            raise ValueError(
                f"MOKD.FEATURES.{option} is {options[option]!r}, but it is read with {reader} "
                f"only: remove it, or set it to {usual[option]!r} (the default)."
            )


def key_of(name: str) -> str:
    """Return the name of a feature's module: modules may not have dots in theirs."""
    return name.replace(".", "_")
