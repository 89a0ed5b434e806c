# Copyright (c) The mokd_det authors.
"""
Balancing at shared parameters: the gradients that MoKD's definitions speak of.

One backward pass of all losses stops at the features, as with the heads and projectors detached
there; then each objective's gradient is taken on through the shared part for itself.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from .balancer import Balancer, Decision
from .boundary import MISSED, Boundary, Use, combine
from .boundary import ranks, stacked, uses_of, weighted_use
from .branches import Branch, Parameters
from .gram import gram_matrix

Gradients = list[Tensor | None]
Pairs = list[tuple[Parameter, Tensor | None]]


class ParameterBoundary(Boundary):
    """
    Measures at the shared parameters: K backward passes through the shared part instead of one,
    or with ``layers`` K short ones to these layers and one through all.

    Micro-batches are added up first and balanced once, so accumulation equals the big batch.

    Several processes: DistributedDataParallel must not average (its ``no_sync``), because it can
    only average sums. The boundary does, before the Gram matrix is taken, in one all-reduce; with
    ``layers`` in two, the first of these layers only.
    """

    measured_at = "parameters"
    balancer: Balancer

    def __init__(self, balancer: Balancer, shared: nn.Module | None, layers: Sequence[str] = ()):
        """
        Args:
            shared: makes the features; all objectives share its parameters.
            layers: names of submodules (or parameters) of ``shared`` to measure on. Empty: all. One
                that does not exist or does not train is a ValueError.
        """
        super().__init__(balancer)
        if shared is None:
            raise ValueError(
                "Measuring at parameters needs 'shared', the module that makes features."
            )
        self.shared = shared
        self.layers = tuple(layers)
        if not self._parameters()[0]:
            raise ValueError(
                f"MOKD.BALANCING.MEASURE_AT 'parameters' needs a {type(shared).__name__} that "
                "trains, but all of it is frozen."
            )

    def _parameters(self) -> tuple[list[Parameter], list[int]]:
        """Shared parameters that train, and which of them are measured."""
        named = {n: p for n, p in self.shared.named_parameters() if p.requires_grad}
        measured = set() if self.layers else set(range(len(named)))
        for layer in self.layers:
            within = [i for i, n in enumerate(named) if n == layer or n.startswith(f"{layer}.")]
            measured.update(within)
            if not within:
                children = [n for n, m in self.shared.named_modules() if n and n.count(".") < 2]
                raise ValueError(
                    f"MOKD.BALANCING.LAYERS has '{layer}', which is no part of the shared "
                    f"{type(self.shared).__name__} that trains. It has: {', '.join(children)}."
                )
        return list(named.values()), sorted(measured)

    def start(self, micro_batches: int = 1, scale: Tensor | None = None) -> None:
        super().start(micro_batches, scale)
        self._scale = scale
        # Over micro-batches: each objective's gradients, losses, what each use adds to a gradient.
        self._sums: list[Gradients] | None = None
        self._losses: list[Tensor] = []
        self._extra: dict[Use, Tensor | None] = {}
        self._decision: Decision | None = None

    @property
    def reduces_gradients(self) -> bool:
        return self.measures

    def _can_sum(self, decision: Decision) -> bool:
        # The task's gradient may also reach shared parameters around the features, where a weight
        # besides one could not be put on it alone.
        return bool(decision.weights[0] == 1)

    def _split(
        self, features: Mapping[str, Tensor], parameters: Mapping[str, Parameters]
    ) -> dict[str, Branch]:
        if not torch.is_grad_enabled():  # a forward pass for its losses only
            return {n: Branch(dict(features), {p: p for p in x}) for n, x in parameters.items()}
        self._features = list(features.values())
        self._copies = [[*map(_leaf, self._features)] for _ in parameters]
        self._uses = {use: _leaf(use.of) for use in uses_of(parameters)}
        return self._branches(parameters, self._copies, self._uses)

    def _accumulate(self, losses: Mapping[str, Tensor]) -> None:
        shared, measured = self._parameters()
        # What reaches shared parameters around the features' copies, where the backward pass stops:
        # the task's gradient of layers behind the last tapped feature.
        kept = [p.grad for p in shared]
        self._set(shared, [None] * len(shared))
        self._backward(losses)
        around = [p.grad for p in shared]
        self._set(shared, kept)
        self._losses.append(stacked(losses))
        features, copies = self._features, self._copies
        self._features, self._copies = [], []
        for use, copy in self._uses.items():
            self._extra[use] = _sum(self._extra.get(use), copy.grad)
        self._uses = {}
        cotangents = [[copy.grad for copy in part] for part in copies]
        if all(gradient is None for part in cotangents for gradient in part):
            raise RuntimeError(MISSED)
        if not self.balancer.due:
            self._decision = dataclasses.replace(self.balancer.reuse(), losses=self._mean_losses())
        elif self.layers and self._micro_batches == 1:
            layers = [shared[i] for i in measured]
            gradients = [_gradients(features, part, layers, retain=True) for part in cotangents]
            gradients[0] = _sums(gradients[0], [around[i] for i in measured])
            gradients, _, mean_losses = self._averaged(gradients, layers, [])
            self._decision = self._decide(gradients, mean_losses)
        else:  # balanced by finish()
            last = cotangents[-1]
            gradients = [_gradients(features, x, shared, retain=x is not last) for x in cotangents]
            gradients[0] = _sums(gradients[0], around)
            known = self._sums
            self._sums = gradients if known is None else list(map(_sums, known, gradients))
            return
        # One backward pass of the weighted sum, added to the parameters' gradients.
        weights = self._decision.weights.tolist()
        if pairs := _reached(features, combine(weights, cotangents)):
            outputs, given = zip(*pairs)
            torch.autograd.backward(outputs, given)
        around = combine(weights[:1], [around])
        self._set(shared, _sums([p.grad for p in shared], around))

    def _finish(self, parameters: Iterable[Parameter]) -> Decision:
        shared, measured = self._parameters()
        is_shared = {id(p) for p in shared}
        others = [p for p in parameters if p.requires_grad and id(p) not in is_shared]
        if self._sums is None:  # one weighted backward pass has filled all gradients
            others = shared + others
        pairs = [(p, p.grad) for p in others] + [(use.of, g) for use, g in self._extra.items()]
        if self._sums is None:
            rest = self._averaged([], [], pairs)[1]
        else:
            gradients, rest, losses = self._averaged(self._sums, shared, pairs)
            self._sums = None
            self._decision = self._decide([[g[i] for i in measured] for g in gradients], losses)
            self._set(shared, combine(self._decision.weights.tolist(), gradients))
        assert self._decision is not None, "[ParameterBoundary] finish() before accumulate()"
        self._set(others, rest)
        for use, gradient in zip(self._extra, rest[len(others) :]):
            use.of.grad = _sum(use.of.grad, weighted_use(self._decision, use, gradient))
        self._extra = {}
        return self._decision

    def _mean_losses(self) -> Tensor:
        return torch.stack(self._losses).mean(0)

    def _decide(self, gradients: Sequence[Gradients], losses: Tensor) -> Decision:
        """``gradients``: K lists of the mean loss over micro-batches and ranks, times the scale."""
        gram = gram_matrix(gradients)
        if self._scale is not None:
            gram = gram / self._scale**2

        def agreed(weights: Tensor) -> Tensor:
            # Computed from equal gradients, but maybe on other hardware.
            weights = weights.to(gram.device)
            dist.broadcast(weights, 0)
            return weights.cpu()

        # One Gram matrix: parts of a list of parameters say nothing to a reader.
        return self.balancer.weigh(gram[None], losses, agreed if ranks() > 1 else None)

    def _averaged(
        self, gradients: list[Gradients], shared: list[Parameter], others: Pairs
    ) -> tuple[list[Gradients], Gradients, Tensor]:
        """
        Return means over the ranks, in one all-reduce: of the K lists of gradients of ``shared``;
        of those of others; of the (K,) losses. None stays where no loss reached a parameter on any
        rank: an optimizer skips it then, as with one process.
        """
        if ranks() == 1:
            return gradients, [g for _, g in others], self._mean_losses()
        pairs = [*(pair for row in gradients for pair in zip(shared, row)), *others]
        tensors = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        columns = [*zip(*gradients), *((g,) for _, g in others)]
        reached = [any(g is not None for g in column) for column in columns]
        losses = self._mean_losses()
        tensors += [losses.new_tensor(reached), losses]
        packed = torch.cat([t.detach().reshape(-1).float() for t in tensors])
        dist.all_reduce(packed)
        packed /= ranks()
        pieces = packed.split([t.numel() for t in tensors])
        *pieces, means, losses = (x.view_as(t).to(t.dtype) for x, t in zip(pieces, tensors))
        reached = [value > 0 for value in means.tolist()]
        pieces = iter(pieces)
        gradients = [
            [g if r else None for g, r in zip(itertools.islice(pieces, len(shared)), reached)]
            for _ in gradients
        ]
        # Copies: as views they would keep all of the packed numbers alive.
        reached = reached[len(reached) - len(others) :]
        return gradients, [g.clone() if r else None for g, r in zip(pieces, reached)], losses

    @staticmethod
    def _set(parameters: Iterable[Parameter], gradients: Iterable[Tensor | None]) -> None:
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _reached(features, cotangents):
    return [(f, c) for f, c in zip(features, cotangents) if c is not None and f.requires_grad]


def _gradients(features, cotangents, parameters, retain):
    """Gradients of one objective; None where it does not reach."""
    pairs = _reached(features, cotangents)
    if not pairs or not parameters:
        return [None] * len(parameters)
    outputs, given = zip(*pairs)
    return torch.autograd.grad(outputs, parameters, given, retain_graph=retain, allow_unused=True)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return first if second is None else second if first is None else first + second


def _sums(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Gradients:
    return list(map(_sum, first, second))
