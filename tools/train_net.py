#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Train or evaluate a detector or classifier, with distillation if the config has MOKD.ENABLED True.

Examples:
  # train the teacher, then distil the student
  python tools/train_net.py --config-file configs/Quick-Start/teacher.yaml
  python tools/train_net.py --config-file configs/Quick-Start/student_mokd.yaml

  # go on where a run stopped (by SIGTERM, SIGUSR1 or Ctrl-C it is saved first: exit code 143, 138,
  # 130); or start anew in its folder, without its checkpoints and logs
  python tools/train_net.py --config-file configs/Quick-Start/student_mokd.yaml --resume
  python tools/train_net.py --config-file configs/Quick-Start/student_mokd.yaml --overwrite

  # evaluate (the student only; no teacher is needed)
  python tools/train_net.py --config-file configs/Quick-Start/student_mokd.yaml --eval-only \\
      MODEL.WEIGHTS output/quick_start/student_mokd/model_final.pth

  # ... beside its teacher, and with a row for a model zoo: AP, speed, memory, parameters, FLOPs
  python tools/train_net.py --config-file configs/Quick-Start/student_mokd.yaml --eval-only \\
      --with-teacher --zoo-row MODEL.WEIGHTS output/quick_start/student_mokd/model_final.pth

  # classifiers alike; also with torchvision's own weights, to check their published accuracy
  python tools/train_net.py --config-file configs/ImageNet-Classification/resnet18.yaml \\
      --eval-only MODEL.CLASSIFIER.WEIGHTS IMAGENET1K_V1

  # several processes: --num-gpus N, or torchrun (also on the CPU)
  torchrun --nproc-per-node 2 tools/train_net.py --config-file ...

  # ... which start again, from the last checkpoint, when one of them dies
  torchrun --nproc-per-node 2 --max-restarts 3 tools/train_net.py --resume --config-file ...

Results are printed and written to OUTPUT_DIR/results.json; the teacher's to
OUTPUT_DIR/teacher/results.json, the row to OUTPUT_DIR/zoo_row.json.
"""

import argparse
import json

import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from mokd_det.command_line import add_debug, errors_as_messages
from mokd_det.config import check_device, load_config, trust_files
from mokd_det.data import check_teacher_classes
from mokd_det.engine import (
    DistillationTrainer,
    Trainer,
    add_timeout,
    build_trainer,
    checkpoints_in,
    claim_folder,
    find_checkpoint,
    launch,
    on_main_process,
    output_errors,
    prepare_datasets,
    replacing_run,
    validate,
)
from mokd_det.evaluation import finite, format_comparison, format_zoo_row, write_results, zoo_row
from mokd_det.tasks import task_of


def check_arguments(args, cfg):
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


def setup(args):
    """Read the config, check all that can be checked before data and weights, start logging."""
    trust_files(args.trust)
    cfg = load_config(args.config_file, args.opts)
    check_arguments(args, cfg)
    # To evaluate the student, neither the teacher nor the training's options matter.
    task = validate(cfg, is_training=args.with_teacher or not args.eval_only)
    prepare_datasets(cfg, task, is_training=not args.eval_only)
    check_device(cfg)
    cfg.freeze()
    if not args.eval_only:
        claim_folder(cfg, args.resume, args.overwrite)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="mokd_det", abbrev_name="mokd")
    return cfg


def with_weights(cfg, weights):
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = weights
    return cfg


def evaluate(args, cfg):
    """Evaluate the plain model of ``cfg`` on DATASETS.TEST (with --resume: its last weights)."""
    task = task_of(cfg)
    if args.resume and (last := on_main_process(find_checkpoint, cfg.OUTPUT_DIR)):
        cfg = with_weights(cfg, last)
    student = task.load_trained(cfg)
    task.check_model(cfg, student, ["TEST"])
    if args.with_teacher:  # what may be wrong with it is found before the student is evaluated
        teacher_cfg = task.teacher_config(cfg)
        check_teacher_classes(cfg, teacher_cfg, "--with-teacher")
        teacher_cfg.DATASETS = cfg.DATASETS
        teacher_cfg.OUTPUT_DIR = f"{cfg.OUTPUT_DIR}/teacher"
        PathManager.mkdirs(teacher_cfg.OUTPUT_DIR)
        teacher_task = task_of(teacher_cfg)
        teacher = teacher_task.load_trained(teacher_cfg, "MOKD.TEACHER.WEIGHTS")
        teacher_task.check_model(teacher_cfg, teacher, ["TEST"])
    results = Trainer.test(cfg, student)
    if args.with_teacher:
        teacher_results = Trainer.test(teacher_cfg, teacher)
        if comm.is_main_process():
            print(f"Results: {write_results(teacher_results, teacher_cfg.OUTPUT_DIR)}")
            print(format_comparison({"teacher": teacher_results, "student": results}))
    return results, cfg


def train(args, cfg):
    """Train, and evaluate as the config says."""
    with replacing_run(cfg.OUTPUT_DIR, args.overwrite):
        trainer = build_trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
    if comm.is_main_process() and isinstance(trainer, DistillationTrainer):
        # What stock Detectron2 needs to use the student.
        with PathManager.open(f"{cfg.OUTPUT_DIR}/student.yaml", "w") as f:
            f.write(task_of(cfg).stock_config(trainer.cfg).dump())
    trainer.train()
    results = getattr(trainer, "_last_eval_results", {})
    return results, with_weights(cfg, f"{cfg.OUTPUT_DIR}/model_final.pth")


def write_zoo_row(args, cfg, results):
    one_by_one = cfg.clone()
    one_by_one.defrost()
    one_by_one.TEST.BATCH_SIZE = 1
    loader = Trainer.build_test_loader(one_by_one, cfg.DATASETS.TEST[0])
    row = zoo_row(cfg, task_of(cfg).load_trained(cfg), results, args.config_file, loader)
    with PathManager.open(f"{cfg.OUTPUT_DIR}/zoo_row.json", "w") as f:
        json.dump(finite(row), f, indent=2)
    print(format_zoo_row(row))


def main(args):
    with errors_as_messages(args.debug):
        cfg = setup(args)
    with errors_as_messages(args.debug), output_errors(cfg.OUTPUT_DIR):  # with the run's logs
        results, cfg = evaluate(args, cfg) if args.eval_only else train(args, cfg)
        if comm.is_main_process() and results:
            print(f"Results: {write_results(results, cfg.OUTPUT_DIR)}")
            if args.zoo_row:
                write_zoo_row(args, cfg, results)
    return results


def argument_parser():
    parser = default_argument_parser(epilog=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--with-teacher", action="store_true", help="evaluate the teacher as well")
    parser.add_argument("--zoo-row", action="store_true", help="print a row for a model zoo")
    parser.add_argument("--trust", action="store_true", help="run the code in config files")
    parser.add_argument(
        "--overwrite", action="store_true", help="remove an earlier run in OUTPUT_DIR, start anew"
    )
    add_debug(parser)
    add_timeout(parser)
    return parser


if __name__ == "__main__":
    args = argument_parser().parse_args()
    launch(main, args)
