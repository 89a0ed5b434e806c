# Copyright (c) The mokd_det authors.
"""The distillation model, and stock models for Detectron2 to build: classifiers, backbones."""

from .. import compat  # noqa: F401  (first: patches Detectron2 where it needs it)
from .acceleration import accelerate_student, check_acceleration
from .backbone_tap import replace_backbone_features
from .classifier import Classifier, default_tap, load_trained_classifier
from .classifier_taps import TapShape, as_map, common_grid, find_taps, replace_taps
from .distillation import DistillationModel, check_balancing
from .inherit import copy_weights, inheritable_names
from .lazy_config import LazyConfigDetector, load_lazy_config
from .loading import StrictCheckpointer
from .networks import CLASSIFIERS, build_network, implied_options, input_normalisation
from .state import RestoredState, module_numbers, set_module_numbers
from .supervised_model import SupervisedModel
from .torchvision_backbone import TorchvisionBackbone

__all__ = [
    "CLASSIFIERS",
    "Classifier",
    "DistillationModel",
    "LazyConfigDetector",
    "RestoredState",
    "StrictCheckpointer",
    "SupervisedModel",
    "TapShape",
    "TorchvisionBackbone",
    "accelerate_student",
    "as_map",
    "build_network",
    "check_acceleration",
    "check_balancing",
    "common_grid",
    "copy_weights",
    "default_tap",
    "find_taps",
    "implied_options",
    "inheritable_names",
    "input_normalisation",
    "load_lazy_config",
    "load_trained_classifier",
    "module_numbers",
    "replace_backbone_features",
    "replace_taps",
    "set_module_numbers",
]
