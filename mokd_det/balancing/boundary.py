# Copyright (c) The mokd_det authors.
"""
Where the gradients of task and distillation meet.

The shared features pass through a boundary, which gives each objective a branch of its own: copies
of the features, and of the parameters besides the shared ones that it uses. In the backward pass it
receives every objective's gradient at once, asks the rule for weights, and sends the weighted sum
on. So heads get the task gradient, and what lies before the boundary (backbone and FPN) the
balanced one. There is one graph and one ordinary ``backward()``, hence nothing that
DistributedDataParallel, GradScaler or gradient accumulation would have to know.
"""

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from .balancer import Balancer, Decision
from .branches import Branch, Parameters
from .gram import gram_by_part, outside_support
from .weighted_sum import WeightedSum


class Boundary(abc.ABC):
    """
    A step is ``start``, then for each micro-batch ``split`` (inside the model's forward) and
    ``accumulate``, then ``finish``; :meth:`backward` is all of it for a single batch.

    A step in which the balancer is not due measures nothing: it is a :class:`WeightedSum`.

    Attributes:
        balancer: decides the weights, and holds all state. None: there is nothing to balance.
        names: of the features split last, in their order.
        last: what the latest step decided, or None.
    """

    measured_at: str | None = None  # for logs

    def __init__(self, balancer: Balancer | None):
        self.balancer = balancer
        self.names: list[str] = []
        self.last: Decision | None = None
        self.start()
        self._has_started = False  # the balancer's state may be loaded before the first step

    def start(self, micro_batches: int = 1, scale: Tensor | None = None) -> None:
        """
        Begin a step of so many micro-batches (without it, one of a single batch begins). The
        gradients keep the ``scale`` of ``torch.amp.GradScaler``, the Gram matrix does not.
        """
        self.last, self._has_started = None, True
        self._micro_batches = micro_batches
        # None, not one: at weights (1, 1) not a single operation is added to the plain sum.
        self._factor: float | Tensor | None = scale
        if micro_batches > 1:
            self._factor = (1.0 if scale is None else scale) / micro_batches
        self._known: WeightedSum | None = None
        self._seen: list[Tensor] = []  # losses of the micro-batches, if nothing is measured
        if self.balancer is not None and not self.balancer.due:
            decision = self.balancer.reuse()
            if self._can_sum(decision):
                self._known = WeightedSum(decision)

    @property
    def measures(self) -> bool:
        """Whether this step takes the objectives' gradients apart; else it only sums losses."""
        self._begin()
        return self._known is None

    @property
    def reduces_gradients(self) -> bool:
        """Whether the boundary averages this step's gradients over the ranks, not DDP."""
        return False

    def split(
        self, features: Mapping[str, Tensor], parameters: Mapping[str, Parameters]
    ) -> dict[str, Branch]:
        """
        Return a branch for each objective, by its name.

        Args:
            features: the shared ones, of any shapes. They may depend on each other (several
                layers): each counts with the gradient that reaches it directly.
            parameters: of each objective, the task first.
        """
        self.names = list(features)
        self._begin()
        if self._known is not None:
            return self._known.split(features, parameters)
        return self._split(features, parameters)

    def accumulate(self, losses: Mapping[str, Tensor]) -> None:
        """
        Run the backward pass of one micro-batch: of a scalar for each objective, the task first,
        from the branches of the latest :meth:`split`; RuntimeError if they do not depend on it.
        """
        if self._known is None:
            return self._accumulate(losses)
        self._seen.append(stacked(losses))
        self._run_backward(self._known.of(losses))

    def finish(self, parameters: Iterable[Parameter] = ()) -> Decision | None:
        """
        End a step: now every ``.grad`` is that of the balanced step. Where ``reduces_gradients`` it
        needs all parameters of the model. What is returned is kept as ``last``.
        """
        if self._known is None:
            self.last = self._finish(parameters)
        else:
            losses = torch.stack(self._seen).mean(0)
            self.last = dataclasses.replace(self._known.decision, losses=losses)
        if self.balancer is not None:
            self.balancer.end_step()
        self._has_started = False
        return self.last

    def _begin(self) -> None:
        # A forward pass without gradients looks at the step before once more.
        if not self._has_started and torch.is_grad_enabled():
            self.start()

    def _can_sum(self, decision: Decision) -> bool:
        return True

    @abc.abstractmethod
    def _split(
        self, features: Mapping[str, Tensor], parameters: Mapping[str, Parameters]
    ) -> dict[str, Branch]:
        """The parts of a step that measures."""

    @abc.abstractmethod
    def _accumulate(self, losses: Mapping[str, Tensor]) -> None: ...

    @abc.abstractmethod
    def _finish(self, parameters: Iterable[Parameter]) -> Decision | None: ...

    def backward(
        self, losses: Mapping[str, Tensor], parameters: Iterable[Parameter] = ()
    ) -> Decision | None:
        """A step of one batch, which was split: see :meth:`accumulate` and :meth:`finish`."""
        self.accumulate(losses)
        return self.finish(parameters)

    def _branches(
        self, objectives: Iterable[str], copies: list[list[Tensor]], uses: dict["Use", Tensor]
    ) -> dict[str, Branch]:
        """From each objective's copies of the features, and all copies of parameters."""
        return {
            name: Branch(
                dict(zip(self.names, part)),
                {use.of: copy for use, copy in uses.items() if use.objective == index},
            )
            for index, (name, part) in enumerate(zip(objectives, copies))
        }

    def _backward(self, losses: Mapping[str, Tensor]) -> None:
        total = sum(losses.values())
        assert isinstance(total, Tensor), "[Boundary] there is no loss"
        self._run_backward(total)

    def _run_backward(self, total: Tensor) -> None:
        (total if self._factor is None else total * self._factor).backward()


