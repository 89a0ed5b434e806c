# Copyright (c) The mokd_det authors.
"""
Balancing at shared features, inside one ordinary ``backward()``.

The features that all objectives share pass through a boundary, which gives each objective its own
copy. In the backward pass the boundary receives every objective's gradient at once, asks the rule
for weights, and sends the weighted sum on. So heads get the task gradient; what lies before the
boundary (backbone and FPN) gets the balanced one. Parameters that a distillation objective uses
besides the task (a head, to match outputs) get that objective's gradient with its weight, through
copies that pass the boundary, too. So do parameters that an objective has for itself (projectors),
but a rule may have other factors for these (``own_weights``). There is one graph and one backward
pass, hence nothing that DistributedDataParallel, GradScaler or gradient accumulation would have to
know about.
"""

import dataclasses

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .gram import gram_by_part

__all__ = ["Boundary", "FeatureBoundary", "combine", "ranks"]


class Boundary:
    """
    Where the objectives' gradients meet. A step is ``start``, then for each micro-batch ``split``
    (inside the model's forward) and ``accumulate``, then ``finish``; :meth:`backward` is all of
    it for a single batch.

    Attributes:
        place (str): name of the place of measurement, for logs.
        balancer (Balancer): decides the weights, and holds all state.
        names (list[str]): of the features split last, in their order.
        last (Balance or None): what the latest step decided.
    """

    place = None
    # Whether DistributedDataParallel averages the gradients over the ranks, or the boundary.
    reduces_gradients = False

    def __init__(self, balancer):
        self.balancer = balancer
        self.names = []
        self.last = None
        self.start()

    def start(self, micro_batches=1, scale=None):
        """
        Begin a step.

        Args:
            micro_batches (int): M; each contributes 1 / M of the gradient.
            scale (Tensor or None): the factor of ``torch.amp.GradScaler``, which the gradients
                keep and the Gram matrix does not.
        """
        self.last = None
        self._micro_batches = micro_batches
        # None, not one: at weights (1, 1) not a single operation is added to the plain sum.
        self._factor = scale
        if micro_batches > 1:
            self._factor = (1.0 if scale is None else scale) / micro_batches

    def split(self, features, objectives, names=None, extra=None, own=()):
        """
        Args:
            features (list[Tensor]): the shared features, of any shapes. They may depend on each
                other (several layers): each counts with the gradient that reaches it directly.
            objectives (int): their number K, the task first.
            names (list[str]): of the features, for logs.
            extra (dict[int, list[Parameter]]): by objective: parameters that are not shared by
                all, but used by this objective: projectors, a head. They do not count in the
                measurement; what the objective adds to their gradient is multiplied by its weight.
            own (sequence[int]): objectives whose ``extra`` parameters nothing else uses. These get
                the objective's gradient times its ``Balance.own_weights`` instead.

        Returns:
            list[list[Tensor]]: K copies of ``features`` that share their memory, each followed by
            copies of the objective's ``extra`` parameters; changing one in place is an error of
            autograd's. Those of objective i must lead to loss i only.
        """
        raise NotImplementedError

    def accumulate(self, losses):
        """
        Run the backward pass of one micro-batch.

        Args:
            losses (list[Tensor]): K scalars, the task first, computed from the copies of the
                latest :meth:`split`.

        Raises:
            RuntimeError: the losses do not depend on the split features.
        """
        raise NotImplementedError

    def finish(self, parameters=()):
        """
        End a step: afterwards every ``.grad`` is that of the balanced step.

        Args:
            parameters (iterable[Parameter]): all of the model; used where the boundary averages
                the gradients over the ranks itself.

        Returns:
            Balance: also kept as ``last``.
        """
        raise NotImplementedError

    def backward(self, losses, parameters=()):
        """A whole step of one batch: see :meth:`accumulate` and :meth:`finish`."""
        self.start()
        self.accumulate(losses)
        return self.finish(parameters)

    def _backward(self, losses):
        total = sum(losses)
        (total if self._factor is None else total * self._factor).backward()

    def _unscaled(self, gram):
        return gram if self._factor is None else gram / self._factor**2


