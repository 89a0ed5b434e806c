#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Train or evaluate a detector, with distillation if the config has MOKD.ENABLED True.

Examples:
  # train the teacher, then distil the student
  python tools/train_net.py --config-file configs/Quick-Start/teacher.yaml
  python tools/train_net.py --config-file configs/Quick-Start/student_mokd.yaml

  # go on where a run stopped
  python tools/train_net.py --config-file configs/Quick-Start/student_mokd.yaml --resume

  # evaluate (the student only; no teacher is needed)
  python tools/train_net.py --config-file configs/Quick-Start/student_mokd.yaml --eval-only \\
      MODEL.WEIGHTS output/quick_start/student_mokd/model_final.pth

  # several processes: --num-gpus N, or torchrun (also on the CPU)
  torchrun --nproc-per-node 2 tools/train_net.py --config-file ...

Results are printed and written to OUTPUT_DIR/results.json.
"""

import argparse

import mokd_det  # noqa: F401  (first: mends Detectron2 where it needs it)
import torch
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from fvcore.common.checkpoint import Checkpointer

from mokd_det.config import load_config, stock_config
from mokd_det.data import check_datasets, register_datasets
from mokd_det.engine import DistillationTrainer, Trainer, build_trainer, launch
from mokd_det.evaluation import write_results
from mokd_det.modeling import load_trained_model


def setup(args):
    """Read the config, check it, and start logging."""
    cfg = load_config(args.config_file, args.opts)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is '{cfg.MODEL.DEVICE}', but torch sees no GPU. Add the override: "
            "MODEL.DEVICE cpu"
        )
    weights = cfg.MODEL.WEIGHTS
    if weights and "://" not in weights and not PathManager.isfile(weights):
        raise FileNotFoundError(f"MODEL.WEIGHTS '{weights}' does not exist.")
    cfg.freeze()
    register_datasets(cfg)
    default_setup(cfg, args)
    return cfg


def evaluate(cfg, resume):
    """Evaluate the plain detector of ``cfg`` on DATASETS.TEST (with --resume: its last weights)."""
    last = Checkpointer(torch.nn.Module(), cfg.OUTPUT_DIR)
    if resume and last.has_checkpoint():
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = last.get_checkpoint_file()
    check_datasets(cfg.DATASETS.TEST, "DATASETS.TEST")
    return Trainer.test(cfg, load_trained_model(cfg))


def main(args):
    cfg = setup(args)
    if args.eval_only:
        results = evaluate(cfg, args.resume)
    else:
        trainer = build_trainer(cfg)
        if comm.is_main_process() and isinstance(trainer, DistillationTrainer):
            # What stock Detectron2 needs to use the student.
            with PathManager.open(f"{cfg.OUTPUT_DIR}/student.yaml", "w") as f:
                f.write(stock_config(cfg).dump())
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
        results = getattr(trainer, "_last_eval_results", {})
    if comm.is_main_process() and results:
        print(f"Results: {write_results(results, cfg.OUTPUT_DIR)}")
    return results


def argument_parser():
    parser = default_argument_parser(epilog=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


if __name__ == "__main__":
    args = argument_parser().parse_args()
    launch(main, args)
