# Copyright (c) The mokd_det authors.
"""The meta-architecture that trains a stock model with the help of a frozen one."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..balancing import TORCHJD_PREFIX, Boundary, Branch, Parameters
from ..balancing import build_balancer, build_boundary, check_measured
from ..objectives import OBJECTIVES, Objective
from ..teachers import Teacher, TeacherOutputs
from .once import run_once

if TYPE_CHECKING:
    from ..tasks import Task

TASK = "task"  # the student's own losses, among the objectives


@META_ARCH_REGISTRY.register()
class DistillationModel(nn.Module):
    """
    A student, a hidden frozen teacher, and the objectives that match them. The student is the stock
    model of its config, not a subclass or a copy, and stays usable as such: ``model.student``.

    Attributes:
        inference: what evaluation runs; the student, unless the trainer exchanges it.
        teacher_outputs: of the latest forward pass, if the rule needs a second one on its batch.
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
            task: knows where the student's features are; ``boundary`` balances the gradients there.
            objectives: by name, without the task itself; at least one.
            input_format: channel order of the images the model gets, "RGB" or "BGR".
            loss_weights: positive factors of the objectives' losses, default 1.
        """
        super().__init__()
        if not objectives:
            raise ValueError(
                "MOKD.ENABLED is True, but MOKD.OBJECTIVES is empty: name what is distilled, such "
                f"as ['features']; known are {', '.join(OBJECTIVES)}."
            )
        self.task, self.student, self.teacher, self.boundary = task, student, teacher, boundary
        self.objectives = nn.ModuleDict(objectives)
        self.input_format = input_format
        self.loss_weights = dict.fromkeys(objectives, 1.0) | (loss_weights or {})
        for name, weight in self.loss_weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"MOKD.{name.upper()}.LOSS_WEIGHT is {weight}: expected a finite number > 0. "
                    "To go without this objective take it out of MOKD.OBJECTIVES."
                )
        self.inference: Callable[..., Any] = student.__call__
        self.teacher_outputs: TeacherOutputs | None = None

    @classmethod
    def from_config(
        cls, cfg: CfgNode, task: "Task", student: nn.Module | None = None
    ) -> dict[str, Any]:
        """``student``: built already, on its device."""
        # The student first: a seed gives it the same initial weights as without distillation.
        student = task.build_student(cfg) if student is None else student
        task.check_student(cfg, student)
        boundary = boundary_of(cfg, task, task.shared_part(student))
        teacher = task.build_teacher(cfg)
        objectives = {
            name: OBJECTIVES.get(name).from_config(cfg, task, student, teacher)
            for name in task.objectives(cfg)
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
        Return dict[str, dict[str, Tensor]] in training: losses by objective, "task" first with the
        student's own; their gradients meet at ``self.boundary``. Else the student's outputs.

        Args:
            batch: as the student takes it: Detectron2's list of dicts, or a classifier's Batch.
            teacher_outputs: of this batch, if they are known already.
        """
        if not self.training:
            return self.inference(batch)
        if teacher_outputs is None:
            batch = self.task.prepare_batch(self.student, batch)
            outputs = self.teacher.run(batch, self.input_format)
            outputs.batch = batch
        else:
            outputs, batch = teacher_outputs, teacher_outputs.batch
        assert self.boundary.balancer is not None
        self.teacher_outputs = outputs if self.boundary.balancer.needs_second_forward else None
        objectives: dict[str, Any] = dict(self.objectives.items())
        branches: dict[str, Branch] = {}
        losses: dict[str, dict[str, Tensor]] = {}

        def on_features(features: dict[str, Tensor]) -> dict[str, Tensor]:
            uses = {name: objective.used_parameters() for name, objective in objectives.items()}
            branches.update(self.boundary.split(features, {TASK: Parameters(), **uses}))
            if not heads:
                # Before the heads run: autograd then adds the distillation's gradient after theirs,
                # in the order of a plain sum.
                losses.update(self._match(branches, batch, outputs))
            return branches[TASK].features

        taps = [tap for objective in objectives.values() for tap in objective.taps]
        # A step that measures nothing asks the task's heads first, and what they said again.
        heads = [h for o in objectives.values() for h in o.heads() if not self.boundary.measures]
        with run_once(heads):
            with self.task.replace_features(self.student, list(dict.fromkeys(taps)), on_features):
                task_losses = self.student(batch)
            if heads:
                losses.update(self._match(branches, batch, outputs))
        return _checked({TASK: task_losses, **losses})

    def _match(
        self, branches: dict[str, Branch], batch: Any, outputs: TeacherOutputs
    ) -> dict[str, dict[str, Tensor]]:
        """Return the losses of each objective, on its branch."""
        self.teacher.wait(outputs)
        losses = {}
        objectives: dict[str, Any] = dict(self.objectives.items())
        for name, objective in objectives.items():
            branch, weight = branches[name], self.loss_weights[name]
            with torch.set_grad_enabled(torch.is_grad_enabled() and not branch.is_idle):
                parts = objective.on_branch(branch.features, branch.parameters, batch, outputs)
            _check_losses(name, parts)
            if weight != 1:
                parts = {key: weight * loss for key, loss in parts.items()}
            losses[name] = parts
        return losses


def _check_losses(objective: str, losses: Any) -> None:
    got = type(losses).__name__
    if isinstance(losses, dict):
        if losses and all(n.startswith("loss") and torch.is_tensor(x) for n, x in losses.items()):
            if not any(loss.ndim for loss in losses.values()):
                return
        got = str({name: getattr(loss, "shape", loss) for name, loss in losses.items()})
    raise ValueError(
        f"The objective '{objective}' returned {got}: expected scalar tensors in a dict, by names "
        "that begin with 'loss_'."
    )


def _checked(losses: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    names = [name for parts in losses.values() for name in parts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"The losses {', '.join(twice)} come from several of {', '.join(losses)}, and one "
            "would hide the other: give those of your objective other names."
        )
    return losses


def boundary_of(cfg: CfgNode, task: "Task", shared: nn.Module) -> Boundary:
    """Return the boundary of ``cfg.MOKD.BALANCING``; ``shared`` is the module before it."""
    place, layers = cfg.MOKD.BALANCING.MEASURE_AT, cfg.MOKD.BALANCING.LAYERS
    options = _balancer_options(cfg, task)
    return build_boundary(measure_at=place, shared=shared, layers=layers, **options)


def check_balancing(cfg: CfgNode, task: "Task") -> None:
    """Raise ValueError or ImportError for options that :func:`boundary_of` would refuse."""
    check_measured(cfg.MOKD.BALANCING.MEASURE_AT, cfg.MOKD.BALANCING.LAYERS)
    build_balancer(**_balancer_options(cfg, task))


def _balancer_options(cfg: CfgNode, task: "Task") -> dict[str, Any]:
    options, rule = cfg.MOKD.BALANCING, cfg.MOKD.BALANCING.RULE
    names = task.objectives(cfg)
    given = {key.lower(): value for key, value in options.get(rule.upper(), {}).items()}
    node = task.rule_options(rule, names) | {k: v for k, v in given.items() if v is not None}
    if rule.startswith(TORCHJD_PREFIX):
        node = dict(options.TORCHJD)
    return {
        "rule": rule,
        "options": node,
        "objectives": 1 + len(names),
        **{key: options[key.upper()] for key in ("rescale", "smoothing", "interval", "schedule")},
        "steps": cfg.SOLVER.MAX_ITER,
    }
