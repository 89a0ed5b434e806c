# Copyright (c) The mokd_det authors.
"""From what one step measured to its weights: the rule, and what is the same for every rule."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .gram import on_support, vanishing
from .rules import RESCALES, Rule
from .running import LOSS_FLOOR, RunningGram, RunningLosses


Schedule = Sequence[float] | Sequence[Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Decision:
    """
    What one step decided; float64 on the CPU, but for the losses where weights were reused.

    Attributes:
        weights: (K,), the task first.
        gram: (K, K), of this batch's unweighted gradients; None where the weights were reused.
        losses: (K,); empty until they are known.
        fallback: "" or why the rule was not asked: "non_finite", "vanished", "undefined".
        projector_weights: (K,), factors for parameters that only one objective uses; None: those
            are ``weights``.
        parts: (P, K, K), ``gram`` before it was summed over levels.
        seen: (K, K), the Gram matrix that the rule saw, where it is not ``gram``.
    """

    weights: Tensor
    gram: Tensor | None
    losses: Tensor
    fallback: str = ""
    projector_weights: Tensor | None = None
    parts: Tensor | None = None
    seen: Tensor | None = None

    def factors(self, objective: int, is_own: bool) -> float:
        """
        Return what the objective's gradient is multiplied by for parameters besides the shared:
        those that nothing else uses (projectors) if ``is_own``, else borrowed ones.
        """
        own = self.projector_weights if is_own else None
        return float((self.weights if own is None else own)[objective])


class Balancer:
    """
    A rule with rescaling, running means, weights held for several steps, and a schedule.

    Its state changes by plain assignment only, so that ``load_state_dict(state_dict())`` of an
    earlier moment undoes a step (one that mixed precision skips).

    Attributes:
        weights: (K,), of the latest step that computed them, before the schedule; or None.
        projector_weights: (K,), of the same step; None if those are the weights.
    """

    def __init__(
        self,
        rule: Rule,
        rescale: str = "none",
        smoothing: float | None = None,
        interval: int | None = None,
        schedule: Schedule | None = None,
        steps: int | None = None,
    ):
        """
        ValueError for options out of range, and those that change nothing with this rule.

        Args:
            rescale: a key of ``RESCALES``.
            smoothing: in [0, 1): the rule sees a :class:`RunningGram` with this share of the past
                a step (and :class:`RunningLosses`, if it averages losses). None: the rule's own.
            interval: compute weights in the first and then in every k-th step, and reuse them in
                between. None: the rule's own.
            schedule: factors of all weights but the task's. Two numbers: at the first and at the
                last step, a straight line in between. Pairs (share of the training, factor), from
                share 0 to share 1: straight lines from one to the next, such as a warm-up, a
                plateau and a decay. None: the rule's own.
            steps: of the whole training; needed if the schedule is not constant.
        """
        if rescale not in RESCALES:
            raise ValueError(
                f"MOKD.BALANCING.RESCALE is '{rescale}': expected one of "
                f"{', '.join(map(repr, RESCALES))}."
            )
        if smoothing and not (rule.reads_gradients or rule.averages_losses):
            raise ValueError(
                f"MOKD.BALANCING.SMOOTHING is {smoothing}, but rule '{rule.name}' does not look at "
                "gradients, so that nothing is averaged: set it to None."
            )
        smoothing = rule.smoothing if smoothing is None else smoothing
        if not (isinstance(smoothing, (int, float)) and 0 <= smoothing < 1):
            raise ValueError(f"MOKD.BALANCING.SMOOTHING is {smoothing}: expected 0 <= s < 1.")
        interval = rule.interval if interval is None else interval
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"MOKD.BALANCING.INTERVAL is {interval}: expected 1 or more steps.")
        self.rule, self.rescale, self.smoothing, self.interval = rule, rescale, smoothing, interval
        self.schedule = _points(rule.schedule if schedule is None else schedule, steps)
        self.steps, self.step = steps, 0
        self.weights: Tensor | None = None
        self.projector_weights: Tensor | None = None
        self._gram = RunningGram(smoothing) if smoothing and rule.reads_gradients else None
        self._losses = RunningLosses(smoothing) if smoothing and rule.averages_losses else None
        self._measured, self._measures = -1, False  # the latest such step before this one; this one

    @property
    def due(self) -> bool:
        """Whether this step computes weights; else it reuses them."""
        # The last of each interval, so that logs of every 20th step have measured ones.
        return self.weights is None or (self.step + 1) % self.interval == 0

    @property
    def needs_second_forward(self) -> bool:
        """Whether the rule wants the losses of this step's batch again, after the step."""
        return self.due and self.rule.needs_second_forward

    def end_step(self) -> None:
        if self._measures:
            self._measured, self._measures = self.step, False
        self.step += 1

    def weigh(
        self,
        parts: Tensor,
        losses: Tensor,
        agree: Callable[[Tensor], Tensor] | None = None,
        outside: Tensor | None = None,
    ) -> Decision:
        """
        Args:
            parts: (P, K, K) Gram matrices of the gradients, see :func:`gram_by_part`.
            losses: (K,). One below zero is a ValueError if the rule needs positive ones.
            outside: (K,) of :func:`outside_support`, for a rule that ``reads_support``.
            agree: from this process's (3, K) weights, projector weights and whether there was no
                fallback to those of all.
        """
        # In double, so that 1e-6 differences of norms survive, and in one copy to the CPU, because
        # each makes it wait for a GPU.
        pack = [parts.detach().flatten(), losses.detach(), *([] if outside is None else [outside])]
        packed = torch.cat([x.to(parts) for x in pack]).to("cpu", torch.float64)
        pieces = packed.split([x.numel() for x in pack])
        parts, losses = pieces[0].view_as(parts), pieces[1]
        gram = parts.sum(0)
        self._measures = True
        steps = max(self.step - self._measured, 1)  # this stands for those since the one before
        seen, seen_losses = gram, losses
        if gram.isfinite().all() and losses.isfinite().all():
            if outside is not None:
                seen = on_support(gram, pieces[2])
            if self._gram is not None:
                seen = self._gram.update(seen, steps)
            if self._losses is not None:
                seen_losses = self._losses.update(losses, steps)
        weights, own, fallback = self._ask(seen, seen_losses)
        usual = torch.full_like(weights, not fallback)
        if agree:  # do not branch on local state before
            given = torch.stack([weights, weights if own is None else own, usual])
            weights, own, usual = agree(given)
            own = own if self.rule.weighs_projectors else None
        if usual.all():  # fallback weights are never cached
            self.weights, self.projector_weights = weights, own
        seen_other = None if seen is gram else seen
        return Decision(self._scheduled(weights), gram, losses, fallback, own, parts, seen_other)

    def reuse(self) -> Decision:
        """Return the latest weights again, under this step's schedule."""
        assert self.weights is not None, "[Balancer] there are no weights to reuse"
        weights = self._scheduled(self.weights)
        return Decision(weights, None, torch.empty(0), projector_weights=self.projector_weights)

    def _ask(self, gram: Tensor, losses: Tensor) -> tuple[Tensor, Tensor | None, str]:
        """
        Return weights, projector weights or None, and the fallback. The rule is asked, unless:

        * a gradient or loss is not finite: the plain sum; the trainer's check of the loss speaks;
        * a gradient vanishes beside the others (the student matches its teacher already): the
          min-norm point is zero and training would stall, so the rule decides among the others; if
          only one is left, or the task has vanished, the others get weight one each;
        * it has no finite answer (an update of zero has no norm to rescale): the plain sum.
        """
        ones = torch.ones(len(gram), dtype=torch.float64)
        if not (gram.isfinite().all() and losses.isfinite().all()):
            return ones, None, "non_finite"
        self._check_signs(losses)
        vanished = vanishing(gram)
        fallback, kept = "", torch.arange(len(gram))
        if vanished.any() and not self.rule.takes_vanishing_gradients:
            kept = (~vanished).nonzero().flatten()
            if vanished[0] or len(kept) < 2:
                return ones if vanished.all() else (~vanished).double(), None, "vanished"
            fallback = "vanished"
        among, rule = gram[kept][:, kept], self.rule.among(kept.tolist())
        weights = self._answer(rule.weights(among, losses[kept].clamp_min(LOSS_FLOOR)), among)
        weights = RESCALES[self.rescale](weights, among)
        own = None
        if self.rule.weighs_projectors:
            own = self._answer(rule.projector_weights(among), among)
        if not (weights.isfinite().all() and (own is None or own.isfinite().all())):
            return ones, None, "undefined"
        zeros = torch.zeros_like(ones)
        own = None if own is None else zeros.index_copy(0, kept, own)
        return zeros.index_copy(0, kept, weights), own, fallback

    def _answer(self, weights: Any, gram: Tensor) -> Tensor:
        if not isinstance(weights, Tensor) or weights.shape != gram.shape[:1]:
            got = getattr(weights, "shape", type(weights).__name__)
            raise ValueError(
                f"Rule '{self.rule.name}' returned {got}: expected a tensor ({len(gram)},), a "
                "weight for each objective whose gradient does not vanish."
            )
        return weights.double()

    def _check_signs(self, losses: Tensor) -> None:
        # Not by less than rounding: a divergence of two equal distributions may end below zero.
        if self.rule.needs_positive_losses and (losses < -1e-4 * losses.abs().max()).any():
            raise ValueError(
                f"MOKD.BALANCING.RULE '{self.rule.name}' weighs losses by their values, but those "
                f"of the objectives are {losses.tolist()}: give the negative one a form that is "
                "zero at best (1 - cosine), or choose the rule 'cosine_gate' or 'fixed'."
            )

    def _scheduled(self, weights: Tensor) -> Tensor:
        # A constant schedule may come without the number of steps.
        done = min(self.step / max((self.steps or 1) - 1, 1), 1.0)
        factor = self.schedule[-1][1]
        for (start, first), (end, last) in zip(self.schedule, self.schedule[1:]):
            if start <= done < end:
                factor = first + (last - first) * ((done - start) / (end - start))
                break
        return torch.cat([weights[:1], weights[1:] * factor])

    def state_dict(self) -> dict[str, Any]:
        return {
            "rule_name": self.rule.name,
            "step": self.step,
            "measured": self.step if self._measures else self._measured,
            "weights": self.weights,
            "projector_weights": self.projector_weights,
            "gram": self._gram.state_dict() if self._gram else None,
            "losses": self._losses.state_dict() if self._losses else None,
            "rule": self.rule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave; ValueError if it is another rule's."""
        if state["rule_name"] != self.rule.name:
            raise ValueError(
                f"MOKD.BALANCING.RULE was {state['rule_name']} in the checkpoint and is "
                f"{self.rule.name} now. Resume with the same rule, or start a new run (another "
                "OUTPUT_DIR) with the checkpoint as MODEL.WEIGHTS."
            )
        self.step, self.weights = state["step"], state["weights"]
        self._measured, self._measures = state.get("measured", self.step - 1), False
        self.projector_weights = state["projector_weights"]
        # One side has none where SMOOTHING was or is 0.
        for mean, values in ((self._gram, state["gram"]), (self._losses, state["losses"])):
            if mean is not None and values is not None:
                mean.load_state_dict(values)
        self.rule.load_state_dict(state["rule"])


def _points(schedule: Schedule, steps: int | None) -> tuple[tuple[float, float], ...]:
    """A schedule as pairs (share of the training, factor)."""
    given = schedule if isinstance(schedule, (list, tuple)) else ()
    if len(given) == 2 and all(map(_is_number, given)):
        given = [(0.0, given[0]), (1.0, given[1])]
    points = [tuple(x) for x in given if isinstance(x, (list, tuple)) and len(x) == 2]
    shares = [share for share, _ in points]
    if (
        len(points) < max(len(given), 2)
        or not all(map(_is_number, itertools.chain(*points)))
        or [shares[0], shares[-1]] != [0, 1]
        or any(a >= b for a, b in zip(shares, shares[1:]))
    ):
        raise ValueError(
            f"MOKD.BALANCING.SCHEDULE is {schedule}: expected two finite numbers >= 0, the factors "
            "at the first and at the last step; or pairs [share of the training, factor] whose "
            "shares rise from 0 to 1, such as [[0, 0], [0.1, 1], [0.8, 1], [1, 0.1]]."
        )
    if len({factor for _, factor in points}) > 1 and steps is None:
        raise ValueError(
            f"The schedule {list(schedule)} needs the number of all steps, and steps is None: "
            "give it, or the schedule (1.0, 1.0)."
        )
    return tuple((float(share), float(factor)) for share, factor in points)


def _is_number(value: Any) -> bool:
    is_bool = isinstance(value, bool)
    return isinstance(value, (int, float)) and not is_bool and 0 <= value < math.inf
