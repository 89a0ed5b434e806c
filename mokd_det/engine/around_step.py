# Copyright (c) The mokd_det authors.
"""What the trainers of YAML and of Python configs have in common around the balanced step."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from torch import nn

from ..data import check_teacher_classes
from ..modeling import accelerate_student, copy_weights, inheritable_names
from ..objectives import OBJECTIVES
from ..tasks import Task
from .average import WeightAverage
from .checkpoints import RunCheckpointer
from .finite import SkippedSteps, check_weights
from .step import BalancedTrainer


def step_options(cfg: CfgNode, model: Any) -> dict[str, Any]:
    """
    Return what ``SOLVER`` says of a :class:`BalancedTrainer` for this model, whose student is made
    ready for it: checkpointing, compilation, and the running mean that it is evaluated by.
    """
    solver, average = cfg.SOLVER, None
    if solver.EMA_DECAY:
        average = WeightAverage(model.student, solver.EMA_DECAY)
        # Bound, because a module as attribute would become a part of the model.
        model.inference = average.model.__call__
    accelerate_student(cfg, model.student)
    return {
        "micro_batches": solver.MICRO_BATCHES,
        "precision": solver.AMP.PRECISION if solver.AMP.ENABLED else None,
        "average": average,
        "skipped": SkippedSteps(solver.NON_FINITE_GRADIENTS, solver.MAX_SKIPPED_STEPS),
    }


def inherited_names(cfg: CfgNode, model: Any) -> list[str]:
    """Return the names of ``MOKD.INHERIT``; ValueError: see :func:`inheritable_names`."""
    return inheritable_names(model.student, model.teacher.model, cfg.MOKD.INHERIT)


def inherit(step: BalancedTrainer, names: Sequence[str]) -> None:
    """Copy weights of these names from the teacher to the student, and to its running mean."""
    model = step.inner
    copy_weights(model.teacher.model, model.student, names)
    if step.average is not None:
        step.average.model.load_state_dict(model.student.state_dict())


def check_trained(checkpointer: RunCheckpointer) -> None:
    """Raise FloatingPointError if weights that are to be saved are not finite."""
    parts = {n: x for n, x in checkpointer.checkpointables.items() if isinstance(x, nn.Module)}
    latest = checkpointer.get_checkpoint_file() if checkpointer.has_checkpoint() else ""
    check_weights({"model": checkpointer.model, **parts}, latest)


def check_classes_of_teacher(cfg: CfgNode, task: Task) -> None:
    """Raise ValueError if an objective compares classes that the teacher numbers otherwise."""
    if cfg.MOKD.ENABLED and not cfg.MOKD.TEACHER.TORCHSCRIPT.FILE:
        comparing = [n for n in task.objectives(cfg) if OBJECTIVES.get(n).compares_classes]
        if comparing:
            reader = f"MOKD.OBJECTIVES {comparing}"
            check_teacher_classes(cfg, task.teacher_config(cfg), reader)


def check_loader(data_loader: Any, trainer: str) -> None:
    """Raise TypeError for a loader that cannot go on where a run stopped."""
    if not (hasattr(data_loader, "seed") and hasattr(data_loader, "start")):
        raise TypeError(
            f"build_train_loader of {trainer} returned a {type(data_loader).__name__}, but a "
            "distilled run has to be able to go on where it stopped. Return "
            "mokd_det.data.build_resumable_train_loader(cfg, mapper=your_mapper), or a "
            "mokd_det.data.ResumableLoader."
        )


def wrap_distributed(model: Any) -> nn.Module:
    """
    As Detectron2's ``create_ddp_model`` (in DistributedDataParallel if there are several
    processes), with equal buffers on all ranks to start with.
    """
    for buffer in model.buffers() if comm.get_world_size() > 1 else ():
        # DistributedDataParallel does that for parameters only if buffers are not broadcast in
        # every step. A frozen projection is a buffer, and each process has drawn its own.
        dist.broadcast(buffer, 0)
    device_ids = None if model.device.type == "cpu" else [comm.get_local_rank()]
    return create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
