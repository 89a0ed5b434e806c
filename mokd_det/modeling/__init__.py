# Copyright (c) The mokd_det authors.
"""Detectron2 side: the distillation model, its teacher, and torchvision models as backbones."""

from .distillation_model import DistillationModel, build_level_map
from .loading import StrictCheckpointer, load_trained_model
from .teacher import Teacher, build_teacher
from .torchvision_backbone import TorchvisionBackbone

__all__ = [
    "DistillationModel",
    "StrictCheckpointer",
    "Teacher",
    "TorchvisionBackbone",
    "build_level_map",
    "build_teacher",
    "load_trained_model",
]
