# Copyright (c) The mokd_det authors.
"""The meta-architecture that trains a stock model with the help of a frozen one."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..balancing import (
    TORCHJD_PREFIX,
    Boundary,
    Parameters,
    build_balancer,
    build_boundary,
    check_measured,
)
from ..objectives import OBJECTIVES, Objective
from ..teachers import Teacher, TeacherOutputs

if TYPE_CHECKING:
    from ..tasks import Task

# Name of the student's own losses among the objectives.
TASK = "task"


@META_ARCH_REGISTRY.register()
class DistillationModel(nn.Module):
    """
    A student, a hidden frozen teacher, and the objectives that match them.

    The student is the stock model of its config, not a subclass or a copy, and stays usable as
    such: ``model.student``. In training, ``forward`` returns the objectives apart from each other;
    in evaluation it is the student's forward. What a student must look like is its task's to say,
    see :class:`mokd_det.tasks.DetectionTask`.

    Attributes:
        objectives: by name, without the task itself.
        inference: what evaluation runs; the student, unless the trainer exchanges it.
        teacher_outputs: of the latest forward pass, for a second one on the same batch; only kept
            if the rule asks for that.
    """

    @configurable
    def __init__(
        self,
        *,
        task: "Task",
        student: nn.Module,
        teacher: Teacher,
        boundary: Boundary,
        objectives: dict[str, Objective],
        input_format: str,
        loss_weights: dict[str, float] | None = None,
    ):
        """
        Args:
            task: knows where the student's features are.
            student, teacher: both sides.
            boundary: balances the gradients at the student's features.
            objectives: by name; at least one.
            input_format: channel order of the images the model gets, "RGB" or "BGR".
            loss_weights: factors of the objectives' losses, default 1.

        Raises:
            ValueError: no objective, or a factor that is not positive.
        """
        super().__init__()
        if not objectives:
            raise ValueError(
                "MOKD.ENABLED is True, but MOKD.OBJECTIVES is empty: name what is distilled, such "
                f"as ['features']; known are {', '.join(OBJECTIVES)}."
            )
        self.task = task
        self.student = student
        self.teacher = teacher
        self.boundary = boundary
        self.objectives = nn.ModuleDict(objectives)
        self.input_format = input_format
        self.loss_weights = dict.fromkeys(objectives, 1.0) | (loss_weights or {})
        for name, weight in self.loss_weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"MOKD.{name.upper()}.LOSS_WEIGHT is {weight}: expected a finite number > 0. "
                    f"To go without this objective take it out of MOKD.OBJECTIVES."
                )
        self.inference: Callable[..., Any] = student.__call__
        self.teacher_outputs: TeacherOutputs | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode, task: "Task") -> dict[str, Any]:
        # The student comes before the teacher, so that a seed gives it the same initial weights
        # as without distillation.
        student = task.build_student(cfg)
        task.check_student(cfg, student)
        boundary = boundary_of(cfg, task.shared_part(student))
        teacher = task.build_teacher(cfg)
        objectives = {
            name: OBJECTIVES.get(name).from_config(cfg, task, student, teacher)
            for name in cfg.MOKD.OBJECTIVES
        }
        task.check_pair(cfg, student, teacher, list(objectives.values()))
        return {
            "task": task,
            "student": student,
            "teacher": teacher,
            "boundary": boundary,
            "objectives": objectives,
            "input_format": cfg.INPUT.FORMAT,
            "loss_weights": {name: cfg.MOKD[name.upper()].LOSS_WEIGHT for name in objectives},
        }

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    @property
    def names(self) -> list[str]:
        """Of all objectives, the task first."""
        return [TASK, *self.objectives]

    def forward(self, batch: Any, teacher_outputs: TeacherOutputs | None = None) -> Any:
        """
        Args:
            batch: as the student takes it: Detectron2's list of dicts, or a classifier's Batch.
            teacher_outputs: of this batch, if they are known already.

        Returns:
            In training dict[str, dict[str, Tensor]]: losses by objective, "task" first with the
            student's own; their gradients meet at ``self.boundary``. In evaluation what the student
            returns.
        """
        if not self.training:
            return self.inference(batch)
        outputs = teacher_outputs or self.teacher.run(batch, self.input_format)
        assert self.boundary.balancer is not None
        needed_again = self.boundary.balancer.needs_second_forward
        self.teacher_outputs = outputs if needed_again else None
        losses: dict[str, dict[str, Tensor]] = {}

        def on_features(features: dict[str, Tensor]) -> dict[str, Tensor]:
            self.teacher.wait(outputs)
            uses = {name: objective.used_parameters() for name, objective in self._objectives()}
            branches = self.boundary.split(features, {TASK: Parameters(), **uses})
            # Before the heads run: autograd then adds the distillation's gradient after theirs,
            # in the order of a plain sum.
            for name, objective in self._objectives():
                branch = branches[name]
                parts = objective.on_branch(branch.features, branch.parameters, batch, outputs)
                if (weight := self.loss_weights[name]) != 1:
                    parts = {key: weight * loss for key, loss in parts.items()}
                losses[name] = parts
            return branches[TASK].features

        taps = [tap for _, objective in self._objectives() for tap in objective.taps]
        with self.task.replace_features(self.student, list(dict.fromkeys(taps)), on_features):
            task_losses = self.student(batch)
        found = {TASK: task_losses, **losses}
        _check_names(found)
        return found

    def _objectives(self) -> Iterable[tuple[str, Any]]:
        return self.objectives.items()


def _check_names(losses: dict[str, dict[str, Tensor]]) -> None:
    names = [name for parts in losses.values() for name in parts]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"The losses {', '.join(twice)} come from several of {', '.join(losses)}, and one "
            "would hide the other: give those of your objective other names."
        )


def boundary_of(cfg: CfgNode, shared: nn.Module) -> Boundary:
    """Return the boundary of ``cfg.MOKD.BALANCING``; ``shared`` is the module before it."""
    options = cfg.MOKD.BALANCING
    return build_boundary(
        measure_at=options.MEASURE_AT,
        shared=shared,
        layers=options.LAYERS,
        **_balancer_options(cfg),
    )


def check_balancing(cfg: CfgNode) -> None:
    """Raise ValueError or ImportError for options of ``MOKD.BALANCING`` that :func:`boundary_of`
    would refuse."""
    check_measured(cfg.MOKD.BALANCING.MEASURE_AT, cfg.MOKD.BALANCING.LAYERS)
    build_balancer(**_balancer_options(cfg))


def _balancer_options(cfg: CfgNode) -> dict[str, Any]:
    options, rule = cfg.MOKD.BALANCING, cfg.MOKD.BALANCING.RULE
    if rule.startswith(TORCHJD_PREFIX):
        node = dict(options.TORCHJD)
    else:
        node = {key.lower(): value for key, value in options.get(rule.upper(), {}).items()}
    return {
        "rule": rule,
        "options": node,
        "objectives": 1 + len(cfg.MOKD.OBJECTIVES),
        "rescale": options.RESCALE,
        "smoothing": options.SMOOTHING,
        "interval": options.INTERVAL,
        "schedule": options.SCHEDULE,
        "steps": cfg.SOLVER.MAX_ITER,
    }
