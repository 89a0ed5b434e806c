# Copyright (c) The mokd_det authors.
"""Data sets from the config, VOC reading, and a training loader that can resume."""

from .augmentation import RandomChannelGain, build_train_mapper
from .catalog import check_datasets, register_datasets
from .loader import ResumableLoader, build_resumable_train_loader, isolated_rng
from .paths import datasets_root, local_path

__all__ = [
    "RandomChannelGain",
    "ResumableLoader",
    "build_resumable_train_loader",
    "build_train_mapper",
    "check_datasets",
    "datasets_root",
    "isolated_rng",
    "local_path",
    "register_datasets",
]
