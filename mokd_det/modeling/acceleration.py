# Copyright (c) The mokd_det authors.
"""Less memory or time for the student's training, without a trace in the trained model."""

import contextlib
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..speed import check_backend, pool_in_float32
from .state import RestoredState


def check_acceleration(cfg: CfgNode) -> None:
    """Raise ValueError for options of ``MODEL.BACKBONE`` that do not work together."""
    options = cfg.MODEL.BACKBONE
    if not options.COMPILE:
        return
    check_backend(options.COMPILE, "MODEL.BACKBONE.COMPILE")
    if options.CHECKPOINTING:
        raise ValueError(
            "MODEL.BACKBONE.CHECKPOINTING True and MODEL.BACKBONE.COMPILE exclude each other: "
            "the compiler decides by itself what to keep for the backward pass."
        )
    if cfg.MOKD.ENABLED and cfg.MOKD.BALANCING.MEASURE_AT == "parameters":
        raise ValueError(
            f"MODEL.BACKBONE.COMPILE '{options.COMPILE}' and MOKD.BALANCING.MEASURE_AT "
            "'parameters' exclude each other: a compiled backbone frees its graph in the first "
            "backward pass, and measuring needs several. Use MEASURE_AT 'features'."
        )


def accelerate_student(cfg: CfgNode, student: nn.Module) -> None:
    """
    Apply ``MODEL.BACKBONE.CHECKPOINTING``, ``MODEL.BACKBONE.COMPILE`` (the student then has a
    ``backbone``) and what training in bfloat16 needs. Parameters, buffers and their names stay.
    """
    if cfg.MODEL.BACKBONE.CHECKPOINTING:
        checkpoint_stages(student.get_submodule("backbone"))
    if cfg.MODEL.BACKBONE.COMPILE:
        # The function, not the module: hooks, one of which is new in every step, stay outside
        # the compiled part, and the state dict keeps its keys.
        backbone = student.get_submodule("backbone")
        backbone.forward = torch.compile(backbone.forward, backend=cfg.MODEL.BACKBONE.COMPILE)
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "bfloat16":
        pool_in_float32(student)


def checkpoint_stages(backbone: nn.Module) -> None:
    """Keep a ResNet's stage outputs only, and compute the rest again in the backward pass."""
    bottom_up = getattr(backbone, "bottom_up", backbone)
    stages = getattr(bottom_up, "stages", None)
    if not stages:
        raise ValueError(
            "MODEL.BACKBONE.CHECKPOINTING True needs a backbone with 'stages', as Detectron2's "
            f"ResNet; {type(bottom_up).__name__} has none. Set it to False."
        )
    for stage in stages:
        stage.forward = _checkpointed(stage)


def _checkpointed(stage: nn.Module) -> Callable:
    forward = stage.forward

    def run(x):
        if not torch.is_grad_enabled():
            return forward(x)
        # The second run must not count for BatchNorm's running statistics again.
        contexts = lambda: (contextlib.nullcontext(), RestoredState(stage))  # noqa: E731
        return checkpoint(forward, x, use_reentrant=False, context_fn=contexts)

    return run
