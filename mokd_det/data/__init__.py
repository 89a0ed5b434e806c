# Copyright (c) The mokd_det authors.
"""Data sets from the config, VOC reading, and training loaders that can resume."""

from .. import compat  # first: patches Detectron2 where it needs it
from .augmentation import RandomChannelGain, build_train_mapper, check_augmentation
from .catalog import check_classes, check_datasets, check_teacher_classes, register_datasets
from .loader import ResumableLoader, build_resumable_train_loader, isolated_rng
from .paths import datasets_root, local_path
from .schedule import check_schedule, schedule_in_iterations
