# Copyright (c) The mokd_det authors.
"""The same weights at every step: what every other toolkit does."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import RULES, Rule


@RULES.register("fixed")
class FixedWeights(Rule):
    """The weighted sum of the losses."""

    reads_gradients = False
    interval = 10  # for the logs only
    takes_vanishing_gradients = True

    def __init__(self, weights: Sequence[float] = ()):
        """``weights``: of the task and of each distillation objective. Empty: 1 for each."""
        self._option = f"MOKD.BALANCING.{self.name.upper()}.WEIGHTS"
        if any(not 0 <= w < float("inf") for w in weights) or (len(weights) and not any(weights)):
            raise ValueError(
                f"{self._option} is {list(weights)}: expected finite weights >= 0, not all zero."
            )
        self.fixed = torch.tensor(weights, dtype=torch.float64)

    def check_objectives(self, count: int) -> None:
        if len(self.fixed) not in (0, count):
            raise ValueError(
                f"{self._option} has {len(self.fixed)} entries for {count} objectives: give one "
                "for the task and one for each of MOKD.OBJECTIVES, in that order."
            )

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        self.check_objectives(len(gram))
        return self.fixed.clone() if len(self.fixed) else torch.ones_like(losses)
