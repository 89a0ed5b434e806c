# Copyright (c) The mokd_det authors.
"""Losses between two projected feature maps, and the alignment of maps of different resolution."""

import math

import torch.nn.functional as F
from torch import Tensor

from ..registry import Registry

FEATURE_LOSSES = Registry("FEATURE_LOSSES", "MOKD.FEATURES.LOSS")
"""
Functions of two (N, n, H, W) tensors, student and teacher, and optionally of (N, 1, H, W) weights
of the positions with mean one, that return a scalar.
"""


@FEATURE_LOSSES.register("smooth_l1")
def smooth_l1(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean smooth-L1 (Huber with delta 1) over all elements."""
    if weights is None:
        return F.smooth_l1_loss(student, teacher)
    return (F.smooth_l1_loss(student, teacher, reduction="none") * weights).mean()


@FEATURE_LOSSES.register("mse")
def mse(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error over all elements."""
    if weights is None:
        return F.mse_loss(student, teacher)
    return (F.mse_loss(student, teacher, reduction="none") * weights).mean()


@FEATURE_LOSSES.register("cosine")
def cosine(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """One minus the cosine between the two vectors of each position, averaged: in [0, 2]."""
    similarity = F.cosine_similarity(student, teacher, dim=1)
    if weights is None:
        return 1 - similarity.mean()
    return ((1 - similarity) * weights[:, 0]).mean()


def align_resolution(
    student: Tensor, teacher: Tensor, student_stride: int, teacher_stride: int
) -> tuple[Tensor, Tensor]:
    """
    Bring the teacher's map (N, C_t, H_t, W_t) onto the grid of the student's (N, C_s, H_s, W_s);
    strides are in pixels of the input. Both start at the image's upper left corner; what only one
    covers, because the two models pad differently, is cut. With equal strides that is all; else
    the teacher is averaged to the coarser grid, or interpolated to the finer one.
    """
    if student_stride == teacher_stride:
        height, width = map(min, student.shape[-2:], teacher.shape[-2:])
        return student[..., :height, :width], teacher[..., :height, :width]
    # The part that both cover, in whole cells of both.
    cell = math.lcm(student_stride, teacher_stride)
    extent = [
        min(student.shape[d] * student_stride, teacher.shape[d] * teacher_stride) // cell * cell
        for d in (-2, -1)
    ]
    if min(extent) == 0:
        raise ValueError(
            f"Feature maps of {tuple(student.shape[-2:])} at stride {student_stride} and "
            f"{tuple(teacher.shape[-2:])} at stride {teacher_stride} share no cell of {cell} "
            "pixels: use larger images, or leave this level out of MOKD.FEATURES.STUDENT."
        )
    student = student[..., : extent[0] // student_stride, : extent[1] // student_stride]
    teacher = teacher[..., : extent[0] // teacher_stride, : extent[1] // teacher_stride]
    size = (student.shape[-2], student.shape[-1])
    if teacher_stride < student_stride:
        teacher = F.adaptive_avg_pool2d(teacher, size)
    else:
        teacher = F.interpolate(teacher, size=size, mode="bilinear", align_corners=False)
    return student, teacher
