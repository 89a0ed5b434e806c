# Copyright (c) The mokd_det authors.
"""The distillation model, and stock models for Detectron2 to build: classifiers, backbones."""

from .. import compat  # first: patches Detectron2 where it needs it
from .acceleration import accelerate_student, check_acceleration
from .classifier import Classifier, default_tap, load_trained_classifier
from .distillation import DistillationModel, check_balancing
from .focal_loss import uncompiled_focal_loss
from .inherit import copy_weights, inheritable_names
from .lazy_config import LazyConfigDetector, load_lazy_config
from .loading import SafeCheckpointer, StrictCheckpointer, shortened
from .network_facts import NetworkFacts, has_layer_norm, network_facts
from .networks import CLASSIFIERS, TIMM_PREFIX, build_network, check_name, classes_of_weights
from .networks import implied_options, input_normalisation, is_classifier_name
from .state import RestoredState, module_numbers, set_module_numbers
from .supervised_model import SupervisedModel
from .taps import TapShape, as_map, check_batch_norm, common_grid, find_taps
from .taps import replace_backbone_features, replace_taps
from .torchvision_backbone import TorchvisionBackbone
from .torchvision_detector import TorchvisionDetector
from .torchvision_networks import COCO_NAMES, check_detector_name, detector_names