class FeatureBoundary(Boundary):
    """
    Measures at the features themselves: the cost of a few inner products.

    Each micro-batch is balanced for itself: features of different samples have no common gradient.
    Under DistributedDataParallel, which averages the gradients as always, one all-reduce in each
    backward pass makes the Gram matrix that of the joined batch, equal on all ranks.
    """

    measured_at = "features"
    balancer: Balancer

    def start(self, micro_batches: int = 1, scale: Tensor | None = None) -> None:
        super().start(micro_batches, scale)
        self._decisions: list[Decision] = []

    def _split(
        self, features: Mapping[str, Tensor], parameters: Mapping[str, Parameters]
    ) -> dict[str, Branch]:
        uses = uses_of(parameters)
        count, size = len(parameters), len(features)
        copies = _Split.apply(self, count, uses, *features.values(), *(use.of for use in uses))
        parts = [copies[i * size : (i + 1) * size] for i in range(count)]
        return self._branches(parameters, parts, dict(zip(uses, copies[count * size :])))

    def _accumulate(self, losses: Mapping[str, Tensor]) -> None:
        self._losses = stacked(losses)
        before = len(self._decisions)
        self._backward(losses)
        if len(self._decisions) == before:
            raise RuntimeError(MISSED)

    def _finish(self, parameters: Iterable[Parameter]) -> Decision:
        return _mean_decision(self._decisions)

    def decide(self, gradients: Sequence[Sequence[Tensor | None]]) -> Decision:
        """Called in the backward pass of each micro-batch, with K lists of gradients."""
        parts, losses = gram_by_part(gradients), self._losses
        outside = losses.new_zeros(0)
        if self.balancer.rule.reads_support:
            outside = outside_support(gradients).to(parts)
        if self._factor is not None:
            parts, outside = parts / self._factor**2, outside / self._factor**2
        if ranks() > 1:
            # Of the ranks' mean loss a rank's features get 1 / ranks of the local gradient;
            # ranks hold different samples, so the squares add up.
            squares = torch.cat([parts.flatten(), outside.to(parts)]) / ranks() ** 2
            packed = torch.cat([squares, losses.to(parts) / ranks()])
            dist.all_reduce(packed)
            sizes = [parts.numel(), outside.numel(), losses.numel()]
            squares, outside, losses = packed.split(sizes)
            parts = squares.view_as(parts)
        decision = self.balancer.weigh(parts, losses, outside=outside if len(outside) else None)
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
        # The uses are of the last tensors; the others are for all objectives.
        ctx.boundary, ctx.objectives, ctx.uses = boundary, objectives, uses
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
        extra = zip(ctx.uses, gradients[ctx.objectives * count :])
        weighted = [weighted_use(decision, use, gradient) for use, gradient in extra]
        combined = combine(decision.weights.tolist(), by_objective)
        return (None, None, None, *combined, *weighted)


def weighted_use(decision: Decision, use: Use, gradient: Tensor | None) -> Tensor | None:
    """Return what an objective adds to the gradient of a parameter that it uses."""
    return combine([decision.factors(use.objective, use.is_own)], [[gradient]])[0]


def combine(
    weights: Sequence[float], gradients: Sequence[Sequence[Tensor | None]]
) -> list[Tensor | None]:
    """
    Return the weighted sums of K lists; None only where all are. All weights zero give zeros:
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
