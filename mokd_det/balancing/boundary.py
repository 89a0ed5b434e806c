# Copyright (c) The mokd_det authors.
"""
Balancing at shared features, inside one ordinary ``backward()``.

The features that all objectives share pass through a boundary, which gives each objective its own
copy. In the backward pass the boundary receives every objective's gradient at once, asks the rule
for weights, and sends the weighted sum on. So heads get the task gradient and projectors the
distillation gradient, each unweighted and unmixed; what lies before the boundary (backbone and
FPN) gets the balanced one. There is one graph and one backward pass, hence nothing that
DistributedDataParallel, GradScaler or gradient accumulation would have to know about.
"""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .gram import gram_matrix
from .rules import balance

__all__ = ["FeatureBoundary"]


class FeatureBoundary:
    """
    Splits shared features between objectives and balances their gradients there.

    Attributes:
        place (str): name of the place of measurement, for logs.
        last (Balance or None): what the latest backward pass decided.
    """

    place = "features"

    def __init__(self, rule, rescale="none"):
        """
        Args:
            rule: of ``BALANCERS``.
            rescale (str): a key of ``RESCALES``.
        """
        self.rule = rule
        self.rescale = rescale
        self.last = None
        self._losses = None

    def split(self, features, objectives):
        """
        Args:
            features (list[Tensor]): the shared features, of any shapes.
            objectives (int): their number K, the task first.

        Returns:
            list[list[Tensor]]: K copies of ``features`` (views: no memory is copied, and changing
            one in place is an error of autograd's). Those of objective i must lead to loss i
            only.
        """
        copies = _Boundary.apply(self, objectives, *features)
        count = len(features)
        return [list(copies[i * count : (i + 1) * count]) for i in range(objectives)]

    def backward(self, losses):
        """
        Run the backward pass of all objectives, balanced at the boundary.

        Args:
            losses (list[Tensor]): K scalars, the task first, computed from the copies of the
                latest :meth:`split`.

        Returns:
            Balance: also kept as ``last``.

        Raises:
            RuntimeError: the losses do not depend on the split features.
        """
        self.last = None
        self._losses = torch.stack([loss.detach().float() for loss in losses])
        sum(losses).backward()
        if self.last is None:
            raise RuntimeError(
                "No gradient passed the boundary: the losses given to FeatureBoundary.backward() "
                "do not depend on the features of FeatureBoundary.split()."
            )
        return self.last

    def _balance(self, gradients):
        gram = gram_matrix(gradients)
        losses = self._losses
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # The gradient of the ranks' mean loss at one rank's features is 1 / ranks times the
            # local one, and ranks hold different samples: so the squares of the parts add up.
            ranks = dist.get_world_size()
            packed = torch.cat([gram.flatten() / ranks**2, losses.to(gram) / ranks])
            dist.all_reduce(packed)
            gram, losses = packed[: gram.numel()].view_as(gram), packed[gram.numel() :]
        self.last = balance(self.rule, gram, losses, self.rescale)
        return self.last.weights.tolist()


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, boundary, objectives, *features):
        ctx.boundary = boundary
        ctx.objectives = objectives
        ctx.set_materialize_grads(False)
        return tuple(feature.view_as(feature) for _ in range(objectives) for feature in features)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        count = len(gradients) // ctx.objectives
        by_objective = [gradients[i * count : (i + 1) * count] for i in range(ctx.objectives)]
        weights = ctx.boundary._balance(by_objective)
        combined = []
        for place in zip(*by_objective):
            total = None
            for weight, gradient in zip(weights, place):
                # The task comes first, as in a plain sum of losses: equal bits at weight one.
                if gradient is None or weight == 0:
                    continue  # also keeps a non-finite gradient of weight zero out
                if total is None:
                    total = gradient * weight
                else:
                    total.add_(gradient, alpha=weight)
            combined.append(total)
        return (None, None, *combined)
