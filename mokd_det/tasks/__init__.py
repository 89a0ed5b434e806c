# Copyright (c) The mokd_det authors.
"""Kinds of models, one a file: how they are built, tapped, fed, checked and exported."""

from .. import compat  # first: patches Detectron2 where it needs it
from .base import TASKS, Task, task_of
from .classification import ClassificationTask
from .detection import RECIPES_FOR, DetectionTask
from .levels import build_level_map
from .torchvision_detection import TorchvisionDetectionTask
