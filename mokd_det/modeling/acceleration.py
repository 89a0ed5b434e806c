# Copyright (c) The mokd_det authors.
"""Less memory or time for the student's training, without a trace in the trained model."""

import contextlib

import torch
from detectron2.modeling.poolers import ROIPooler
from torch.utils.checkpoint import checkpoint

from .state import RestoredState

__all__ = ["accelerate_student", "check_acceleration", "check_backend", "pool_in_float32"]


def check_acceleration(cfg):
    """
    Raises:
        ValueError: options of ``MODEL.BACKBONE`` that do not work together.
    """
    options = cfg.MODEL.BACKBONE
    if cfg.MODEL.META_ARCHITECTURE == "Classifier" and (options.CHECKPOINTING or options.COMPILE):
        raise ValueError(
            "MODEL.BACKBONE.CHECKPOINTING and MODEL.BACKBONE.COMPILE are for detectors: features "
            "of a classifier are read inside its network. Set them to False and ''."
        )
    if not options.COMPILE:
        return
    check_backend(options.COMPILE, "MODEL.BACKBONE.COMPILE")
    if options.CHECKPOINTING:
        raise ValueError(
            "MODEL.BACKBONE.CHECKPOINTING True and MODEL.BACKBONE.COMPILE exclude each other: "
            "the compiler decides by itself what to keep for the backward pass."
        )
    if cfg.MOKD.ENABLED and cfg.MOKD.BALANCING.PLACE == "parameters":
        raise ValueError(
            f"MODEL.BACKBONE.COMPILE '{options.COMPILE}' and MOKD.BALANCING.PLACE 'parameters' "
            "exclude each other: a compiled backbone frees its graph in the first backward pass, "
            "and this place needs several. Use PLACE 'features'."
        )


def check_backend(backend, option):
    """Raise ValueError unless torch.compile has this backend."""
    if backend not in (known := torch._dynamo.list_backends(exclude_tags=())):
        raise ValueError(
            f"{option} is '{backend}': expected '' (off) or a backend of torch.compile: "
            f"{', '.join(known)}."
        )


def accelerate_student(cfg, student):
    """
    Apply ``MODEL.BACKBONE.CHECKPOINTING``, ``MODEL.BACKBONE.COMPILE`` and what training in
    bfloat16 needs. Parameters, buffers and their names stay as they are.

    Args:
        cfg (CfgNode):
        student (nn.Module): with ``backbone``.
    """
    if cfg.MODEL.BACKBONE.CHECKPOINTING:
        checkpoint_stages(student.backbone)
    if cfg.MODEL.BACKBONE.COMPILE:
        # The function, not the module: its hooks, one of which is new in every step, stay
        # outside the compiled part, and keys of the state dict keep their names.
        student.backbone.forward = torch.compile(
            student.backbone.forward, backend=cfg.MODEL.BACKBONE.COMPILE
        )
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "bfloat16":
        pool_in_float32(student)


def checkpoint_stages(backbone):
    """
    Keep only the outputs of a ResNet's stages in the forward pass, and compute the rest again in
    the backward pass.

    Raises:
        ValueError: a backbone without stages.
    """
    bottom_up = getattr(backbone, "bottom_up", backbone)
    stages = getattr(bottom_up, "stages", None)
    if not stages:
        raise ValueError(
            f"MODEL.BACKBONE.CHECKPOINTING True needs a backbone with 'stages', as Detectron2's "
            f"ResNet; {type(bottom_up).__name__} has none. Set it to False."
        )
    for stage in stages:
        stage.forward = _checkpointed(stage)


def _checkpointed(stage):
    forward = stage.forward

    def run(x):
        if not torch.is_grad_enabled():
            return forward(x)
        # The second run must not count for BatchNorm's running statistics again.
        contexts = lambda: (contextlib.nullcontext(), RestoredState(stage))  # noqa: E731
        return checkpoint(forward, x, use_reentrant=False, context_fn=contexts)

    return run


def pool_in_float32(model):
    """
    RoI features from float32 maps. Detectron2 converts boxes to the maps' type, and bfloat16
    has steps of 1 pixel from 128 on and of 4 from 512 on; the CPU operator has no bfloat16.
    """
    for module in model.modules():
        if isinstance(module, ROIPooler):
            module.register_forward_pre_hook(
                lambda _module, inputs: ([x.float() for x in inputs[0]], *inputs[1:])
            )
