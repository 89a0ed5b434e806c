# Copyright (c) The mokd_det authors.
"""Starting parts of the student from the teacher's weights."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

logger = logging.getLogger(__name__)


def inheritable_names(student: nn.Module, teacher: nn.Module, prefixes: Sequence[str]) -> list[str]:
    """
    Args:
        student, teacher: both sides.
        prefixes: of names in the state dict, e.g. "backbone.fpn_".

    Returns:
        Parameters and buffers of the student with such a name for which the teacher has one of the
        same name and shape. They are logged, and so is what does not fit.

    Raises:
        ValueError: nothing of a prefix fits, or it has the layer that sees the images, and those
            are normalised in different ways.
    """
    source, target = teacher.state_dict(), student.state_dict()
    inherited: list[str] = []
    for prefix in prefixes:
        wanted = [name for name in target if name.startswith(prefix)]
        fits = [n for n in wanted if n in source and source[n].shape == target[n].shape]
        rest = [
            f"{n} {tuple(target[n].shape)} "
            + (f"(teacher {tuple(source[n].shape)})" if n in source else "(teacher: none)")
            for n in wanted
            if n not in fits
        ]
        if not fits:
            raise ValueError(
                f"MOKD.INHERIT has '{prefix}', of which nothing fits the teacher: "
                + (", ".join(rest[:5]) or "the student has no such name")
                + ". Remove it, or give both sides the same shapes."
            )
        first = [n for n in fits if target[n].dim() == 4 and target[n].shape[1] == 3]
        if first and not _same_input(student, teacher):
            raise ValueError(
                f"MOKD.INHERIT has '{prefix}', and with it '{first[0]}', which sees the images: "
                "student and teacher have other channel orders or normalisation. Give both the "
                "same INPUT.FORMAT, MODEL.PIXEL_MEAN and PIXEL_STD, or leave that part out."
            )
        logger.info(f"Inherited from the teacher: {', '.join(fits)}")
        if rest:
            logger.info(f"Not inherited: {', '.join(rest)}")
        inherited += [name for name in fits if name not in inherited]
    return inherited


def _same_input(student: nn.Module, teacher: nn.Module) -> bool:
    # Where a model does not say what it sees, nothing can be compared.
    formats = {getattr(model, "input_format", None) for model in (student, teacher)} - {None}
    means = [getattr(model, "pixel_mean", None) for model in (student, teacher)]
    stds = [getattr(model, "pixel_std", None) for model in (student, teacher)]
    return len(formats) < 2 and all(
        a is None or b is None or torch.equal(a, b) for a, b in (means, stds)
    )


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module, names: Sequence[str]) -> None:
    """Copy parameters and buffers by name from one module to another."""
    given, taken = source.state_dict(), target.state_dict()
    for name in names:
        taken[name].copy_(given[name])
