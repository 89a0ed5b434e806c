# Copyright (c) The mokd_det authors.
"""
Where the gradients of task and distillation meet.

The features that all objectives share pass through a boundary, which gives each objective a branch
of its own: copies of the features, and of the parameters besides the shared ones that it uses. In
the backward pass the boundary receives every objective's gradient at once, asks the rule for
weights, and sends the weighted sum on. So heads get the task gradient, and what lies before the
boundary (backbone and FPN) the balanced one. There is one graph and one ordinary ``backward()``,
hence nothing that DistributedDataParallel, GradScaler or gradient accumulation would have to know.
"""

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from .balancer import Balancer, Decision
from .gram import gram_by_part


@dataclasses.dataclass(frozen=True)
class Parameters:
    """
    What an objective uses besides the shared features. It does not count in the measurement.

    Attributes:
        own: nothing else uses these (projectors): their gradient is multiplied by the objective's
            ``Decision.projector_weights``.
        borrowed: the task uses these as well (a head): what the objective adds to their gradient is
            multiplied by its weight.
    """

    own: Sequence[Parameter] = ()
    borrowed: Sequence[Parameter] = ()

    def __iter__(self) -> Iterator[Parameter]:
        yield from self.own
        yield from self.borrowed


@dataclasses.dataclass(frozen=True)
class Branch:
    """
    One objective's copies, which share their memory with the originals; changing one in place is an
    error of autograd's. They must lead to this objective's loss only.

    Attributes:
        features: by name.
        parameters: the copy of each parameter.
    """

    features: dict[str, Tensor]
    parameters: dict[Parameter, Tensor]


class Boundary(abc.ABC):
    """
    A step is ``start``, then for each micro-batch ``split`` (inside the model's forward) and
    ``accumulate``, then ``finish``; :meth:`backward` is all of it for a single batch.

    Attributes:
        measured_at: where gradients are measured, for logs.
        balancer: decides the weights, and holds all state. None: there is nothing to balance.
        names: of the features split last, in their order.
        last: what the latest step decided, or None.
    """

    measured_at: str | None = None
    # Whether DistributedDataParallel averages the gradients over the ranks, or the boundary.
    reduces_gradients = False

    def __init__(self, balancer: Balancer | None):
        self.balancer = balancer
        self.names: list[str] = []
        self.last: Decision | None = None
        self.start()

    def start(self, micro_batches: int = 1, scale: Tensor | None = None) -> None:
        """
        Begin a step.

        Args:
            micro_batches: M; each contributes 1 / M of the gradient.
            scale: the factor of ``torch.amp.GradScaler``, which the gradients keep and the Gram
                matrix does not.
        """
        self.last = None
        self._micro_batches = micro_batches
        # None, not one: at weights (1, 1) not a single operation is added to the plain sum.
        self._factor: float | Tensor | None = scale
        if micro_batches > 1:
            self._factor = (1.0 if scale is None else scale) / micro_batches

    @abc.abstractmethod
    def split(
        self, features: Mapping[str, Tensor], parameters: Mapping[str, Parameters]
    ) -> dict[str, Branch]:
        """
        Args:
            features: the shared ones, of any shapes. They may depend on each other (several
                layers): each counts with the gradient that reaches it directly.
            parameters: of each objective by its name, the task first.

        Returns:
            A branch for each objective, by its name.
        """

    @abc.abstractmethod
    def accumulate(self, losses: Mapping[str, Tensor]) -> None:
        """
        Run the backward pass of one micro-batch.

        Args:
            losses: a scalar for each objective, the task first, computed from the branches of the
                latest :meth:`split`.

        Raises:
            RuntimeError: the losses do not depend on the split features.
        """

    @abc.abstractmethod
    def finish(self, parameters: Iterable[Parameter] = ()) -> Decision | None:
        """
        End a step: afterwards every ``.grad`` is that of the balanced step.

        Args:
            parameters: all of the model; used where the boundary averages the gradients over the
                ranks itself.

        Returns:
            Also kept as ``last``.
        """

    def backward(
        self, losses: Mapping[str, Tensor], parameters: Iterable[Parameter] = ()
    ) -> Decision | None:
        """A whole step of one batch: see :meth:`accumulate` and :meth:`finish`."""
        self.start()
        self.accumulate(losses)
        return self.finish(parameters)

    def _backward(self, losses: Mapping[str, Tensor]) -> None:
        total = sum(losses.values())
        assert isinstance(total, Tensor), "[Boundary] there is no loss"
        (total if self._factor is None else total * self._factor).backward()

    def _unscaled(self, gram: Tensor) -> Tensor:
        return gram if self._factor is None else gram / self._factor**2


