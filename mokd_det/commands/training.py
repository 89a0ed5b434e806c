# Copyright (c) The mokd_det authors.
"""``mokd train``: one run, from its arguments to its results."""

import argparse
import json
from typing import Any

from .. import compat  # noqa: F401  (first: patches Detectron2 where it needs it)
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..command_line import USUAL, errors_as_messages, import_modules
from ..config import check_device, config_path, load_config, trust_files
from ..data import check_teacher_classes
from ..engine import (
    DistillationTrainer,
    FolderBefore,
    Trainer,
    build_trainer,
    checkpoints_in,
    claim_folder,
    find_checkpoint,
    next_steps,
    on_main_process,
    output_errors,
    prepare_datasets,
    replacing_run,
    say_summary,
    start_logs,
    validate,
)
from ..evaluation import (
    finite,
    format_comparison,
    format_zoo_row,
    headlines,
    write_results,
    zoo_row,
)
from ..files import replace_file
from ..tasks import task_of


Results = dict[str, Any]  # of Detectron2's DefaultTrainer.test


def check_arguments(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Raise ValueError or FileNotFoundError for what the command line alone decides."""
    if args.zoo_row and not cfg.DATASETS.TEST:
        raise ValueError("--zoo-row needs DATASETS.TEST, which is empty: name a data set.")
    if args.with_teacher and not args.eval_only:
        raise ValueError("--with-teacher evaluates: use it together with --eval-only.")
    if args.with_teacher and not cfg.MOKD.ENABLED:
        raise ValueError("--with-teacher needs a config with MOKD.ENABLED True, which names one.")
    if args.with_teacher and cfg.MOKD.TEACHER.TORCHSCRIPT.FILE:
        raise ValueError(
            "--with-teacher needs a detector: MOKD.TEACHER.TORCHSCRIPT.FILE gives features only."
        )
    if cfg.TEST.AUG.ENABLED:
        raise ValueError(
            "TEST.AUG.ENABLED True is not supported: set it to False, or evaluate the exported "
            "checkpoint with Detectron2's own tools/train_net.py."
        )
    if args.overwrite and (args.resume or args.eval_only):
        other = "--resume" if args.resume else "--eval-only"
        raise ValueError(f"--overwrite starts a new run: leave it out, or {other}.")
    weights = cfg.MODEL.WEIGHTS
    goes_on = args.resume and checkpoints_in(cfg.OUTPUT_DIR)
    if not goes_on and weights and "://" not in weights and not PathManager.isfile(weights):
        raise FileNotFoundError(f"MODEL.WEIGHTS '{weights}' does not exist.")


def setup(args: argparse.Namespace) -> tuple[CfgNode, FolderBefore]:
    """
    Read the config, check all that can be checked before data and weights, start logging. Return
    the config, and what its OUTPUT_DIR held before.
    """
    trust_files(args.trust)
    import_modules(args.imports)  # a process of --num-gpus has not
    cfg = load_config(args.config_file, args.opts)
    args.config_file = config_path(args.config_file)  # Detectron2 copies it into the log
    check_arguments(args, cfg)
    # To evaluate the student, neither the teacher nor the training's options matter.
    task = validate(cfg, is_training=args.with_teacher or not args.eval_only)
    prepare_datasets(cfg, task, is_training=not args.eval_only)
    check_device(cfg)
    cfg.freeze()
    before = FolderBefore(cfg.OUTPUT_DIR)
    if not args.eval_only:
        claim_folder(cfg, args.resume, args.overwrite)
    with before.restored_on_error():
        start_logs(cfg, cfg.OUTPUT_DIR, args)
    if args.eval_only:
        before.keep_config()
    return cfg, before


def with_weights(cfg: CfgNode, weights: str) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = weights
    return cfg


def evaluate(
    args: argparse.Namespace, cfg: CfgNode, before: FolderBefore
) -> tuple[Results, CfgNode]:
    """
    Evaluate the plain model of ``cfg`` on DATASETS.TEST (with --resume: its last weights). Return
    the results, and the config with these weights.
    """
    task = task_of(cfg)
    with before.restored_on_error():
        if args.resume and (last := on_main_process(find_checkpoint, cfg.OUTPUT_DIR)):
            cfg = with_weights(cfg, last)
        student = task.load_trained(cfg)
        task.check_model(cfg, student, ["TEST"])
        if args.with_teacher:  # what may be wrong with it is found before the student is evaluated
            teacher_cfg = task.teacher_config(cfg)
            check_teacher_classes(cfg, teacher_cfg, "--with-teacher")
            teacher_cfg.DATASETS = cfg.DATASETS
            teacher_cfg.OUTPUT_DIR = f"{cfg.OUTPUT_DIR}/teacher"
            teacher_task = task_of(teacher_cfg)
            teacher = teacher_task.load_trained(teacher_cfg, task.teacher_weights_option(cfg))
            teacher_task.check_model(teacher_cfg, teacher, ["TEST"])
    results = Trainer.test(cfg, student)
    if args.with_teacher:
        PathManager.mkdirs(teacher_cfg.OUTPUT_DIR)
        teacher_results = Trainer.test(teacher_cfg, teacher)
        if comm.is_main_process():
            print(f"Results: {write_results(teacher_results, teacher_cfg.OUTPUT_DIR)}")
            print(format_comparison({"teacher": teacher_results, "student": results}))
    return results, cfg


def train(args: argparse.Namespace, cfg: CfgNode, before: FolderBefore) -> tuple[Results, CfgNode]:
    """Train, and evaluate as the config says; return as :func:`evaluate`."""
    with before.restored_on_error(), replacing_run(cfg.OUTPUT_DIR, args.overwrite):
        trainer = build_trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
    if comm.is_main_process() and isinstance(trainer, DistillationTrainer):
        # What stock Detectron2 needs to use the student.
        text = task_of(cfg).stock_config(trainer.cfg).dump().encode()
        replace_file(f"{cfg.OUTPUT_DIR}/student.yaml", lambda f: f.write(text))
    if comm.is_main_process():
        say_summary(trainer.cfg, trainer._trainer, trainer.start_iter)
    trainer.train()
    results = getattr(trainer, "_last_eval_results", {})
    return results, with_weights(cfg, f"{cfg.OUTPUT_DIR}/model_final.pth")


def write_zoo_row(args: argparse.Namespace, cfg: CfgNode, results: Results) -> None:
    """Write ``zoo_row.json``, and print the row."""
    one_by_one = cfg.clone()
    one_by_one.defrost()
    one_by_one.TEST.BATCH_SIZE = 1
    loader = Trainer.build_test_loader(one_by_one, cfg.DATASETS.TEST[0])
    row = zoo_row(cfg, task_of(cfg).load_trained(cfg), results, args.config_file, loader)
    text = json.dumps(finite(row), indent=2).encode()
    replace_file(f"{cfg.OUTPUT_DIR}/zoo_row.json", lambda f: f.write(text))
    print(format_zoo_row(row))


def print_results(results: Results, output_dir: str) -> None:
    """Write them, too."""
    file = write_results(results, output_dir)
    print(*headlines(results), f"Results: {file}", sep="\n")


def print_next_steps(args: argparse.Namespace, output_dir: str, student: str = "") -> None:
    """Print what one does with a run's best weights; ``student``: see :func:`next_steps`."""
    if args.verbosity >= USUAL:
        best, final = (f"{output_dir}/model_{name}.pth" for name in ("best", "final"))
        weights = best if PathManager.isfile(best) else final
        print(next_steps(args.config_file, args.opts, output_dir, weights, args.imports, student))


def main(args: argparse.Namespace) -> Results:
    """Train or evaluate, as one of the processes; return the results of the last evaluation."""
    with errors_as_messages(args.debug):
        cfg, before = setup(args)
    with errors_as_messages(args.debug), output_errors(cfg.OUTPUT_DIR):  # with the run's logs
        results, cfg = (evaluate if args.eval_only else train)(args, cfg, before)
        if comm.is_main_process() and results:
            print_results(results, cfg.OUTPUT_DIR)
            if args.zoo_row:
                write_zoo_row(args, cfg, results)
        if comm.is_main_process() and not args.eval_only:
            print_next_steps(args, cfg.OUTPUT_DIR)
    return results
