# Copyright (c) The mokd_det authors.
"""``mokd train`` of a Python config (LazyConfig): one run, from its arguments to its results."""

import argparse
from typing import Any

from .. import compat  # noqa: F401  (first: patches Detectron2 where it needs it)
from detectron2.config import CfgNode
from detectron2.utils import comm
from omegaconf import DictConfig

from ..command_line import errors_as_messages, import_modules
from ..config import config_path, trust_files
from ..engine import FolderBefore, LazyTrainer, claim_folder, evaluate_lazy, find_checkpoint
from ..engine import on_main_process, output_errors, read_lazy, say_summary, start_logs
from ..engine import write_options, write_student
from .training import print_next_steps, print_results


def read(args: argparse.Namespace) -> DictConfig:
    """Return the config; ValueError: also for options that only YAML configs have."""
    for option in ("with_teacher", "zoo_row", "overwrite"):
        if getattr(args, option):
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is for YAML configs: leave it out for a Python config.")
    trust_files(args.trust)
    import_modules(args.imports)  # a process of --num-gpus has not
    args.config_file = config_path(args.config_file)  # Detectron2 copies it into the log
    return read_lazy(args.config_file, args.opts)


def say_start(cfg: DictConfig, trainer: LazyTrainer) -> str:
    """Write what is known before the first step; return the student's config as YAML."""
    write_options(trainer.cfg)
    student = write_student(cfg, trainer.cfg)
    is_evaluated = cfg.dataloader.get("evaluator") is not None
    say_summary(
        trainer.cfg,
        trainer,
        trainer.start_iter,
        trainer.cfg.DATASETS.TEST or ["dataloader.test"] * is_evaluated,
    )
    return student


def main(args: argparse.Namespace) -> Any:
    with errors_as_messages(args.debug):
        cfg = read(args)
        folder = cfg.train.output_dir
        before = FolderBefore(folder)
        if not args.eval_only:
            claim_folder(CfgNode({"OUTPUT_DIR": folder}), args.resume)
        elif args.resume and (last := on_main_process(find_checkpoint, folder)):
            cfg.train.init_checkpoint = last
        with before.restored_on_error():
            start_logs(cfg, folder, args)
        if args.eval_only:
            before.keep_config()
    with errors_as_messages(args.debug), output_errors(folder):
        if args.eval_only:
            results = evaluate_lazy(cfg)
        else:
            with before.restored_on_error():
                trainer = LazyTrainer(cfg)
                trainer.resume_or_load(args.resume)
            student = say_start(cfg, trainer) if comm.is_main_process() else ""
            results = trainer.run()
        if comm.is_main_process() and results:
            print_results(results, folder)
        if comm.is_main_process() and not args.eval_only:
            print_next_steps(args, folder, student)
    return results
