# Copyright (c) The mokd_det authors.
"""From what one step measured to its weights: the rule, and what is the same for every rule."""

import dataclasses
import math

import torch

from .gram import repair_gram
from .rules import RESCALES, Balance, balance
from .running import RunningGram, RunningLosses

__all__ = ["Balancer"]


class Balancer:
    """
    A rule with rescaling, smoothing of the Gram matrix, weights held for several steps, and a
    schedule of the distillation's part.

    Its state changes by plain assignment only, so that ``load_state_dict(state_dict())`` of an
    earlier moment undoes a step (one that mixed precision skips).

    Attributes:
        weights (Tensor or None): (K,), of the latest step that computed them, before the schedule.
        own (Tensor or None): (K,), of the same step, for parameters that one objective has for
            itself; None if those are the weights.
    """

    def __init__(self, rule, rescale="none", smoothing=None, interval=1, schedule=None, steps=None):
        """
        Args:
            rule: of ``BALANCERS``.
            rescale (str): a key of ``RESCALES``.
            smoothing (float): in [0, 1): the rule sees a :class:`RunningGram` with this share of
                the past (and :class:`RunningLosses`, if it has the attribute ``smooths_losses``);
                of a signal Gram matrix, which is unbiased only if it is averaged as it is, the
                plain running mean. None: the rule's own, its attribute ``smoothing``, or 0.
            interval (int): compute weights at every k-th step and reuse them in between.
            schedule (sequence[float]): factors of all weights but the task's at the first and the
                last step, in [0, inf); a straight line in between. None: the rule's own, its
                attribute ``schedule``, or (1, 1).
            steps (int): of the whole training; needed if the schedule is not constant.

        Raises:
            ValueError: an option out of its range.
        """
        if rescale not in RESCALES:
            raise ValueError(
                f"MOKD.BALANCING.RESCALE is '{rescale}': expected one of "
                f"{', '.join(map(repr, RESCALES))}."
            )
        if smoothing is None:
            smoothing = getattr(rule, "smoothing", 0.0)
        if not (isinstance(smoothing, (int, float)) and 0 <= smoothing < 1):
            raise ValueError(f"MOKD.BALANCING.SMOOTHING is {smoothing}: expected 0 <= s < 1.")
        if interval < 1:
            raise ValueError(f"MOKD.BALANCING.INTERVAL is {interval}: expected 1 or more steps.")
        if interval > 1 and getattr(rule, "needs_gradients", False):
            raise ValueError(
                f"MOKD.BALANCING.INTERVAL is {interval}, but rule '{type(rule).__name__}' compares "
                "the gradients of consecutive steps: set it to 1."
            )
        if schedule is None:
            schedule = getattr(rule, "schedule", (1.0, 1.0))
        factors = schedule if isinstance(schedule, (list, tuple)) else ()
        if len(factors) != 2 or any(not 0 <= factor < math.inf for factor in factors):
            raise ValueError(
                f"MOKD.BALANCING.SCHEDULE is {schedule}: expected two finite numbers >= 0, "
                "the factors at the first and at the last step."
            )
        if schedule[0] != schedule[1] and steps is None:
            raise ValueError(
                f"The schedule {list(schedule)} needs the number of all steps, and steps is None: "
                "give it, or the schedule (1.0, 1.0)."
            )
        self.rule = rule
        self.rescale = rescale
        self.smoothing = smoothing
        self.interval = interval
        self.schedule = tuple(schedule)
        self.steps = steps
        self.step = 0
        self.weights = None
        self.own = None
        self._running = RunningGram(smoothing)
        self._running_losses = None
        if smoothing and getattr(rule, "smooths_losses", False):
            self._running_losses = RunningLosses(smoothing)
        self._mean = None  # plain running means of (batch Gram, signal Gram)
        self._count = 0

    @property
    def rule_name(self):
        return getattr(self.rule, "name", type(self.rule).__name__)

    @property
    def due(self):
        """Whether this step computes weights; else it reuses them."""
        return self.weights is None or self.step % self.interval == 0

    @property
    def needs_gradients(self):
        return getattr(self.rule, "needs_gradients", False)

    @property
    def needs_second_forward(self):
        """Whether the rule wants the losses of this step's batch again, after the step."""
        return self.due and getattr(self.rule, "needs_second_forward", False)

    def end_step(self):
        self.step += 1

    def balance(self, parts, losses, signal=None, gradients=None, agree=None):
        """
        Args:
            parts (Tensor): (P, K, K) Gram matrices of the gradients, see :func:`gram_by_part`.
            losses (Tensor): (K,) values of the objectives.
            signal (Tensor): (K, K) of :func:`signal_gram`, which the rule is to see instead.
            gradients (list[list[Tensor]]): for rules that ask for them.
            agree (callable): from this process's (3, K) weights, own weights and whether there
                was no fallback to those of all.

        Returns:
            Balance
        """
        # Small and double on the CPU: rules stay readable, and 1e-6 differences of norms survive.
        # One copy, because each makes the CPU wait for a GPU.
        packed = torch.cat([parts.detach().flatten(), losses.detach().to(parts)])
        packed = packed.to("cpu", torch.float64)
        parts, losses = packed[: parts.numel()].view_as(parts), packed[parts.numel() :]
        gram = seen = parts.sum(0)
        seen_losses = losses
        finite = bool(gram.isfinite().all() and losses.isfinite().all())
        if finite:
            if signal is not None:
                signal = signal.detach().to("cpu", torch.float64)
            seen = self._smoothed(gram, signal)
            if self._running_losses:
                seen_losses = self._running_losses.update(losses)
            if gradients is not None:
                self.rule.observe(gradients)
        result = balance(self.rule, seen, seen_losses, self.rescale)
        weights, own = result.weights, result.own
        if own is not None and signal is not None:
            # Those of the signal may be far shorter than the gradients that are stepped along.
            pace = self.rule.own_weights(gram)
            own = torch.where((own > 0) & pace.isfinite(), pace, torch.zeros_like(own))
        usual = torch.full_like(weights, not result.fallback)
        if agree:
            weights, own, usual = agree(
                torch.stack([weights, weights if own is None else own, usual])
            )
            # Not by this rank's result: it may be the only one with a fallback, or without.
            own = own if hasattr(self.rule, "own_weights") else None
        # Later steps reuse neither the weights of one that is thrown away, nor those of a batch in
        # which a gradient happened to vanish: they would leave its objective out for good.
        if usual.all():
            self.weights, self.own = weights, own
        return dataclasses.replace(
            result,
            weights=self._scheduled(weights),
            own=own,
            gram=gram,
            losses=losses,
            parts=parts,
            seen=None if seen is gram else seen,
        )

    def reuse(self, losses):
        """
        Args:
            losses (Tensor): (K,), for the record.

        Returns:
            Balance: the latest weights; the losses stay on their device.
        """
        return Balance(self._scheduled(self.weights), None, losses.detach(), own=self.own)

    def _scheduled(self, weights):
        if self.schedule == (1.0, 1.0):
            return weights
        first, last = self.schedule
        done = 0.0 if first == last else min(self.step / max(self.steps - 1, 1), 1.0)
        factor = first + (last - first) * done
        return torch.cat([weights[:1], weights[1:] * factor])

    def _smoothed(self, gram, signal):
        if signal is None:
            return self._running.update(gram) if self.smoothing else gram
        both = torch.stack([gram, signal])
        if self.smoothing:
            past = torch.zeros_like(both) if self._mean is None else self._mean
            self._mean = self.smoothing * past + (1 - self.smoothing) * both
            self._count += 1
            both = self._mean / (1 - self.smoothing**self._count)
        return repair_gram(both[1], both[0])

    def state_dict(self):
        rule = self.rule.state_dict() if hasattr(self.rule, "state_dict") else {}
        state = {
            "rule_name": self.rule_name,
            "step": self.step,
            "weights": self.weights,
            "own": self.own,
            "mean": self._mean,
            "count": self._count,
            "running": self._running.state_dict(),
            "rule": rule,
        }
        if self._running_losses:
            state["running_losses"] = self._running_losses.state_dict()
        return state

    def load_state_dict(self, state):
        """
        Raises:
            ValueError: the state is another rule's.
        """
        if state["rule_name"] != self.rule_name:
            raise ValueError(
                f"MOKD.BALANCING.RULE was {state['rule_name']} in the checkpoint and is "
                f"{self.rule_name} now. Resume with the same rule, or start a new run (another "
                "OUTPUT_DIR) with the checkpoint as MODEL.WEIGHTS."
            )
        self.step = state["step"]
        self.weights = state["weights"]
        self.own = state.get("own")  # not in checkpoints of before there were such rules
        self._mean = state["mean"]
        self._count = state["count"]
        if "running" in state:  # not in checkpoints of before there was such a mean
            self._running.load_state_dict(state["running"])
        if self._running_losses and "running_losses" in state:  # not of a run with SMOOTHING 0
            self._running_losses.load_state_dict(state["running_losses"])
        if hasattr(self.rule, "load_state_dict"):
            self.rule.load_state_dict(state["rule"])
