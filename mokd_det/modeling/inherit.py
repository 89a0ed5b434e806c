# Copyright (c) The mokd_det authors.
"""Starting parts of the student from the teacher's weights."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

logger = logging.getLogger(__name__)


def inheritable_names(student: nn.Module, teacher: nn.Module, prefixes: Sequence[str]) -> list[str]:
    """
    Return the student's parameters and buffers whose names start with one of ``prefixes``
    ("backbone.fpn_") and for which the teacher has one of the same name and shape; log the rest.
    ValueError: nothing of a prefix fits, or it has the layer that sees the images, and those are
    normalised in different ways.
    """
    source, target = teacher.state_dict(), student.state_dict()
    inherited: list[str] = []
    for prefix in prefixes:
        wanted = {n: tuple(value.shape) for n, value in target.items() if n.startswith(prefix)}
        theirs = {n: f" {tuple(source[n].shape)}" if n in source else ": none" for n in wanted}
        fits = [n for n, shape in wanted.items() if n in source and source[n].shape == shape]
        rest = [f"{n} {wanted[n]} (teacher{theirs[n]})" for n in wanted if n not in fits]
        if not fits:
            raise ValueError(
                f"MOKD.INHERIT has '{prefix}', of which nothing fits the teacher: "
                + (", ".join(rest[:5]) or "the student has no such name")
                + ". Remove it, or give both sides the same shapes."
            )
        first = [n for n in fits if len(wanted[n]) == 4 and wanted[n][1] == 3]
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
    formats, means, stds = (
        [getattr(model, key, None) for model in (student, teacher)]
        for key in ("input_format", "pixel_mean", "pixel_std")
    )
    equal = (a is None or b is None or torch.equal(a, b) for a, b in (means, stds))
    return len({*formats} - {None}) < 2 and all(equal)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module, names: Sequence[str]) -> None:
    """Copy parameters and buffers by name from one module to another."""
    given, taken = source.state_dict(), target.state_dict()
    for name in names:
        taken[name].copy_(given[name])
