# Copyright (c) The mokd_det authors.
"""``mokd doctor --config-file``: a few steps of a training, of which nothing stays."""

import contextlib
import datetime
import logging
import math
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .. import compat  # first: patches Detectron2 where it needs it
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn

from ..config import check_device, load_config
from ..data import known_class_names, trained_class_names
from ..engine import BalancedTrainer, build_trainer, checkpoints_in, prepare_datasets, validate
from ..tasks import Task, task_of
from .installation import GIB, Findings

STEPS = 3  # that are measured, after the first
SECONDS = 12.0  # enough for those of one model
LONG = datetime.timedelta(hours=1)
SHORTER = (
    "shorter with fewer steps (mokd init --epochs, or the options of SOLVER that count steps); "
    "beside other programs steps are faster with OMP_NUM_THREADS=1"
)


def check_config(config_file: str, opts: Sequence[Any], findings: Findings) -> None:
    """Say what a config would train, on what, and for how long."""
    with findings.part():
        cfg = load_config(config_file, opts)
        with tempfile.TemporaryDirectory() as folder, _logs_said(findings):
            _check(cfg, folder, findings)


def _check(cfg: CfgNode, folder: str, findings: Findings) -> None:
    """``folder`` takes the place of OUTPUT_DIR: a dry run leaves nothing."""
    before = findings.problems
    task = task_of(cfg)
    with findings.part():
        validate(cfg)
    with findings.part():
        check_device(cfg)
    with findings.part():
        _check_output(cfg.OUTPUT_DIR)
    output, cfg.OUTPUT_DIR = cfg.OUTPUT_DIR, folder
    with findings.part():
        prepare_datasets(cfg, task)
        _describe_data(cfg, findings)
    if findings.problems > before:
        findings.say("dry run", "not before the problems above are solved")
        return
    with findings.part(RuntimeError):  # out of memory; operators that are not compiled
        _try_steps(cfg, task, output, findings)


def _check_output(folder: str) -> None:
    if names := checkpoints_in(folder) if os.path.isdir(folder) else []:
        raise ValueError(
            f"OUTPUT_DIR '{folder}' has checkpoints of an earlier run ({names[0]} ...): train with "
            "--resume (go on), with --overwrite (start anew), or choose another OUTPUT_DIR."
        )
    above = _existing(folder)
    if not (os.path.isdir(above) and os.access(above, os.W_OK)):
        raise ValueError(f"OUTPUT_DIR '{folder}' cannot be written: choose another OUTPUT_DIR.")


def _existing(folder: str) -> str:
    """Return the folder, or the closest path above it that is there."""
    path = os.path.abspath(folder)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def _describe_data(cfg: CfgNode, findings: Findings) -> None:
    classes = _listed_classes(known_class_names(cfg)) or "classes without names"
    findings.say("data", f"train on {_joined(cfg.DATASETS.TRAIN)}, {classes}")
    findings.say("", f"evaluate on {_joined(cfg.DATASETS.TEST) or 'nothing (DATASETS.TEST)'}")


def _listed_classes(names: Sequence[str] | None) -> str:
    if not names:
        return ""
    more = " ..." if len(names) > 10 else ""
    return f"{len(names)} class{'es' * (len(names) > 1)}: {', '.join(names[:10])}{more}"


def _joined(names: Sequence[str]) -> str:
    return ", ".join(names)


def _try_steps(cfg: CfgNode, task: Task, output: str, findings: Findings) -> None:
    own = cfg.clone()
    own.merge_from_list(["MOKD.ENABLED", False, "DATALOADER.RESUMABLE", True])
    trainer = _trainer(own)
    student = getattr(trainer._trainer.model, "student", trainer._trainer.model)
    name = "student" if cfg.MOKD.ENABLED else "model"
    findings.say(name, f"{_described(student)}, on {cfg.MODEL.DEVICE}")
    seconds = _seconds_a_step(trainer)
    cost = f"{seconds:.2f} s for {cfg.SOLVER.IMS_PER_BATCH} images, the student's own"
    if cfg.MOKD.ENABLED:
        del trainer, student
        trainer = _trainer(cfg)
        _describe_distillation(cfg, task, trainer._trainer.model, findings)
        alone, seconds = seconds, _seconds_a_step(trainer)
        cost += f"; distilled {seconds:.2f} s ({seconds / alone:.1f} times)"
        if seconds < alone:
            cost += ", which cannot be: the machine has other work"
    findings.say("a step", cost)
    duration = datetime.timedelta(seconds=round(seconds * trainer.max_iter))
    findings.say(
        "the run", f"{trainer.max_iter} steps, {duration} in one process, evaluation not counted"
    )
    if duration > LONG and cfg.MODEL.DEVICE == "cpu":
        findings.say("", SHORTER)
    _check_space(trainer, output, findings)


