# Copyright (c) The mokd_det authors.
"""Losses between two projected feature maps, and the alignment of maps of different resolution."""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..registry import Registry
from .projector import standardise

FEATURE_LOSSES = Registry("FEATURE_LOSSES", "MOKD.FEATURES.LOSS")
"""
Functions of two (N, n, H, W) tensors, student and teacher, that return a scalar. One that has an
argument ``weights`` is given (N, 1, H, W) weights of the positions (see :mod:`.foreground`) if
there is a foreground; if it has no default, there must be one. One that has an argument
``temperature`` is given ``MOKD.FEATURES.TEMPERATURE``.
"""

FGD_TEMPERATURE = 0.5  # of the paper, as is the ratio of its gamma to alpha + beta
FGD_ATTENTION_WEIGHT = 2 / 3


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


@FEATURE_LOSSES.register("squared_sum")
def squared_sum(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared error, summed over channels and positions, averaged over images."""
    squares = (student.float() - teacher).square()  # in half precision a sum would be infinite
    return (squares if weights is None else squares * weights).sum() / len(student)


@FEATURE_LOSSES.register("pkd")
def pkd(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """
    Half the mean squared error of both sides after each channel is standardised over the batch: one
    minus their Pearson correlation, averaged over channels, in [0, 2] (PKD, Cao et al., NeurIPS
    2022, arXiv 2207.02039, Eq. 2 and 3).
    """
    return mse(standardise(student), standardise(teacher), weights) / 2


@FEATURE_LOSSES.register("cwd")
def cwd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """
    Where each channel looks: Kullback-Leibler divergence between both sides' softmax over the
    positions, times the temperature squared, averaged over channels and images (CWD, Shu et al.,
    ICCV 2021, arXiv 2011.13256, Eq. 4 and 5).
    """
    ours, theirs = (
        F.log_softmax(x.float().flatten(2).flatten(0, 1) / temperature, dim=1)
        for x in (student, teacher)
    )
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


@FEATURE_LOSSES.register("fgd")
def fgd(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """
    Squared error, weighted by the teacher's attention to positions and channels and by the
    foreground, summed and averaged over images; and the L1 distance of both sides' attentions (FGD,
    Yang et al., CVPR 2022, arXiv 2111.11837, Eq. 3 to 9). Its relation among all positions
    (Eq. 10, of about a two-hundredth of the weight) is not computed.
    """
    ours, theirs = _attentions(student.float()), _attentions(teacher.float())
    squares = (student.float() - teacher).square() * theirs[0] * theirs[1] * weights
    distance: Any = sum((x - y).abs().sum() for x, y in zip(ours, theirs))
    return (squares.sum() + FGD_ATTENTION_WEIGHT * distance) / len(student)


def _attentions(features: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 1, H, W) of positions and (N, C, 1, 1) of channels, with mean one for each image."""
    size = features.abs()
    positions, channels = size.mean(1).flatten(1), size.mean((2, 3))
    first, second = (
        x.shape[1] * F.softmax(x / FGD_TEMPERATURE, dim=1) for x in (positions, channels)
    )
    return first.view(len(size), 1, *size.shape[2:]), second[:, :, None, None]


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
    student, teacher = _common_cells(student, teacher, student_stride, teacher_stride)
    size = (student.shape[-2], student.shape[-1])
    if teacher_stride < student_stride:
        teacher = F.adaptive_avg_pool2d(teacher, size)
    else:
        teacher = F.interpolate(teacher, size=size, mode="bilinear", align_corners=False)
    return student, teacher


def onto_grid(
    student: Tensor, teacher: Tensor, student_stride: int, teacher_stride: int
) -> tuple[Tensor, Tensor]:
    """
    Bring the student's map onto the grid of the teacher's, as :func:`align_resolution` does the
    other way round. With equal strides both stay: they start at the same corner.
    """
    if student_stride == teacher_stride:
        return student, teacher
    part, of_teacher = _common_cells(student, teacher, student_stride, teacher_stride)
    size = (of_teacher.shape[-2], of_teacher.shape[-1])
    if student_stride < teacher_stride:
        return F.adaptive_avg_pool2d(part, size), teacher
    return F.interpolate(part, size=size, mode="bilinear", align_corners=False), teacher


def _common_cells(
    student: Tensor, teacher: Tensor, student_stride: int, teacher_stride: int
) -> tuple[Tensor, Tensor]:
    """The part that both maps cover, in whole cells of both."""
    cell = math.lcm(student_stride, teacher_stride)
    extent = [
        min(student.shape[d] * student_stride, teacher.shape[d] * teacher_stride) // cell * cell
        for d in (-2, -1)
    ]
    if min(extent) == 0:
        raise ValueError(
            f"Feature maps of {tuple(student.shape[-2:])} at stride {student_stride} and "
            f"{tuple(teacher.shape[-2:])} at stride {teacher_stride} share no cell of {cell} "
            "pixels: use larger images, or leave this level out of the level map (STUDENT)."
        )
    return (
        student[..., : extent[0] // student_stride, : extent[1] // student_stride],
        teacher[..., : extent[0] // teacher_stride, : extent[1] // teacher_stride],
    )
