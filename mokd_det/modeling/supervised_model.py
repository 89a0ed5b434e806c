# Copyright (c) The mokd_det authors.
"""A detector without a teacher, for the same training step."""

from detectron2.modeling import build_model as build_detector
from torch import nn

from ..balancing import Boundary

__all__ = ["SupervisedModel"]


class SupervisedModel(nn.Module):
    """
    The student alone, with the interface of :class:`DistillationModel`: for its from-scratch twin
    in training options that Detectron2's own trainer does not have.
    """

    def __init__(self, student):
        super().__init__()
        self.student = student
        self.projectors = nn.ModuleDict()
        self.boundary = NoBalancing()
        self.inference = student.__call__

    @classmethod
    def from_config(cls, cfg):
        return cls(build_detector(cfg))

    @property
    def device(self):
        # A detector of your own may have no name for it.
        return next(self.student.parameters()).device

    def forward(self, batched_inputs):
        """Return ``{"task": losses}`` in training; what the student returns in evaluation."""
        if not self.training:
            return self.inference(batched_inputs)
        return {"task": self.student(batched_inputs)}


class NoBalancing(Boundary):
    """A single objective has nothing to be weighed against."""

    def __init__(self):
        super().__init__(balancer=None)

    def accumulate(self, losses):
        self._backward(losses)

    def finish(self, parameters=()):
        return None
