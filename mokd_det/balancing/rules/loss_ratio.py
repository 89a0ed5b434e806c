# Copyright (c) The mokd_det authors.
"""The default: each trusted distillation loss at a set multiple of the task's."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import RULES, Rule, positive


@RULES.register("loss_ratio")
class LossRatio(Rule):
    """
    ``weight_task = 1`` and ``weight_k = ratio * trust_k * L_task / L_k`` (ours, after uncertainty
    weighting, Kendall et al., CVPR 2018, arXiv 1705.07115). The update is then
    ``L_task (grad log L_task + ratio sum_k trust_k grad log L_k)``: the scale of a loss is
    irrelevant.

    ``trust_k`` rises from 0 at a cosine of ``agreement / 2`` with the task's gradient to 1 at
    ``agreement``; of feature maps, on its support (:func:`.gram.outside_support`). All inputs are
    running means, so no single batch decides. The schedule rises: early, a step as long as
    ``1 + ratio`` task gradients is too long for a learning rate that was tuned without a teacher.

    Projectors learn at the task's pace, ``|g_task| / |g_k|``, trusted or not: randomly projected
    features agree with nothing, so one that learned with its weight would never get any.
    """

    smoothing = 0.98
    interval = 10
    averages_losses = True
    reads_support = True
    schedule = (0.2, 1.8)
    needs_positive_losses = True
    weighs_projectors = True

    def __init__(
        self,
        ratio: float = 4.0,
        cap: float = 10.0,
        agreement: float = 0.1,
        together: Sequence[int] = (),
        trusted: Sequence[int] = (),
    ):
        """
        Args:
            ratio: each weighted distillation loss over the task's, in the middle of the schedule.
            cap: largest norm of the weighted distillation gradients over the task gradient's,
                before the schedule. It bounds the weight of a loss near zero.
            agreement: cosine from which on a gradient is trusted in full, in [0, 1]. 0: all are.
            together: rows of the Gram matrix (from 1 on) that are trusted as the most trusted of
                them is. For objectives that say what one teacher's heads say, of which some hardly
                agree at feature maps even if they help.
            trusted: rows that are trusted in full.
        """
        self.ratio = positive("MOKD.BALANCING.LOSS_RATIO.RATIO", ratio)
        self.cap = positive("MOKD.BALANCING.LOSS_RATIO.CAP", cap)
        if not 0 <= agreement <= 1:
            raise ValueError(
                f"MOKD.BALANCING.LOSS_RATIO.AGREEMENT is {agreement}: expected 0 (off) to 1."
            )
        self.agreement, self.together, self.trusted = agreement, tuple(together), tuple(trusted)

    def among(self, rows: Sequence[int]) -> "LossRatio":
        new = copy.copy(self)
        new.together = tuple(rows.index(i) for i in self.together if i in rows)
        new.trusted = tuple(rows.index(i) for i in self.trusted if i in rows)
        return new

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        norms = gram.diagonal().sqrt()
        trust = losses.new_ones(len(losses) - 1)
        if self.agreement:
            cosines = (gram[0, 1:] / norms[1:] / norms[0]).clamp(0, 1)
            trust = (2 * cosines / self.agreement - 1).clamp(0, 1)
        trust[[i - 1 for i in self.trusted]] = 1.0
        if group := [i - 1 for i in self.together]:
            trust[group] = trust[group].max()
        distillation = self.ratio * trust * losses[0] / losses[1:]
        norm = torch.sqrt((distillation @ gram[1:, 1:] @ distillation).clamp_min(0) / gram[0, 0])
        if norm > self.cap:
            distillation = distillation * (self.cap / norm)
        return torch.cat([losses.new_ones(1), distillation])

    def projector_weights(self, gram: Tensor) -> Tensor:
        norms = gram.diagonal().sqrt()
        return norms[0] / norms
