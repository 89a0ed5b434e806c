# Copyright (c) The mokd_det authors.
"""Amortised balancing: weights learned from how much each loss fell in the last step."""

import copy
from typing import Any

import torch
from torch import Tensor

from ..running import LOSS_FLOOR
from .base import RULES, Rule, positive


@RULES.register("famo")
class Famo(Rule):
    """
    FAMO (Liu et al., NeurIPS 2023, Algorithm 1), which DTO-KD's experiments use.

    Shares ``pi = softmax(xi)`` give the weights ``(pi_i / L_i) / c`` with ``c = sum_j pi_j / L_j``.
    After the model's step xi follows, by Adam, the gradient of the smallest relative improvement of
    the same batch's losses: an objective that fell less than the others gets more.
    """

    reads_gradients = False  # so a vanishing one is no special case
    takes_vanishing_gradients = True
    needs_second_forward = True
    needs_positive_losses = True

    def __init__(self, lr: float = 0.025, weight_decay: float = 0.01):
        """Both are of xi; weight decay draws the shares to each other."""
        if not 0 <= weight_decay < float("inf"):
            raise ValueError(
                f"MOKD.BALANCING.FAMO.WEIGHT_DECAY is {weight_decay}: expected a number >= 0."
            )
        self.lr = positive("MOKD.BALANCING.FAMO.LR", lr)
        self.weight_decay = weight_decay
        self.xi: Tensor | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def _start(self, shares: Tensor) -> Tensor:
        self.xi = shares.to("cpu", torch.float64, copy=True).requires_grad_()
        self.optimizer = torch.optim.Adam([self.xi], lr=self.lr, weight_decay=self.weight_decay)
        return self.xi

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        xi = self._start(torch.zeros_like(losses)) if self.xi is None else self.xi
        raw = torch.softmax(xi.detach(), 0) / losses
        return raw / raw.sum()

    def update(self, before: Tensor, after: Tensor) -> None:
        if self.xi is None or self.optimizer is None:  # nothing weighed yet: a first step failed
            return
        if not (before.isfinite().all() and after.isfinite().all()):
            return
        change = before.clamp_min(LOSS_FLOOR).log() - after.clamp_min(LOSS_FLOOR).log()
        # The chain rule through the softmax: xi falls along J^T change.
        with torch.enable_grad():
            shares = torch.softmax(self.xi, 0)
        self.xi.grad = torch.autograd.grad(shares, self.xi, change.to(self.xi))[0]
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        if self.xi is None or self.optimizer is None:
            return {}
        # Adam works in place, and its state dict holds its own tensors.
        return copy.deepcopy({"xi": self.xi.detach(), "optimizer": self.optimizer.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            self.xi = self.optimizer = None
            return
        self._start(state["xi"])
        assert self.optimizer is not None
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        for group in self.optimizer.param_groups:  # these are the config's
            group.update(lr=self.lr, weight_decay=self.weight_decay)
