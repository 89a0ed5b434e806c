# Copyright (c) The mokd_det authors.
"""The objective that matches the class probabilities of two classifiers."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..teachers import PRE_LOGITS
from .base import OBJECTIVES, Objective, StudentOutputs
from .output_losses import check_beta, correlation_loss, decoupled_kl, kl_divergence

if TYPE_CHECKING:
    from ..tasks import Task


@OBJECTIVES.register("logits")
class LogitObjective(Objective):
    """
    Distance of the student's class probabilities from the teacher's, at a temperature and times its
    square: Kullback-Leibler divergence (Hinton et al. 2015), DKD or DIST. The head, a layer or two,
    runs a second time for it, on copies of features and parameters, so that the boundary can weigh
    what it adds to each.
    """

    tasks = ("classification",)
    compares_classes = True
    taps = (PRE_LOGITS,)

    def __init__(
        self, head: nn.Module, temperature: float = 1.0, loss: str = "kl", dkd_beta: float = 1.0
    ):
        """
        ``head``: of the student, from features to logits, which the temperature divides; for the
        rest see ``MOKD.LOGITS``.
        """
        super().__init__()
        # A list: a part of the student, not of this module.
        self._head = [self.borrow(_WithoutHooks(head))]
        self.temperature, self.loss, self.dkd_beta = temperature, loss, dkd_beta

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        check_beta("MOKD.LOGITS", cfg.MOKD.LOGITS)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, task: "Task", student: Any, teacher: Any
    ) -> "LogitObjective":
        if student.num_classes != teacher.model.num_classes:
            raise ValueError(
                f"MOKD.OBJECTIVES has 'logits', but the student has {student.num_classes} classes "
                f"and the teacher {teacher.model.num_classes}, so they cannot be compared. Set "
                "MODEL.CLASSIFIER.NUM_CLASSES to the same number, or distil features only "
                "(MOKD.OBJECTIVES ['features'])."
            )
        options = cfg.MOKD.LOGITS
        if options.LOSS == "dkd" and student.num_classes < 2:
            raise ValueError(
                "MOKD.LOGITS.LOSS is 'dkd', which compares the classes besides the target, and "
                "there is one class only: use 'kl'."
            )
        return cls(student.head, options.TEMPERATURE, options.LOSS, options.DKD_BETA)

    def forward(self, student: StudentOutputs, teacher: Any) -> dict[str, Tensor]:
        """Return ``loss_logits``, a scalar, averaged over images."""
        given = student.features[PRE_LOGITS]
        # The task's run follows, with the same dropout.
        devices = [given.device] if given.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            logits = student.run(self._head[0], given).flatten(1)
        return {"loss_logits": self._distance(logits, teacher.logits, student.batch)}

    def _distance(self, ours: Tensor, theirs: Tensor, batch: Any) -> Tensor:
        if self.loss == "dist":
            pair = [F.softmax(x.float() / self.temperature, dim=1) for x in (ours, theirs)]
            return self.temperature**2 * correlation_loss(*pair)
        if self.loss == "dkd":
            targets = batch.targets.to(ours.device)
            if targets.ndim == 2:  # mixed images: the class with the larger share
                targets = targets.argmax(dim=1)
            return decoupled_kl(ours, theirs, targets, self.temperature, self.dkd_beta)
        return kl_divergence(ours, theirs, self.temperature)


class _WithoutHooks(nn.Module):
    """Runs a module without its own hooks: the second run is not to be tapped."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.forward(x.clone())  # it may work in place
