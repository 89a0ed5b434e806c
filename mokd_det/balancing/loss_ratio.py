# Copyright (c) The mokd_det authors.
"""Distillation in units of the losses' values: what a loss has left to explain is its noise."""

import torch

from .rules import BALANCERS, _agreement, _agreement_of, _capped, _positive

__all__ = ["LossRatio"]


@BALANCERS.register("loss_ratio")
class LossRatio:
    """
    The task's gradient, and each trusted distillation objective with ``ratio`` times the task's
    loss (ours; the weights are those of uncertainty weighting, Kendall et al., CVPR 2018).

    ``weight_k = ratio t_k L_task / L_k``, of the running geometric mean of the losses' ratio, with
    the trust ``t_k`` of rule "constant_dominance". If each objective is the negative logarithm of
    a likelihood with a width of its own, the likeliest width's square is the loss itself, and the
    gradients add up as ``g_i / L_i``: what is noisy counts less. A task whose labels say little in
    a batch keeps a high loss while the student comes close to its teacher, and so gives the
    teacher more of the update than gradients' norms would tell. The scale of the losses is
    irrelevant.

    A student that is its teacher already has a loss of nothing, and any weight: the weighted
    distillation is at most ``cap`` times as long as the task's gradient.
    """

    smoothing = 0.98

    def __init__(self, ratio=4.0, cap=10.0, agreement=0.1):
        """
        Args:
            ratio (float): each weighted distillation loss in units of the task's loss; > 0.
            cap (float): largest norm of the weighted distillation gradients in units of the task
                gradient's; > 0.
            agreement (float): see :class:`ConstantDominance`.
        """
        self.ratio = _positive("MOKD.BALANCING.LOSS_RATIO.RATIO", ratio)
        self.cap = _positive("MOKD.BALANCING.LOSS_RATIO.CAP", cap)
        self.agreement = _agreement(agreement)
        self.logs = None
        self.count = 0

    def weights(self, gram, losses):
        ratios = (losses[0] / losses).log()
        if self.logs is None or len(self.logs) != len(ratios):
            self.logs, self.count = torch.zeros_like(ratios), 0
        # New tensors: a step that mixed precision skips is undone by putting the old ones back.
        self.logs = self.smoothing * self.logs + (1 - self.smoothing) * ratios
        self.count += 1
        mean = (self.logs / (1 - self.smoothing**self.count)).exp()
        trust = (2 * _agreement_of(gram) / self.agreement - 1).clamp(0, 1)
        weights = torch.cat([mean.new_ones(1), self.ratio * trust * mean[1:]])
        return _capped(weights, gram, self.cap)

    def own_weights(self, gram):
        norms = gram.diagonal().sqrt()
        return norms[0] / norms

    def state_dict(self):
        return {"logs": self.logs, "count": self.count}

    def load_state_dict(self, state):
        self.logs, self.count = state["logs"], state["count"]
