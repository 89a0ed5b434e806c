# Copyright (c) The mokd_det authors.
"""The objective that matches the class probabilities of two classifiers."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..teachers import PRE_LOGITS
from .base import OBJECTIVES, Objective, StudentOutputs
from .output_losses import check_temperature

if TYPE_CHECKING:
    from ..tasks import Task


@OBJECTIVES.register("logits")
class LogitObjective(Objective):
    """
    Kullback-Leibler divergence of the student's class probabilities from the teacher's, at a
    temperature and times its square (Hinton et al. 2015). The head runs a second time for it, on
    copies of features and parameters, so that the boundary can weigh what it adds to each.
    """

    tasks = ("classification",)
    compares_classes = True
    taps = (PRE_LOGITS,)

    def __init__(self, head: nn.Module, temperature: float = 1.0):
        """``head``: of the student, from features to logits, which the temperature divides."""
        super().__init__()
        # A list: a part of the student, not of this module.
        self._head = [self.borrow(_WithoutHooks(head))]
        self.temperature = temperature

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        check_temperature("MOKD.LOGITS.TEMPERATURE", cfg.MOKD.LOGITS.TEMPERATURE)

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
        return cls(student.head, cfg.MOKD.LOGITS.TEMPERATURE)

    def forward(self, student: StudentOutputs, teacher: Any) -> dict[str, Tensor]:
        """Return ``loss_logits``, a scalar, averaged over images."""
        given = student.features[PRE_LOGITS]
        # The task's run follows, with the same dropout.
        devices = [given.device] if given.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            logits = student.run(self._head[0], given).flatten(1)
        ours = F.log_softmax(logits.float() / self.temperature, dim=1)
        theirs = F.log_softmax(teacher.logits.float() / self.temperature, dim=1)
        loss = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return {"loss_logits": loss * self.temperature**2}


class _WithoutHooks(nn.Module):
    """Runs a module without its own hooks: the second run is not to be tapped."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.forward(x.clone())  # it may work in place