class FeatureBoundary(Boundary):
    """
    Measures at the features themselves: the cost of a few inner products.

    With several micro-batches each is balanced for itself: features of different samples have no
    common gradient that could be added up first. Under DistributedDataParallel one all-reduce of
    4 (P K^2 + K) bytes (P features, K objectives; float32) in each backward pass makes the Gram
    matrix that of the joined batch, equal on all ranks; the gradients are averaged as always.
    """

    measured_at = "features"
    balancer: Balancer

    def start(self, micro_batches: int = 1, scale: Tensor | None = None) -> None:
        super().start(micro_batches, scale)
        self._decisions: list[Decision] = []

    def split(
        self, features: Mapping[str, Tensor], parameters: Mapping[str, Parameters]
    ) -> dict[str, Branch]:
        self.names = list(features)
        uses = uses_of(parameters)
        count = len(parameters)
        copies = _Split.apply(self, count, uses, *features.values(), *(use.of for use in uses))
        first = count * len(features)
        of_parameters = dict(zip(((use.objective, use.of) for use in uses), copies[first:]))
        return {
            name: Branch(
                dict(zip(features, copies[i * len(features) :])),
                {p: copy for (owner, p), copy in of_parameters.items() if owner == i},
            )
            for i, name in enumerate(parameters)
        }

    def accumulate(self, losses: Mapping[str, Tensor]) -> None:
        self._losses = stacked(losses)
        before = len(self._decisions)
        self._backward(losses)
        if len(self._decisions) == before:
            raise RuntimeError(MISSED)

    def finish(self, parameters: Iterable[Parameter] = ()) -> Decision:
        self.last = _mean_decision(self._decisions)
        self.balancer.end_step()
        return self.last

    def decide(self, gradients: Sequence[Sequence[Tensor | None]]) -> Decision:
        """Called in the backward pass, once for each micro-batch, with K lists of gradients."""
        if self.balancer.due:
            parts, losses = self._unscaled(gram_by_part(gradients)), self._losses
            if ranks() > 1:
                # The gradient of the ranks' mean loss at one rank's features is 1 / ranks times
                # the local one, and ranks hold different samples: the squares of parts add up.
                packed = torch.cat([parts.flatten() / ranks() ** 2, losses.to(parts) / ranks()])
                dist.all_reduce(packed)
                parts, losses = packed[: parts.numel()].view_as(parts), packed[parts.numel() :]
            decision = self.balancer.weigh(parts, losses)
        else:
            decision = self.balancer.reuse(self._losses)
        self._decisions.append(decision)
        return decision


MISSED = (
    "No gradient passed the boundary: the losses given to its backward() do not depend on the "
    "features of its split()."
)


@dataclasses.dataclass(frozen=True)
class Use:
    """That the objective with this index uses a parameter, and whether nothing else does."""

    objective: int
    of: Parameter
    is_own: bool


def uses_of(parameters: Mapping[str, Parameters]) -> list[Use]:
    return [
        Use(index, parameter, is_own)
        for index, used in enumerate(parameters.values())
        for is_own, part in ((True, used.own), (False, used.borrowed))
        for parameter in part
    ]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, boundary, objectives, uses, *tensors):
        ctx.boundary = boundary
        ctx.objectives = objectives
        ctx.uses = uses  # of the last tensors; the others are for all objectives
        ctx.set_materialize_grads(False)
        count = len(tensors) - len(uses)
        features, extra = tensors[:count], tensors[count:]
        return tuple(x.view_as(x) for part in (*[features] * objectives, extra) for x in part)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        count = (len(gradients) - len(ctx.uses)) // ctx.objectives
        by_objective = [gradients[i * count : (i + 1) * count] for i in range(ctx.objectives)]
        decision = ctx.boundary.decide(by_objective)
        extra = gradients[len(gradients) - len(ctx.uses) :]
        weighted = [weighted_use(decision, use, g) for use, g in zip(ctx.uses, extra)]
        combined = combine(decision.weights.tolist(), by_objective)
        return (None, None, None, *combined, *weighted)


def weighted_use(decision: Decision, use: Use, gradient: Tensor | None) -> Tensor | None:
    """Return what an objective adds to the gradient of a parameter that it uses."""
    return combine([decision.factors(use.objective, use.is_own)], [[gradient]])[0]


def combine(
    weights: Sequence[float], gradients: Sequence[Sequence[Tensor | None]]
) -> list[Tensor | None]:
    """
    Args:
        weights: K.
        gradients: K lists of the same length.

    Returns:
        The weighted sums; None only where all are. All weights zero give zeros:
        DistributedDataParallel waits for every parameter that it has seen in the graph.
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


def ranks() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def stacked(losses: Mapping[str, Tensor]) -> Tensor:
    """Return (K,) float32 values of the losses."""
    return torch.stack([loss.detach().float() for loss in losses.values()])


def _mean_decision(decisions: list[Decision]) -> Decision:
    """One record of several micro-batches."""
    if len(decisions) == 1:
        return decisions[0]

    def mean(name: str) -> Tensor | None:
        values = [getattr(decision, name) for decision in decisions]
        if any(value is None for value in values):
            return None
        # Losses of reused weights stay on the GPU, those that were weighed are on the CPU.
        return torch.stack([value.to(values[0].device) for value in values]).mean(0)

    fallback = next((d.fallback for d in decisions if d.fallback), "")
    names = [f.name for f in dataclasses.fields(Decision) if f.name != "fallback"]
    means: dict[str, Any] = {name: mean(name) for name in names}
    return Decision(**means, fallback=fallback)