def _trainer(cfg: CfgNode) -> Any:
    trainer = build_trainer(cfg)
    trainer.resume_or_load(resume=False)
    return trainer


def _described(model: nn.Module) -> str:
    inner = getattr(model, "network", model)  # of torchvision
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{type(inner).__name__} with {millions:.2f} million parameters"


def _describe_distillation(cfg: CfgNode, task: Task, model: Any, findings: Findings) -> None:
    teacher = _described(model.teacher.model)
    if not cfg.MOKD.TEACHER.TORCHSCRIPT.FILE:
        teacher_cfg = task.teacher_config(cfg)
        weights = teacher_cfg.MODEL.WEIGHTS or cfg.MOKD.TEACHER.WEIGHTS
        names = trained_class_names(weights) or known_class_names(teacher_cfg)
        teacher += f", weights {weights}"
        teacher += f", {_listed_classes(names)}" if names else ""
    findings.say("teacher", teacher)
    rule = cfg.MOKD.BALANCING.RULE
    findings.say("objectives", f"{', '.join(model.names[1:])}; balanced by '{rule}'")


def _seconds_a_step(trainer: Any) -> float:
    """
    Return the mean of a step: the median of a few, the first left out if there is time for others,
    and of an interval one that measures gradients.
    """
    inner = trainer._trainer
    for group in inner.optimizer.param_groups:
        group["lr"] = 0.0
    inner.model.train()
    seconds: list[float] = []
    with EventStorage(0):
        while len(seconds) <= STEPS and sum(seconds) < SECONDS:
            inner.iter = len(seconds)
            seconds.append(_seconds_of_step(inner))
        usual = statistics.median(seconds[1:] or seconds)
        balancer = inner.boundary.balancer if isinstance(inner, BalancedTrainer) else None
        if balancer is None or balancer.interval == 1:
            return usual
        balancer.step = balancer.interval - 1  # the next that is due
        return usual + (_seconds_of_step(inner) - usual) / balancer.interval


def _seconds_of_step(inner: Any) -> float:
    start = time.perf_counter()
    inner.run_step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _check_space(trainer: Any, output: str, findings: Findings) -> None:
    """Compare the checkpoints that a run keeps, roughly, with the space there is."""
    solver = trainer.cfg.SOLVER
    copies = 3 if solver.OPTIMIZER == "AdamW" else 2  # the weights, and what the optimizer keeps
    size = copies * sum(4 * p.numel() for p in trainer._trainer.model.parameters())
    count = math.ceil(trainer.max_iter / max(solver.CHECKPOINT_PERIOD, 1)) + 1
    count = min(count, solver.KEEP_CHECKPOINTS + 1) if solver.KEEP_CHECKPOINTS else count
    free = shutil.disk_usage(_existing(output)).free
    need = f"{count} checkpoints of {size / GIB:.2f} GiB"
    findings.say("output", f"{output}: {need}, {free / GIB:.1f} GiB free")
    if count * size > free:
        findings.problem(
            f"OUTPUT_DIR '{output}' has {free / GIB:.1f} GiB free for {need}: free some, choose "
            "another OUTPUT_DIR, or keep fewer by SOLVER.KEEP_CHECKPOINTS 2."
        )


@contextlib.contextmanager
def _logs_said(findings: Findings) -> Iterator[None]:
    """Of what training logs, say the warnings, and which levels are matched."""

    def said(record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.WARNING:
            findings.say("warning", message)
        elif record.name.startswith("mokd_det.objectives"):
            findings.say("", message)

    handler = logging.Handler(logging.INFO)
    handler.emit = said  # type: ignore[method-assign]
    logger = logging.getLogger("mokd_det")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # Else the trainer starts Detectron2's own log on the console.
    logging.getLogger("detectron2").setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("once", UserWarning)  # two trainers with the same loaders
            compat.ignore_foreign_warnings(append=False)
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
