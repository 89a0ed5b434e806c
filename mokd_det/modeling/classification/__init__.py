# Copyright (c) The mokd_det authors.
"""Classifiers: torchvision's, timm's and one's own, as students and as teachers."""

from .classifier import (
    Classifier,
    is_classifier,
    load_trained_classifier,
    stock_module,
    without_initial_weights,
)
from .distillation import ClassifierDistillationModel
from .networks import CLASSIFIERS, build_network
from .objectives import ClassifierFeatureObjective, LogitObjective
from .taps import PRE_LOGITS
from .teacher import (
    ClassifierTeacher,
    ClassifierView,
    build_classifier_teacher,
    classifier_teacher_config,
    teacher_images,
)

__all__ = [
    "CLASSIFIERS",
    "PRE_LOGITS",
    "Classifier",
    "ClassifierDistillationModel",
    "ClassifierFeatureObjective",
    "ClassifierTeacher",
    "ClassifierView",
    "LogitObjective",
    "build_classifier_teacher",
    "build_network",
    "classifier_teacher_config",
    "is_classifier",
    "load_trained_classifier",
    "stock_module",
    "teacher_images",
    "without_initial_weights",
]
