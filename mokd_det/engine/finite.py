# Copyright (c) The mokd_det authors.
"""Gradients and weights that are not finite: found before they do harm, and named."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ..balancing import Decision
from ..modeling import shortened

logger = logging.getLogger(__name__)

ON_NON_FINITE = ("raise", "skip")
REMEDY = (
    "Use a lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS, and look "
    "at the images of this step, and at the weights that a rule of your own gives."
)


class SkippedSteps:
    """
    What becomes of steps whose gradients are not finite: an error, or left out and counted.

    Attributes:
        total: number of skipped steps.
        in_a_row: number of those since the latest step that was taken.
    """

    def __init__(self, action: str = "raise", most: int = 10):
        """``action``: of ``ON_NON_FINITE``; ``most``: so many in a row are left out, not more."""
        self.skips, self.most = action == "skip", most
        self.total = self.in_a_row = 0

    def add(self, message: str) -> None:
        """Count a step; FloatingPointError with the message if it may not be left out."""
        if not self.skips:
            raise FloatingPointError(
                f"{message} {REMEDY} SOLVER.NON_FINITE_GRADIENTS 'skip' leaves out such steps."
            )
        if self.in_a_row == self.most:
            raise FloatingPointError(
                f"{message} So were those of the {self.most} steps before (the limit is "
                f"SOLVER.MAX_SKIPPED_STEPS). {REMEDY}"
            )
        self.total += 1
        self.in_a_row += 1
        logger.warning(f"{message} It is step {self.total} that is left out.")

    def taken(self) -> None:
        """Call after a step that was taken."""
        self.in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """
    Return the norm of all gradients, without waiting for it. If it is finite, all elements are;
    else squares of finite ones may have overflowed: see :func:`non_finite_gradients`.
    """
    # The optimizer has a list of them; that of a module is made each time, which takes longer than
    # the norm.
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return get_total_norm([p.grad for p in parameters if p.grad is not None])


def non_finite_gradients(model: nn.Module) -> list[str]:
    """Return the names of parameters whose gradients are not finite."""
    return non_finite({n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that have an infinite or NaN element."""
    if math.isfinite(get_total_norm(list(tensors.values()))):
        return []
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def raise_before_steps(
    optimizer: torch.optim.Optimizer, model: nn.Module, describe: Callable[[list[str]], str]
) -> None:
    """
    Let ``optimizer.step()`` raise FloatingPointError, before it does anything, if gradients are not
    finite; ``describe`` makes the message from names of parameters. (Loss scaling does not call
    it for a step that it skips.)
    """

    def check(*_: Any) -> None:
        if math.isfinite(gradient_norm(optimizer)):
            return
        if names := non_finite_gradients(model):
            SkippedSteps().add(describe(names))

    optimizer.register_step_pre_hook(check)


def describe(
    parameters: Sequence[str],
    losses: Mapping[str, float],
    iteration: int,
    origin: str = "",
) -> str:
    """Return sentences on a step with such gradients; ``origin``: of :func:`origin_of`."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    return (
        f"The gradient is not finite in iteration {iteration}, so the step was not taken. "
        f"{origin}Parameters: {shortened(parameters, 3)}. Losses: {values}."
    )


def origin_of(decision: Decision | None, objectives: Sequence[str], levels: Sequence[str]) -> str:
    """
    Return a sentence on whose gradient is not finite where it is measured, at these levels (none:
    at the parameters); "" if nothing was measured in this step.
    """
    if decision is None or decision.parts is None:
        return ""
    bad = ~decision.parts.diagonal(dim1=1, dim2=2).isfinite()  # (P, K)
    found = []
    for name, where in zip(objectives, bad.T):
        at = [level for level, is_bad in zip(levels, where) if is_bad]
        if where.any():
            found.append(f"{name} (at {', '.join(at)})" if at else name)
    if not found:
        return "That of every objective is still finite where they meet. "
    return f"It comes from {', '.join(found)}. "


def check_weights(modules: Mapping[str, nn.Module], last_checkpoint: str) -> None:
    """
    Raise FloatingPointError if a parameter is not finite, or a buffer NaN (masks are infinite).

    Args:
        modules: by the name of their entry in the checkpoint.
        last_checkpoint: the path of the latest one; "": there is none.
    """
    bad = [f"{key}.{n}" for key, module in modules.items() for n in _non_finite_weights(module)]
    if not bad:
        return
    good = f"The latest checkpoint is {last_checkpoint}: " if last_checkpoint else ""
    raise FloatingPointError(
        f"The checkpoint was not written, because weights are not finite: {shortened(bad, 3)}. "
        f"{good}{REMEDY}"
    )


def _non_finite_weights(module: nn.Module) -> list[str]:
    buffers = {n: b for n, b in module.named_buffers() if b.is_floating_point()}
    suspects = non_finite(buffers)
    return [
        *non_finite({n: p.detach() for n, p in module.named_parameters()}),
        *(name for name in suspects if buffers[name].isnan().any()),
    ]
