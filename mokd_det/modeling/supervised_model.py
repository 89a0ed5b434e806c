# Copyright (c) The mokd_det authors.
"""A student without a teacher, for the same training step."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..balancing import Boundary, Branch, Parameters


class SupervisedModel(nn.Module):
    """With :class:`DistillationModel`'s interface, for options Detectron2's trainer lacks."""

    names = ("task",)

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student
        self.objectives = nn.ModuleDict()
        self.boundary = NoBalancing()
        self.inference: Callable[..., Any] = student.__call__

    @property
    def device(self) -> torch.device:  # a detector of your own may have no name for it
        return next(self.student.parameters()).device

    def forward(self, batch: Any) -> Any:
        """Return ``{"task": losses}`` in training; what the student returns in evaluation."""
        return {"task": self.student(batch)} if self.training else self.inference(batch)


class NoBalancing(Boundary):
    """A single objective has nothing to be weighed against."""

    def __init__(self):
        super().__init__(balancer=None)

    def _split(
        self, features: Mapping[str, Tensor], parameters: Mapping[str, Parameters]
    ) -> dict[str, Branch]:
        return {name: Branch(dict(features), {}) for name in parameters}

    def _accumulate(self, losses: Mapping[str, Tensor]) -> None:
        self._backward(losses)

    def _finish(self, parameters: Iterable[nn.Parameter]) -> None:
        return None
