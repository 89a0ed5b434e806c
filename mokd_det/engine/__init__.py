# Copyright (c) The mokd_det authors.
"""The custom training step, Detectron2's default trainer around it, and launching."""

from .launch import launch
from .step import BalancedTrainer
from .trainer import DistillationTrainer, Trainer, build_trainer

__all__ = ["BalancedTrainer", "DistillationTrainer", "Trainer", "build_trainer", "launch"]
