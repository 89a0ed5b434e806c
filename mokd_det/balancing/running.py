# Copyright (c) The mokd_det authors.
"""Running means of what a rule sees. Their state changes by plain assignment only: see Balancer."""

from typing import Any

import torch
from torch import Tensor

from .gram import vanishing

# The log of a loss needs a floor: a student that matches its teacher has a loss of zero.
LOSS_FLOOR = 1e-12


class _RunningRatios:
    """
    A running geometric mean of positive numbers in units of the first of them, with weights that
    fall by ``smoothing`` in [0, 1) a step, corrected for the start, as Adam's.

    Attributes:
        first: (K,) the first step's ratios.
        logs: (K,) mean logarithm of the ratios in units of ``first``: factors of two between
            objectives do not even change the rounding.
        count: steps in the mean; a value may stand for several.
    """

    state: tuple[str, ...] = ("first", "logs", "count")

    def __init__(self, smoothing: float):
        self.smoothing = smoothing
        self.first: Tensor | None = None
        self.logs: Tensor | None = None
        self.count = 0

    def _add(self, ratios: Tensor, steps: int) -> None:
        if self.first is None or self.logs is None:
            self.first, self.logs = ratios, torch.zeros_like(ratios)
        # New tensors: a step that mixed precision skips is undone by putting the old ones back.
        kept = self.smoothing**steps
        self.logs = kept * self.logs + (1 - kept) * (ratios / self.first).log()
        self.count += steps

    def _times_mean(self, unit: Tensor) -> Tensor:
        assert self.first is not None and self.logs is not None, "[RunningGram] no step yet"
        return unit * self.first * (self.logs / (1 - self.smoothing**self.count)).exp()

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class RunningGram(_RunningRatios):
    """
    A running mean of Gram matrices in which no single batch weighs much (ours): the geometric mean
    of the gradients' norms in units of the first one's, and the arithmetic mean of the (K, K)
    ``cosines``. These start from orthogonal gradients, uncorrected: agreement has to be shown by
    many batches, and the first ones may show it by chance.

    A plain mean of the matrices is one of squared norms: after one batch with a task gradient ten
    times as long, the distillation would look short for many steps and get weights on which
    training can diverge. A step in which a gradient vanishes is not averaged; it sees the mean
    without that gradient.
    """

    state = ("first", "logs", "cosines", "count")

    def __init__(self, smoothing: float):
        super().__init__(smoothing)
        self.cosines: Tensor | None = None

    def update(self, gram: Tensor, steps: int = 1) -> Tensor:
        """
        Take in a (K, K) that stands for so many steps; return the mean, whose first gradient has
        this one's norm.
        """
        norms = gram.diagonal().sqrt()
        if self.cosines is None:
            self.cosines = torch.eye(len(gram)).to(gram)
        vanished = vanishing(gram)
        if not vanished.any():
            kept = self.smoothing**steps
            self.cosines = kept * self.cosines + (1 - kept) * gram / torch.outer(norms, norms)
            self._add(norms / norms[0], steps)
        sizes = norms if self.first is None else self._times_mean(norms[0])
        sizes = torch.where(vanished, torch.zeros_like(sizes), sizes)
        return self.cosines * torch.outer(sizes, sizes)


class RunningLosses(_RunningRatios):
    """
    The running geometric mean of the losses in units of the task's (ours). A step in which a loss
    is not positive is not averaged: the logarithm of nothing would decide for many steps.
    """

    def update(self, losses: Tensor, steps: int = 1) -> Tensor:
        """
        Take in (K,), the task first, that stand for so many steps; return the mean, with this
        task's loss.
        """
        if (losses > LOSS_FLOOR).all():
            self._add(losses / losses[0], steps)
        return losses if self.first is None else self._times_mean(losses[0])
