# Copyright (c) The mokd_det authors.
"""A running mean of the student's weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .checkpoints import RunCheckpointer
from .identity import RunIdentity


class WeightAverage:
    """
    Exponential moving average of parameters and buffers, by torch's ``AveragedModel``.

    The decay grows to its final value, ``min(decay, (1 + n) / (10 + n))`` after n steps, so that
    the random initial weights are forgotten in short runs as well.
    """

    def __init__(self, student: nn.Module, decay: float):
        """The student is copied; the decay is in (0, 1)."""

        @torch.no_grad()
        def update(means, values, _steps):
            if means[0].is_floating_point():
                now = min(decay, (1 + self.steps) / (10 + self.steps))
                get_ema_multi_avg_fn(now)(means, values, None)
            else:
                for mean, value in zip(means, values):
                    mean.copy_(value)

        self.steps = 0
        self._average = AveragedModel(student, multi_avg_fn=update, use_buffers=True)
        self.model = self._average.module.eval().requires_grad_(False)

    def update(self, student: nn.Module) -> None:
        self._average.update_parameters(student)
        self.steps += 1

    # The averaged weights themselves are the checkpoint's "model".
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self._average.n_averaged.fill_(self.steps)


class AverageCheckpointer(RunCheckpointer):
    """
    The checkpointer for a student with or without a running mean. With one, the mean is
    the model, and whatever is loaded as the model is where the student starts, too (its own
    weights, if a checkpoint to resume from has them, follow).
    """

    def __init__(
        self,
        student: nn.Module,
        average: WeightAverage | None,
        save_dir: str,
        run: RunIdentity,
        stock_module: Callable[[nn.Module], nn.Module] = lambda model: model,
        **others: Any,
    ):
        """``stock_module``: of the task; ``others``: what else is saved."""
        self.student, self.average = stock_module(student), average
        model = self.student
        if average is not None:
            model = stock_module(average.model)
            others["student"] = self.student
        super().__init__(model, save_dir, run, **others)

    def _load_model(self, checkpoint):
        if self._resumes and self.average is None and "student" in checkpoint:
            raise ValueError(
                "SOLVER.EMA_DECAY is 0, but the checkpoint to resume from has a running mean: set "
                "it again, or start a new run (another OUTPUT_DIR) with it as MODEL.WEIGHTS."
            )
        incompatible = super()._load_model(checkpoint)
        if self.average is not None:
            self.student.load_state_dict(self.model.state_dict())
        return incompatible
