# Copyright (c) The mokd_det authors.
"""Losses between two detectors' outputs at the same places. The teacher's carry no gradient."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from ..readers import AnchorOutputs, BoxOutputs

# Of Faster R-CNN (Ren et al. 2015). With none, as in Detectron2, the gradient of a student that has
# matched its teacher would not fade, but jump from sign to sign.
RPN_BETA = 1 / 9


def check_temperature(option: str, temperature: float) -> None:
    """Raise ValueError unless an option's temperature is above zero."""
    if not temperature > 0:
        raise ValueError(f"{option} is {temperature}: expected > 0.")


def class_loss(student: BoxOutputs, teacher: BoxOutputs, temperature: float = 1.0) -> Tensor:
    """
    Kullback-Leibler divergence of the student's class probabilities from the teacher's at the same
    R boxes, times the temperature squared (Hinton et al. 2015), averaged over boxes: a scalar, zero
    without boxes. Two softmaxes are compared as such, background included; else every class for
    itself, as present or absent.
    """
    if student.exclusive and teacher.exclusive:
        pairs = [[F.log_softmax(x.logits.float() / temperature, 1)] for x in (student, teacher)]
    else:
        pairs = [[*x.log_probabilities(temperature)] for x in (student, teacher)]
    total: Any = sum(
        F.kl_div(ours, theirs, reduction="sum", log_target=True) for ours, theirs in zip(*pairs)
    )
    return total * temperature**2 / max(len(student.logits), 1)


def box_loss(student: BoxOutputs, teacher: BoxOutputs) -> Tensor:
    """
    Generalised IoU loss (Rezatofighi et al. 2019) between the refined boxes of both for the
    teacher's most probable class, weighted by that probability (where the teacher sees background
    its box means nothing): the weighted sum over the number of all boxes, as Fast R-CNN's own box
    loss; zero without boxes.
    """
    confidence, classes = teacher.confidence()
    ours, theirs = (x.boxes_of(classes).float() for x in (student, teacher))
    losses = generalized_box_iou_loss(ours, theirs)
    return (confidence * losses).sum() / max(len(losses), 1)


def rpn_losses(student: AnchorOutputs, teacher: AnchorOutputs) -> tuple[Tensor, Tensor]:
    """
    Divergence of the student's objectness from the teacher's at each anchor, and smooth L1 loss of
    the deltas weighted by the teacher's objectness: two scalars (after Chen et al. 2017, "Learning
    Efficient Object Detection Models with Knowledge Distillation").

    Of an image's thousands of anchors nearly all are background to both sides. So both sums over
    them are divided by, and the first is weighted with, the objectness of the side that is surer
    of an object; by one at least, so that an image without objects counts little. The mean over
    images is that of as many processes with an image each.
    """
    logits, deltas = student.flat()
    targets, target_deltas = teacher.flat()
    objectness = targets.sigmoid()
    # The gradient through a weight would teach the student to be unsure.
    weights = torch.maximum(objectness, logits.detach().sigmoid())
    cross_entropy, entropy = (
        F.binary_cross_entropy_with_logits(x, objectness, reduction="none")
        for x in (logits, targets)
    )
    divergence = weights * (cross_entropy - entropy)
    distance = F.smooth_l1_loss(deltas, target_deltas, reduction="none", beta=RPN_BETA)
    total = weights.sum(dim=1).clamp_min(1.0)
    first, second = (
        (x.sum(dim=1) / total).mean() for x in (divergence, objectness * distance.sum(dim=2))
    )
    return first, second
