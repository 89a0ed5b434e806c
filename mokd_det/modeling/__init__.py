# Copyright (c) The mokd_det authors.
"""Detectron2 side: the distillation models, their teachers, torchvision's networks in them."""

from .acceleration import accelerate_student, check_acceleration
from .classification import (
    CLASSIFIERS,
    Classifier,
    is_classifier,
    stock_module,
    teacher_images,
    without_initial_weights,
)
from .distillation_model import DistillationModel
from .feature_objective import FeatureObjective, build_level_map
from .inherit import copy_weights, inheritable_names
from .lazy_config import LazyConfigDetector
from .loading import StrictCheckpointer
from .output_objective import OutputObjective
from .outputs import Outputs, build_output_reader
from .state import RestoredState, module_numbers, set_module_numbers
from .supervised_model import SupervisedModel
from .teacher import Teacher, TeacherView, build_teacher
from .torchvision_backbone import TorchvisionBackbone
from .trained import load_trained_model, teacher_config

__all__ = [
    "CLASSIFIERS",
    "Classifier",
    "DistillationModel",
    "FeatureObjective",
    "LazyConfigDetector",
    "OutputObjective",
    "Outputs",
    "RestoredState",
    "StrictCheckpointer",
    "SupervisedModel",
    "Teacher",
    "TeacherView",
    "TorchvisionBackbone",
    "accelerate_student",
    "build_level_map",
    "build_output_reader",
    "build_teacher",
    "check_acceleration",
    "copy_weights",
    "inheritable_names",
    "is_classifier",
    "load_trained_model",
    "module_numbers",
    "set_module_numbers",
    "stock_module",
    "teacher_config",
    "teacher_images",
    "without_initial_weights",
]
