# Copyright (c) The mokd_det authors.
"""Data sets from the config, their checks, and training loaders that can resume."""

from .. import compat  # first: patches Detectron2 where it needs it
from .augmentation import CheckedMapper, RandomChannelGain, build_train_mapper
from .catalog import check_datasets, register_coco, register_datasets
from .checks import check_detection_sets, check_head, write_json
from .classes import check_classes, check_teacher_classes, known_class_names
from .classes import trained_class_names
from .coco import check_coco, read_coco
from .images import BROKEN_IMAGES, ImageError, check_for_detector, check_images, read_rgb
from .images import vanishes
from .loader import SAMPLERS, ResumableLoader, build_resumable_train_loader, build_test_loader
from .loader import isolated_rng, resumable_loader, workers_that_outlive_signals
from .paths import datasets_root, local_path
from .proposals import check_proposals
from .report import Report
from .schedule import UNITS, schedule_in_iterations
