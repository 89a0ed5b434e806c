# Copyright (c) The mokd_det authors.
"""Starting parts of the student from the teacher's weights."""

import logging

import torch

__all__ = ["copy_weights", "inheritable_names"]

logger = logging.getLogger(__name__)


def inheritable_names(student, teacher, prefixes):
    """
    Args:
        student, teacher (nn.Module):
        prefixes (sequence[str]): of names in the state dict, e.g. "backbone.fpn_".

    Returns:
        list[str]: parameters and buffers of the student with such a name for which the teacher
        has one of the same name and shape. They are logged, and so is what does not fit.

    Raises:
        ValueError: nothing of a prefix fits.
    """
    source, target = teacher.state_dict(), student.state_dict()
    inherited = []
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
        logger.info(f"Inherited from the teacher: {', '.join(fits)}")
        if rest:
            logger.info(f"Not inherited: {', '.join(rest)}")
        inherited += [name for name in fits if name not in inherited]
    return inherited


@torch.no_grad()
def copy_weights(source, target, names):
    """Copy parameters and buffers by name from one module to another."""
    source, target = source.state_dict(), target.state_dict()
    for name in names:
        target[name].copy_(source[name])
