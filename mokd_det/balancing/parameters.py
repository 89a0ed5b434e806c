# Copyright (c) The mokd_det authors.
"""
Balancing at shared parameters: the gradients that MoKD's definitions speak of.

One backward pass of all losses stops at the features, as with the heads and projectors detached
there; then each objective's gradient is taken on through the shared part for itself.
"""

import itertools

import torch
import torch.distributed as dist

from .boundary import MISSED, Boundary, combine, extra_weights, ranks
from .gram import gram_matrix, signal_gram

__all__ = ["ParameterBoundary"]


class ParameterBoundary(Boundary):
    """
    Measures at the shared parameters: K backward passes through the shared part instead of one,
    or with ``layers`` K short ones to these layers and one through all.

    Micro-batches are added up first and balanced once, so accumulation equals the big batch.

    Several processes: DistributedDataParallel must not average (its ``no_sync``), because it can
    only average sums. The boundary does, before the Gram matrix is taken, in one all-reduce of
    4 (K S + O + T + K) bytes for S numbers in shared parameters, O in others (those of ``extra``
    once more), T tensors of both (float32; K^2 more numbers for the signal). With ``layers`` it is
    4 (K L + T_L + K) bytes for L numbers in T_L tensors, then 4 (S + O + T + K); in a step that
    reuses weights only the latter.
    """

    place = "parameters"
    reduces_gradients = True

    def __init__(self, balancer, shared, layers=(), signal=False):
        """
        Args:
            balancer (Balancer):
            shared (nn.Module): whose parameters all objectives share: it makes the features.
            layers (sequence[str]): names of submodules (or parameters) of ``shared`` to measure
                on. Empty: all.
            signal (bool): the rule sees the unbiased products of micro-batches and ranks, see
                :func:`signal_gram`; at least two of them are needed.

        Raises:
            ValueError: a layer that does not exist or does not train.
        """
        super().__init__(balancer)
        if shared is None:
            raise ValueError("Place 'parameters' needs 'shared', the module that makes features.")
        self.shared = shared
        self.layers = tuple(layers)
        self.signal = signal
        if not self._parameters()[0]:
            raise ValueError(
                f"MOKD.BALANCING.PLACE 'parameters' needs a {type(shared).__name__} that trains, "
                "but all of it is frozen."
            )

    def _parameters(self):
        """Shared parameters that train, and which of them are measured."""
        named = [(n, p) for n, p in self.shared.named_parameters() if p.requires_grad]
        for layer in self.layers:
            if not any(_within(name, layer) for name, _ in named):
                children = [n for n, m in self.shared.named_modules() if n and n.count(".") < 2]
                raise ValueError(
                    f"MOKD.BALANCING.LAYERS has '{layer}', which is no part of the shared "
                    f"{type(self.shared).__name__} that trains. It has: {', '.join(children)}."
                )
        measured = [
            index
            for index, (name, _) in enumerate(named)
            if not self.layers or any(_within(name, layer) for layer in self.layers)
        ]
        return [p for _, p in named], measured

    def start(self, micro_batches=1, scale=None):
        super().start(micro_batches, scale)
        self._scale = scale
        self._sums = None  # of each objective's gradients over micro-batches
        self._group_gram = None  # sum of the micro-batches' own Gram matrices
        self._losses = []
        self._extra = {}  # (objective, parameter) -> sum of what the objective adds to its gradient
        self._balance = None

    def split(self, features, objectives, names=None, extra=None, own=()):
        self.names = list(names or map(str, range(len(features))))
        extra = extra or {}
        if not torch.is_grad_enabled():  # a forward pass for its losses only
            return [[*features, *extra.get(i, ())] for i in range(objectives)]
        self._features = features
        self._own = own
        # Leaves: the backward pass of the losses ends here.
        self._copies = [_leaves(features) for _ in range(objectives)]
        self._extra_copies = [
            (i, p, copy) for i in extra for p, copy in zip(extra[i], _leaves(extra[i]))
        ]
        return [
            part + [copy for i, _, copy in self._extra_copies if i == index]
            for index, part in enumerate(self._copies)
        ]

    def accumulate(self, losses):
        shared, measured = self._parameters()
        around = self._backward_around(losses, shared)
        self._losses.append(torch.stack([loss.detach().float() for loss in losses]))
        features, copies = self._features, self._copies
        self._features = self._copies = None
        for i, parameter, copy in self._extra_copies:
            self._extra[i, parameter] = _sum(self._extra.get((i, parameter)), copy.grad)
        self._extra_copies = None
        cotangents = [[copy.grad for copy in part] for part in copies]
        if all(gradient is None for part in cotangents for gradient in part):
            raise RuntimeError(MISSED)
        if not self.balancer.due:
            self._balance = self.balancer.reuse(self._mean_losses())
            self._backward_balanced(features, cotangents, shared, around)
            return
        if self.layers and self._micro_batches == 1:
            layers = [shared[i] for i in measured]
            gradients = [_gradients(features, part, layers, retain=True) for part in cotangents]
            gradients[0] = list(map(_sum, gradients[0], [around[i] for i in measured]))
            self._add_group_gram(gradients)
            gradients, _, losses = self._averaged(gradients, layers, [])
            self._balance = self._decide(gradients, losses)
            self._backward_balanced(features, cotangents, shared, around)
            return
        last = len(cotangents) - 1
        gradients = [
            _gradients(features, part, shared, retain=i < last) for i, part in enumerate(cotangents)
        ]
        gradients[0] = list(map(_sum, gradients[0], around))
        self._add_group_gram([[part[i] for i in measured] for part in gradients])
        if self._sums is not None:
            gradients = [
                [_sum(total, part) for total, part in zip(*both)]
                for both in zip(self._sums, gradients)
            ]
        self._sums = gradients

    def finish(self, parameters=()):
        shared, measured = self._parameters()
        is_shared = {id(p) for p in shared}
        others = [p for p in parameters if p.requires_grad and id(p) not in is_shared]
        extra = [(p, gradient) for (_, p), gradient in self._extra.items()]
        if self._sums is None:  # one weighted backward pass has filled all gradients
            others = shared + others
            rest = self._averaged([], [], [*_with_gradients(others), *extra])[1]
        else:
            rest = [*_with_gradients(others), *extra]
            gradients, rest, losses = self._averaged(self._sums, shared, rest)
            self._sums = None
            self._balance = self._decide([[g[i] for i in measured] for g in gradients], losses)
            self._set(shared, combine(self._balance.weights.tolist(), gradients))
        self._set(others, rest)
        factors = extra_weights(self._balance, self._own)
        for (i, parameter), gradient in zip(self._extra, rest[len(others) :]):
            parameter.grad = _sum(parameter.grad, combine([factors[i]], [[gradient]])[0])
        self._extra = {}
        self.last = self._balance
        self.balancer.end_step()
        return self.last

    def _backward_around(self, losses, shared):
        """
        The backward pass of the losses, down to the features' copies. Returns what reaches shared
        parameters around these: the task's gradient of layers behind the last tapped feature.
        """
        kept = [p.grad for p in shared]
        self._set(shared, [None] * len(shared))
        self._backward(losses)
        around = [p.grad for p in shared]
        self._set(shared, kept)
        return around

    def _backward_balanced(self, features, cotangents, shared, around):
        """One backward pass of the weighted sum, added to the parameters' gradients."""
        weights = self._balance.weights.tolist()
        _backward_through(features, combine(weights, cotangents))
        around = combine(weights[:1], [around])
        self._set(shared, [_sum(p.grad, g) for p, g in zip(shared, around)])

    def _mean_losses(self):
        return torch.stack(self._losses).mean(0)

    def _add_group_gram(self, gradients):
        if self.signal:
            # In units of the micro-batch's own loss: accumulate() made it 1 / M of that.
            gram = self._unscaled(gram_matrix(gradients))
            self._group_gram = gram if self._group_gram is None else self._group_gram + gram

    def _decide(self, gradients, losses):
        """``gradients``: K lists of the mean loss over micro-batches and ranks, times the scale."""
        gram = gram_matrix(gradients)
        if self._scale is not None:
            gram = gram / self._scale**2
        signal = None
        if self.signal:
            signal = signal_gram(gram, self._group_gram, self._micro_batches * ranks())
        wanted = gradients if self.balancer.needs_gradients else None
        # Parts of a list of parameters say nothing to a reader: one Gram matrix.

        def agreed(weights):
            # Each rank computed them from equal gradients, but maybe on other hardware.
            weights = weights.to(gram.device)
            dist.broadcast(weights, 0)
            return weights.cpu()

        agree = agreed if ranks() > 1 else None
        return self.balancer.balance(gram[None], losses, signal, wanted, agree)

    def _averaged(self, gradients, shared, others):
        """
        Means over the ranks, in one all-reduce.

        Args:
            gradients (list[list[Tensor or None]]): K lists, of ``shared``.
            shared (list[Parameter]):
            others (list[tuple[Parameter, Tensor or None]]): other gradients, and of what.

        Returns:
            tuple: the gradients; the others' gradients; losses (K,). None stays where no loss
            reached a parameter on any rank: an optimizer skips it then, as with one process.
        """
        if ranks() == 1:
            return gradients, [g for _, g in others], self._mean_losses()
        pairs = [*(pair for row in gradients for pair in zip(shared, row)), *others]
        tensors = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        reached = [any(g is not None for g in column) for column in zip(*gradients)]
        reached += [g is not None for _, g in others]
        losses = self._mean_losses()
        gram = losses.new_zeros(0) if self._group_gram is None else self._group_gram
        tensors += [losses.new_tensor(reached), losses, gram]
        packed = torch.cat([t.detach().reshape(-1).float() for t in tensors])
        dist.all_reduce(packed)
        packed /= ranks()
        pieces = packed.split([t.numel() for t in tensors])
        pieces = [piece.view_as(t).to(t.dtype) for piece, t in zip(pieces, tensors)]
        *pieces, reached, losses, gram = pieces
        if self._group_gram is not None:
            self._group_gram = gram * ranks()
        reached = [value > 0 for value in reached.tolist()]
        pieces = iter(pieces)
        gradients = [
            [g if r else None for g, r in zip(itertools.islice(pieces, len(shared)), reached)]
            for _ in gradients
        ]
        # Copies: as views they would keep all of the packed numbers alive.
        reached = reached[len(reached) - len(others) :]
        return gradients, [g.clone() if r else None for g, r in zip(pieces, reached)], losses

    @staticmethod
    def _set(parameters, gradients):
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient


def _leaves(tensors):
    return [t.detach().requires_grad_(t.requires_grad) for t in tensors]


def _with_gradients(parameters):
    return [(p, p.grad) for p in parameters]


def _within(name, layer):
    return name == layer or name.startswith(f"{layer}.")


def _gradients(features, cotangents, parameters, retain):
    """Gradients of one objective; None where it does not reach."""
    pairs = [(f, c) for f, c in zip(features, cotangents) if c is not None and f.requires_grad]
    if not pairs or not parameters:
        return [None] * len(parameters)
    outputs, cotangents = zip(*pairs)
    return torch.autograd.grad(
        outputs, parameters, cotangents, retain_graph=retain, allow_unused=True
    )


def _sum(first, second):
    return first if second is None else second if first is None else first + second


def _backward_through(features, cotangents):
    pairs = [(f, c) for f, c in zip(features, cotangents) if c is not None and f.requires_grad]
    if pairs:
        torch.autograd.backward(*map(list, zip(*pairs)))
