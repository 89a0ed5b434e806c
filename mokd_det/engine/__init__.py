# Copyright (c) The mokd_det authors.
"""The custom training step, Detectron2's default trainer around it, checks, and launching."""

from .. import compat  # first: patches Detectron2 where it needs it
from .launch import errors_as_messages, launch
from .step import BalancedTrainer
from .trainer import DistillationTrainer, Trainer, build_trainer, prepare_datasets
from .validate import validate
