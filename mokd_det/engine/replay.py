# Copyright (c) The mokd_det authors.
"""The losses of a step's batch again, under the parameters after the step."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor

from ..data import isolated_rng
from ..modeling import DistillationModel, RestoredState, module_numbers, set_module_numbers


class Replay:
    """
    Records what the forward passes of a step depend on, and runs them again: the same images,
    random numbers (dropout, sampled proposals) and teacher's outputs. Nothing of it stays: no
    gradient, no BatchNorm statistics, no random state, no log.
    """

    def __init__(self, model: DistillationModel):
        self.model = model
        self.calls: list[list[Any]] = []

    def before(self, batch: Any) -> None:
        """Call before a forward pass on ``batch``."""
        device = self.model.device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        numbers = module_numbers(self.model.student)
        self.calls.append([batch, torch.get_rng_state(), cuda, numbers, None])

    def after(self) -> None:
        """Call after it."""
        self.calls[-1][-1] = self.model.teacher_outputs
        self.model.teacher_outputs = None

    @torch.no_grad()
    def losses(self, context: Callable[[], AbstractContextManager]) -> Tensor:
        """Return (K,) means over the recorded passes; ``context`` makes what they ran in."""
        results = []
        # A storage of its own, at this iteration: no log of the second pass, no pictures of it.
        storage = EventStorage(get_event_storage().iter)
        with isolated_rng(), RestoredState(self.model), storage:
            for batch, cpu, cuda, numbers, teacher_outputs in self.calls:
                torch.set_rng_state(cpu)
                if cuda is not None:
                    torch.cuda.set_rng_state(cuda, self.model.device)
                set_module_numbers(self.model.student, numbers)
                with context():
                    objectives = self.model(batch, teacher_outputs)
                losses = [sum(parts.values()).float() for parts in objectives.values()]
                results.append(torch.stack(losses))
                self.model.teacher_outputs = None
        return torch.stack(results).mean(0)
