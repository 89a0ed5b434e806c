# Copyright (c) The mokd_det authors.
"""Fixed weights, without what conflicts with the task."""

from torch import Tensor

from .base import RULES
from .fixed import FixedWeights


@RULES.register("cosine_gate")
class CosineGate(FixedWeights):
    """
    Fixed weights, but a distillation objective whose gradient conflicts with the task's (negative
    cosine) gets none in that step (Du et al. 2018, arXiv 1812.02224).
    """

    reads_gradients = True
    interval = 1

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        weights = super().weights(gram, losses)
        weights[1:] *= (gram[0, 1:] >= 0).to(weights)
        return weights
