# Copyright (c) The mokd_det authors.
"""
A step whose weights are known before it begins: one weighted sum, one ordinary backward pass.

It gives every parameter the gradient that a boundary with these weights would, and no objective
needs features or parameters of its own. So what two of them compute from the same tensors may be
computed once.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .balancer import Decision
from .branches import Branch, Parameters


class WeightedSum:
    """
    The task's loss has factor one, as its heads' gradients have, and its weight at the features.
    Another objective's loss has its weight, and what only it uses has the rest of
    ``Decision.projector_weights``. Of weight zero, it gets features without gradients, and its
    loss that factor: a projector may learn all the same.
    """

    def __init__(self, decision: Decision):
        self.decision = decision
        self._factors: list[float] = []

    def split(
        self, features: Mapping[str, Tensor], parameters: Mapping[str, Parameters]
    ) -> dict[str, Branch]:
        """As :meth:`.Boundary.split`. Where no factor is needed, the tensors are the given ones."""
        self._factors = []
        return {
            name: self._branch(index, features, used)
            for index, (name, used) in enumerate(parameters.items())
        }

    def _branch(self, index: int, features: Mapping[str, Tensor], used: Parameters) -> Branch:
        weight, own = (self.decision.factors(index, is_own) for is_own in (False, True))
        if index == 0:
            self._factors.append(1.0)
            return Branch({name: scaled(x, weight) for name, x in features.items()}, {})
        self._factors.append(weight or own)
        if weight:
            kept = {p: scaled(p, own / weight) for p in used.own} | {p: p for p in used.borrowed}
            return Branch(dict(features), kept)
        if not used.own:
            return Branch(dict(features), {p: p for p in used}, is_idle=True)
        # Own ones stay in the graph even at zero: DistributedDataParallel waits for them.
        kept = {p: p for p in used.own} | {p: p.detach() for p in used.borrowed}
        return Branch({name: x.detach() for name, x in features.items()}, kept)

    def of(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the scalar to run backward from: of a scalar for each objective, task first."""
        terms = [
            loss if factor == 1 else loss * factor
            for loss, factor in zip(losses.values(), self._factors)
            if factor or loss.requires_grad  # an idle one may have run without gradients
        ]
        assert terms, "[WeightedSum] no loss depends on anything that trains"
        return sum(terms[1:], terms[0])


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Return the same numbers, whose gradient is multiplied by ``factor``."""
    return tensor if factor == 1 else _Scale.apply(tensor, factor)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