class FeatureBoundary(Boundary):
    """
    Measures at the features themselves: the cost of a few inner products.

    With several micro-batches each is balanced for itself: features of different samples have no
    common gradient that could be added up first. Under DistributedDataParallel one all-reduce of
    4 (P K^2 + K) bytes (P features, K objectives; float32) in each backward pass makes the Gram
    matrix that of the joined batch, equal on all ranks; the gradients are averaged as always.
    """

    place = "features"

    def __init__(self, balancer):
        if balancer.needs_gradients:
            raise ValueError(
                f"MOKD.BALANCING.RULE '{type(balancer.rule).__name__}' compares gradients of "
                "different batches, which share no features: set MOKD.BALANCING.PLACE to "
                "'parameters'."
            )
        super().__init__(balancer)

    def start(self, micro_batches=1, scale=None):
        super().start(micro_batches, scale)
        self._balances = []

    def split(self, features, objectives, names=None, extra=None, own=()):
        self.names = list(names or map(str, range(len(features))))
        extra = extra or {}
        owners = [i for i, parameters in extra.items() for _ in parameters]
        parameters = [p for i in extra for p in extra[i]]
        copies = _Split.apply(self, objectives, owners, own, *features, *parameters)
        count = len(features)
        rest = copies[objectives * count :]
        return [
            list(copies[i * count : (i + 1) * count])
            + [copy for copy, owner in zip(rest, owners) if owner == i]
            for i in range(objectives)
        ]

    def accumulate(self, losses):
        self._losses = torch.stack([loss.detach().float() for loss in losses])
        before = len(self._balances)
        self._backward(losses)
        if len(self._balances) == before:
            raise RuntimeError(MISSED)

    def finish(self, parameters=()):
        self.last = _mean_balance(self._balances)
        self.balancer.end_step()
        return self.last

    def _weigh(self, gradients):
        """Called in the backward pass, once for each micro-batch."""
        if self.balancer.due:
            parts, losses = self._unscaled(gram_by_part(gradients)), self._losses
            if ranks() > 1:
                # The gradient of the ranks' mean loss at one rank's features is 1 / ranks times
                # the local one, and ranks hold different samples: the squares of parts add up.
                packed = torch.cat([parts.flatten() / ranks() ** 2, losses.to(parts) / ranks()])
                dist.all_reduce(packed)
                parts, losses = packed[: parts.numel()].view_as(parts), packed[parts.numel() :]
            balance = self.balancer.balance(parts, losses)
        else:
            balance = self.balancer.reuse(self._losses)
        self._balances.append(balance)
        return balance


MISSED = (
    "No gradient passed the boundary: the losses given to its backward() do not depend on the "
    "features of its split()."
)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, boundary, objectives, owners, own, *tensors):
        ctx.boundary = boundary
        ctx.objectives = objectives
        ctx.owners = owners  # objectives of the last tensors; the others are for all of them
        ctx.own = own
        ctx.set_materialize_grads(False)
        count = len(tensors) - len(owners)
        features, extra = tensors[:count], tensors[count:]
        return tuple(x.view_as(x) for part in (*[features] * objectives, extra) for x in part)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        count = (len(gradients) - len(ctx.owners)) // ctx.objectives
        by_objective = [gradients[i * count : (i + 1) * count] for i in range(ctx.objectives)]
        balance = ctx.boundary._weigh(by_objective)
        extra = gradients[len(gradients) - len(ctx.owners) :]
        factors = extra_weights(balance, ctx.own)
        weighted = [combine([factors[i]], [[g]])[0] for i, g in zip(ctx.owners, extra)]
        combined = combine(balance.weights.tolist(), by_objective)
        return (None, None, None, None, *combined, *weighted)


def extra_weights(balance, own):
    """
    Args:
        balance (Balance):
        own (sequence[int]): objectives whose extra parameters nothing else uses.

    Returns:
        list[float]: K factors of the gradients of the objectives' extra parameters.
    """
    pairs = enumerate(zip(balance.weights.tolist(), balance.own_weights.tolist()))
    return [for_itself if i in own else weight for i, (weight, for_itself) in pairs]


def combine(weights, gradients):
    """
    Args:
        weights (list[float]): K.
        gradients (list[list[Tensor or None]]): K lists of the same length.

    Returns:
        list[Tensor or None]: the weighted sums; None only where all are. All weights zero give
        zeros: DistributedDataParallel waits for every parameter that it has seen in the graph.
    """
    combined = []
    for part in zip(*gradients):
        total = None
        for weight, gradient in zip(weights, part):
            # The task comes first, as in a plain sum of losses: equal bits at weight one.
            if gradient is None or weight == 0:
                continue  # also keeps a non-finite gradient of weight zero out
            if total is None:
                total = gradient * weight
            else:
                total.add_(gradient, alpha=weight)
        if total is None and (given := [g for g in part if g is not None]):
            total = torch.zeros_like(given[0])
        combined.append(total)
    return combined


def ranks():
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _mean_balance(balances):
    """One record of several micro-batches."""
    if len(balances) == 1:
        return balances[0]

    def mean(name):
        values = [getattr(balance, name) for balance in balances]
        if any(value is None for value in values):
            return None
        # Losses of reused weights stay on the GPU, those that were balanced are on the CPU.
        return torch.stack([value.to(values[0].device) for value in values]).mean(0)

    fallback = next((b.fallback for b in balances if b.fallback), "")
    names = [f.name for f in dataclasses.fields(balances[0]) if f.name != "fallback"]
    return type(balances[0])(**{name: mean(name) for name in names}, fallback=fallback)
