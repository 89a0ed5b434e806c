# Copyright (c) The mokd_det authors.
"""What a rule is: from the gradients' Gram matrix and the losses to weights."""

import abc
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...registry import Registry


class _RuleRegistry(Registry):
    def register(self, name: str) -> Callable:
        add = super().register(name)

        def decorator(cls: Any) -> Any:
            for option, value in inspect.signature(cls).parameters.items():
                if not isinstance(value.default, (bool, int, float, str, list, tuple, type(None))):
                    raise TypeError(
                        f"Rule '{name}' takes '{option}', which is an option of the config then: "
                        "give it a default that YAML can hold."
                    )
            return add(cls)

        return decorator


RULES = _RuleRegistry("RULES", "MOKD.BALANCING.RULE", " or 'torchjd.X'")
"""Subclasses of :class:`Rule`, built with their options: see :func:`build_rule`."""


class Rule(abc.ABC):
    """
    Decides how much each objective counts in a step: the update of the shared part is
    ``sum_i weights[i] * gradient_i``; index 0 is the task.

    Degenerate steps are the :class:`Balancer`'s: a rule sees finite Gram matrices without vanishing
    gradients, and positive finite losses.

    Class attributes, for subclasses to set:
        smoothing (0.0): default of ``MOKD.BALANCING.SMOOTHING``, the share of the past in the
            running means that it sees: :class:`RunningGram`, and if ``averages_losses`` (False)
            :class:`RunningLosses`.
        interval (1): default of ``MOKD.BALANCING.INTERVAL``. Only a rule whose weights change
            slowly may skip steps.
        schedule ((1.0, 1.0)): default of ``MOKD.BALANCING.SCHEDULE``.
        reads_gradients (True): the Gram matrix; else SMOOTHING would change nothing.
        reads_support (False): it sees cosines with the task's gradient as they are on its support,
            where features have one.
        takes_vanishing_gradients (False): else the others are weighed without them.
        needs_positive_losses (False): one below zero is an error.
        weighs_projectors (False): it is asked for :meth:`projector_weights`; else a projector's
            gradient has its objective's weight.
        needs_second_forward (False): :meth:`update` wants the losses after the step.
    """

    name: str = ""
    smoothing: ClassVar[float] = 0.0
    averages_losses: ClassVar[bool] = False
    interval: ClassVar[int] = 1
    schedule: ClassVar[tuple[float, float]] = (1.0, 1.0)
    reads_gradients: bool = True
    reads_support: ClassVar[bool] = False
    takes_vanishing_gradients: bool = False
    needs_positive_losses: bool = False
    weighs_projectors: ClassVar[bool] = False
    needs_second_forward: ClassVar[bool] = False

    @abc.abstractmethod
    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """
        Return (K,) weights from the (K, K) inner products of gradients and the (K,) losses, all
        float64 on the CPU. Not finite: undefined, and the step takes the plain sum.
        """

    def among(self, rows: Sequence[int]) -> "Rule":
        """Return the rule for these rows of the Gram matrix: gradients of others have vanished."""
        return self

    def projector_weights(self, gram: Tensor) -> Tensor:
        """
        Return (K,) factors of the objectives' gradients for parameters that nothing else uses;
        neither rescaled nor scheduled. Only asked for with ``weighs_projectors``.
        """
        raise NotImplementedError

    def check_objectives(self, count: int) -> None:
        """Raise ValueError, before training, if there is no answer for ``count`` objectives."""

    def update(self, before: Tensor, after: Tensor) -> None:
        """Learn from the (K,) losses of one batch before and after the model's step."""

    def state_dict(self) -> dict[str, Any]:
        """What is resumed, and undone if mixed precision skips the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""


def log_gram(gram: Tensor, losses: Tensor) -> Tensor:
    """Return the Gram matrix of ``grad log L_i = g_i / L_i`` from that of ``g_i``."""
    return gram / torch.outer(losses, losses)


def positive(option: str, value: float) -> float:
    """Return an option's value; ValueError unless it is a finite number > 0."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{option} is {value}: expected a finite number > 0.")
    return float(value)


def _convex(weights: Tensor, gram: Tensor) -> Tensor:
    # Rules with negative weights may have a sum below zero, and dividing by it would turn the
    # update round: NaN is "undefined".
    total = weights.sum()
    return weights / total if total > 0 else torch.full_like(weights, torch.nan)


def _task_norm(weights: Tensor, gram: Tensor) -> Tensor:
    return weights * torch.sqrt(gram[0, 0] / (weights @ gram @ weights))


RESCALES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda weights, gram: weights,
    "convex": _convex,
    "sum": lambda weights, gram: len(weights) * _convex(weights, gram),
    "task_norm": _task_norm,
}
"""How a rule's weights are scaled, see MOKD.BALANCING.RESCALE: from weights and Gram matrix."""
