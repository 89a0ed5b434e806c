# Copyright (c) The mokd_det authors.
"""What a step's balance says, as scalars for the logs."""

import collections
import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..balancing import Decision, cosine, dominance, share, update_cosine

logger = logging.getLogger(__name__)

WINDOW, LONG_WINDOW = 100, 200  # steps
IDLE = 0.9  # of the long window: objectives that agree late have weight after some 150 steps
LEAST_COSINE = 0.1
COUNTS = ("fallbacks_degenerate", "fallbacks_non_finite")  # steps so far


class BalanceDiagnostics:
    """
    Counts fallbacks and dominated steps, and warns when the task is dominated: the update's cosine
    with its gradient was below 0.1 in more than half of the last 100 steps. (Not its share of the
    weights: an update of the teacher's alone serves the task if both agree.) Also when another
    objective had no weight in nearly all of the last 200, which the first steps alone are not.
    """

    def __init__(self, measured_at: str | None):
        self.prefix = f"balance/{measured_at}"
        self.degenerate = 0
        self.non_finite = 0
        self.dominated: collections.deque[bool] = collections.deque(maxlen=WINDOW)
        self.warned = self.warned_undefined = False
        # Objective -> whether it had no weight, of the last steps.
        self.idle: dict[str, collections.deque[bool]] = {}
        self.warned_idle: set[str] = set()

    def scalars(
        self, names: Sequence[str], decision: Decision, parts: Sequence[str] = ()
    ) -> dict[str, float]:
        """
        Return scalars of one step, of these objectives, by name; ``parts``: their names. Of a step
        that measured nothing there are the weights only.
        """
        self.non_finite += decision.fallback == "non_finite"
        self.degenerate += decision.fallback in ("vanished", "undefined")
        if decision.fallback == "undefined" and not self.warned_undefined:
            logger.warning(
                "The rule gave weights that are not finite: a step takes the plain sum then, and "
                f"{self.prefix}/{COUNTS[0]} counts such steps. Of a rule of your own, see its code."
            )
            self.warned_undefined = True
        counts = (self.degenerate, self.non_finite)
        values: dict[str, float] = dict(zip(COUNTS, counts))
        for i, name in enumerate(names):
            values[f"weight_{name}"] = float(decision.weights[i])
            if i > 0:
                self._count_idle(name, values[f"weight_{name}"] == 0)
        if decision.gram is None:  # what was measured last stands, in windows of steps
            self.dominated.extend(list(self.dominated)[-1:])
        elif decision.gram.isfinite().all():
            values |= self._measured(names, decision, decision.gram, parts)
        return {f"{self.prefix}/{name}": value for name, value in values.items()}

    def _measured(
        self, names: Sequence[str], decision: Decision, gram: Tensor, parts: Sequence[str]
    ) -> dict[str, float]:
        values = {
            "share_task": share(gram, decision.weights, 0),
            "update_cosine": update_cosine(gram, decision.weights, 0),
        }
        for i, name in enumerate(names[1:], start=1):
            values[f"cosine_{name}"] = cosine(gram, i, 0)
            values[f"dominance_{name}"] = dominance(gram, i, 0)
            if decision.seen is not None:
                values[f"seen_cosine_{name}"] = cosine(decision.seen, i, 0)
                values[f"seen_dominance_{name}"] = dominance(decision.seen, i, 0)
            if decision.parts is not None and len(decision.parts) == len(parts) > 1 and gram[i, i]:
                squares = decision.parts[:, i, i] / gram[i, i]
                values |= {
                    f"level_{name}_{part}": float(square)
                    for part, square in zip(parts, squares)
                    if square > 0
                }
        self.dominated.append(values["update_cosine"] < LEAST_COSINE)
        values["dominated"] = sum(self.dominated) / len(self.dominated)
        self._warn(values["dominated"])
        return values

    def _count_idle(self, name: str, idle: bool) -> None:
        steps = self.idle.setdefault(name, collections.deque(maxlen=LONG_WINDOW))
        steps.append(idle)
        if name not in self.warned_idle and sum(steps) >= IDLE * LONG_WINDOW:
            logger.warning(
                f"The objective '{name}' had no weight in {sum(steps)} of the last {len(steps)} "
                "steps: the rule finds it superfluous beside the others, in conflict with the task "
                "or unrelated to it. If it is to take part, use MOKD.BALANCING.RULE fixed; else "
                "leaving it out of MOKD.OBJECTIVES saves what it costs."
            )
            self.warned_idle.add(name)

    def _warn(self, dominated: float) -> None:
        if len(self.dominated) < WINDOW or dominated <= 0.5:
            self.warned = self.warned and dominated > 0.5
            return
        if not self.warned:
            logger.warning(
                "The task is dominated: the cosine of the update with its gradient at "
                f"{self.prefix.split('/')[1]} was below {LEAST_COSINE} in {dominated:.0%} of the "
                f"last {WINDOW} steps. Use less weight for distillation (LOSS_RATIO.RATIO, "
                "FIXED.WEIGHTS), or a rule that follows the task (MOKD.BALANCING.RULE loss_ratio "
                "or cosine_gate)."
            )
            self.warned = True

    def state_dict(self) -> dict[str, Any]:
        counts = {"degenerate": self.degenerate, "non_finite": self.non_finite}
        return {**counts, "dominated": list(self.dominated)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.degenerate = state["degenerate"]
        self.non_finite = state["non_finite"]
        self.dominated = collections.deque(state["dominated"], maxlen=WINDOW)
