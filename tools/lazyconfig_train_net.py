#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Distil a detector that is described in Python (LazyConfig), as Detectron2's tool of this name does
without a teacher. Using a Python config runs it: read it first, then add --trust.

Examples:
  # train, and go on where a run stopped
  python tools/lazyconfig_train_net.py --trust \\
      --config-file configs/Quick-Start/student_retinanet_mokd.py
  python tools/lazyconfig_train_net.py --trust --resume \\
      --config-file configs/Quick-Start/student_retinanet_mokd.py

  # evaluate the student; no teacher is needed
  python tools/lazyconfig_train_net.py --trust --eval-only \\
      --config-file configs/Quick-Start/student_retinanet_mokd.py \\
      train.init_checkpoint=output/quick_start/student_retinanet_mokd/model_final.pth

Overrides are path.key=value. Results go to train.output_dir/results.json.
"""

import argparse

import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from mokd_det.command_line import add_debug, errors_as_messages
from mokd_det.config import trust_files
from mokd_det.engine import (
    FolderBefore,
    LazyTrainer,
    add_timeout,
    claim_folder,
    evaluate_lazy,
    launch,
    output_errors,
    read_lazy,
)
from mokd_det.evaluation import write_results


def setup(args):
    """Read the config and start logging; return it, its folder, and what that held before."""
    trust_files(args.trust)
    cfg = read_lazy(args.config_file, args.opts)
    folder = cfg.train.output_dir
    before = FolderBefore(folder)
    if not args.eval_only:
        claim_folder(CfgNode({"OUTPUT_DIR": folder}), args.resume)
    default_setup(cfg, args)
    setup_logger(folder, comm.get_rank(), name="mokd_det", abbrev_name="mokd")
    return cfg, folder, before


def main(args):
    with errors_as_messages(args.debug):
        cfg, folder, before = setup(args)
    with errors_as_messages(args.debug), output_errors(folder):
        if args.eval_only:
            results = evaluate_lazy(cfg)
        else:
            with before.restored_on_error():
                trainer = LazyTrainer(cfg)
                trainer.resume_or_load(args.resume)
            results = trainer.run()
        if comm.is_main_process() and results:
            print(f"Results: {write_results(results, folder)}")
    return results


def argument_parser():
    parser = default_argument_parser(epilog=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--trust", action="store_true", help="run the code in config files")
    add_debug(parser)
    add_timeout(parser)
    return parser


def device_of(args):
    with errors_as_messages(args.debug):
        trust_files(args.trust)
        return read_lazy(args.config_file, args.opts).train.device


if __name__ == "__main__":
    args = argument_parser().parse_args()
    launch(main, args, device_of(args))
