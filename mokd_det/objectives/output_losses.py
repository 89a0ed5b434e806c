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


def check_weights(node: str, options: Any, needed: tuple[str, ...]) -> None:
    """
    Raise ValueError unless one of those of CLASS_WEIGHT, BOX_WEIGHT and RPN_WEIGHT that are needed
    is above zero in the config's node, and all is read that is set.
    """
    weights = {name: options[name] for name in ("CLASS_WEIGHT", "BOX_WEIGHT", "RPN_WEIGHT")}
    if not any(weights[name] for name in needed):
        given = ", ".join(f"{node}.{name} {value}" for name, value in weights.items())
        raise ValueError(f"There are {given}: expected one of {', '.join(needed)} above 0.")
    for name, usual in (("TEMPERATURE", 1), ("LOSS", "kl"), ("DKD_BETA", 1)):
        if not weights["CLASS_WEIGHT"] and options.get(name, usual) != usual:
            raise ValueError(
                f"{node}.{name} is {options[name]!r}, but it is read for classes only, and "
                f"{node}.CLASS_WEIGHT is 0: set it to {usual!r} (the default)."
            )


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """
    Kullback-Leibler divergence of the student's softmax of (R, C) logits from the teacher's, times
    the temperature squared (Hinton et al. 2015), averaged over R: a scalar, zero without rows.
    """
    ours, theirs = (F.log_softmax(x.float() / temperature, dim=1) for x in (student, teacher))
    return _mean(F.kl_div(ours, theirs, reduction="sum", log_target=True), student, temperature)


def _mean(total: Tensor, rows: Tensor, temperature: float) -> Tensor:
    # Rounding may leave less than nothing, which a high temperature makes large.
    return total.clamp_min(0) * temperature**2 / max(len(rows), 1)


def decoupled_kl(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 1.0, beta: float = 1.0
) -> Tensor:
    """
    DKD (Zhao et al., CVPR 2022, arXiv 2203.08679, Eq. 7 with alpha 1): the divergence of whether it
    is the target class, and ``beta`` times that among the other classes, unlike in
    :func:`kl_divergence` not less where the teacher is sure of the target.

    Args:
        student, teacher: (R, C) logits of softmaxes; ``targets``: (R,) classes.

    Returns:
        a scalar, times the temperature squared, averaged over R.
    """
    ours, theirs = (x.float() / temperature for x in (student, teacher))
    is_target = F.one_hot(targets, ours.shape[1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        logs = F.log_softmax(logits, dim=1)
        others = logs.masked_fill(is_target, -torch.inf).logsumexp(dim=1)
        among = logits[~is_target].view(len(logits), logits.shape[1] - 1)
        return torch.stack([logs[is_target], others], dim=1), F.log_softmax(among, dim=1)

    total: Any = sum(
        weight * F.kl_div(x, y, reduction="sum", log_target=True)
        for weight, x, y in zip((1.0, beta), parts(ours), parts(theirs))
    )
    return _mean(total, student, temperature)


def correlation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """
    DIST (Huang et al., NeurIPS 2022, arXiv 2205.10536, Eq. 8 and 9 with both factors 1) between
    (R, C) probabilities: one minus their Pearson correlation over the classes, averaged over rows,
    and one minus that over the rows, averaged over classes. A scalar in [0, 4], zero without rows.
    """
    if not len(student):
        return student.sum()
    return (1 - pearson(student, teacher, 1)).mean() + (1 - pearson(student, teacher, 0)).mean()


def pearson(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """
    Correlation of two non-negative tensors along ``dim``, zero where one does not vary. A deviation
    of less than a tenth of the mean counts as a tenth: near a constant, such as a head of zeros
    says at first, the gradient of a correlation has no bound.
    """

    def normalised(x: Tensor) -> Tensor:
        mean = x.mean(dim, keepdim=True)
        least = 0.1 * mean.abs() * x.shape[dim] ** 0.5
        size = (x - mean).square().sum(dim, keepdim=True).clamp_min(1e-30).sqrt()
        return (x - mean) / torch.maximum(size, least).clamp_min(1e-30)

    return (normalised(first) * normalised(second)).sum(dim)


CLASS_LOSSES = ("kl", "dkd", "dist")


def check_beta(node: str, options: Any) -> None:
    """Raise ValueError for a DKD_BETA of the config's node that its LOSS does not read."""
    if options.DKD_BETA != 1 and options.LOSS != "dkd":
        raise ValueError(
            f"{node}.DKD_BETA is {options.DKD_BETA}, but it is read with LOSS 'dkd' only, and LOSS "
            f"is '{options.LOSS}': set it to 1."
        )


def class_loss(
    student: BoxOutputs,
    teacher: BoxOutputs,
    temperature: float = 1.0,
    loss: str = "kl",
    dkd_beta: float = 1.0,
) -> Tensor:
    """
    Distance of the student's class probabilities from the teacher's at the same R boxes: a scalar,
    zero without boxes. Two softmaxes are compared as such, background included; else every class
    for itself, as present or absent.

    Args:
        loss: "kl" (:func:`kl_divergence`), "dkd" (:func:`decoupled_kl`; the target is the teacher's
            most probable class, as boxes have no labels; softmaxes only), or "dist"
            (:func:`correlation_loss`, times the temperature squared).
    """
    softmaxes = student.exclusive and teacher.exclusive
    if loss == "dkd":
        assert softmaxes, "[class_loss] 'dkd' is for softmaxes"
        targets = teacher.logits.argmax(dim=1)
        return decoupled_kl(student.logits, teacher.logits, targets, temperature, dkd_beta)
    if loss == "dist":
        if softmaxes:
            pair = [F.softmax(x.logits.float() / temperature, 1) for x in (student, teacher)]
        else:
            pair = [x.log_probabilities(temperature)[0].exp() for x in (student, teacher)]
        return temperature**2 * correlation_loss(*pair)
    if softmaxes:
        return kl_divergence(student.logits, teacher.logits, temperature)
    pairs = zip(*(x.log_probabilities(temperature) for x in (student, teacher)))
    total: Any = sum(F.kl_div(x, y, reduction="sum", log_target=True) for x, y in pairs)
    return _mean(total, student.logits, temperature)


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
