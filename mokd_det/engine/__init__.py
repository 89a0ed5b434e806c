# Copyright (c) The mokd_det authors.
"""The custom training step, Detectron2's default trainer around it, and launching."""

from .launch import launch
from .trainer import BalancedTrainer, DistillationTrainer, Trainer, build_trainer

__all__ = ["BalancedTrainer", "DistillationTrainer", "Trainer", "build_trainer", "launch"]
