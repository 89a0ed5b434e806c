# Copyright (c) The mokd_det authors.
"""Detectron2 side: the distillation model, its teacher, and torchvision models as backbones."""

from .acceleration import accelerate_student, check_acceleration
from .distillation_model import DistillationModel, build_level_map
from .loading import StrictCheckpointer, load_trained_model
from .state import RestoredState, module_numbers, set_module_numbers
from .supervised_model import SupervisedModel
from .teacher import Teacher, build_teacher
from .torchvision_backbone import TorchvisionBackbone

__all__ = [
    "DistillationModel",
    "RestoredState",
    "StrictCheckpointer",
    "SupervisedModel",
    "Teacher",
    "TorchvisionBackbone",
    "accelerate_student",
    "build_level_map",
    "build_teacher",
    "check_acceleration",
    "load_trained_model",
    "module_numbers",
    "set_module_numbers",
]
