# Copyright (c) The mokd_det authors.
"""The custom training step, Detectron2's default trainer around it, checks, and launching."""

from .. import compat  # first: patches Detectron2 where it needs it
from ..command_line import add_timeout, errors_as_messages
from .checkpoints import checkpoints_in, find_checkpoint
from .console import start_logs
from .folder import FolderBefore, claim_folder, output_errors, release_folder, replacing_run
from .launch import launch, on_main_process
from .lazy import LazyTrainer, distil, evaluate_lazy, read_lazy
from .lazy_student import write_options, write_student
from .step import BalancedTrainer
from .summary import next_steps, say_summary
from .trainer import DistillationTrainer, Trainer, build_trainer, prepare_datasets
from .validate import validate
