# Copyright (c) The mokd_det authors.
"""
Train or evaluate a detector or classifier, with distillation if the config has MOKD.ENABLED True.

Examples:
  # train the teacher, then distil the student
  mokd train --config-file configs/Quick-Start/teacher.yaml
  mokd train --config-file configs/Quick-Start/student_mokd.yaml

  # go on where a run stopped (by SIGTERM, SIGUSR1 or Ctrl-C it is saved first: exit code 143, 138,
  # 130); or start anew in its folder, without its checkpoints and logs
  mokd train --config-file configs/Quick-Start/student_mokd.yaml --resume
  mokd train --config-file configs/Quick-Start/student_mokd.yaml --overwrite

  # evaluate (the student only; no teacher is needed)
  mokd train --config-file configs/Quick-Start/student_mokd.yaml --eval-only \\
      MODEL.WEIGHTS output/quick_start/student_mokd/model_final.pth

  # ... beside its teacher, and with a row for a model zoo: AP, speed, memory, parameters, FLOPs
  mokd train --config-file configs/Quick-Start/student_mokd.yaml --eval-only \\
      --with-teacher --zoo-row MODEL.WEIGHTS output/quick_start/student_mokd/model_final.pth

  # classifiers alike; also with torchvision's own weights, to check their published accuracy
  mokd train --config-file configs/ImageNet-Classification/resnet18.yaml \\
      --eval-only MODEL.CLASSIFIER.WEIGHTS IMAGENET1K_V1

  # data sets, models or rules of yours, which a module registers
  mokd train --import my_data.py --config-file ...

  # several processes: --num-gpus N, or torchrun (also on the CPU)
  torchrun --nproc-per-node 2 -m mokd_det train --config-file ...

  # ... which start again, from the last checkpoint, when one of them dies
  torchrun --nproc-per-node 2 --max-restarts 3 -m mokd_det train --resume --config-file ...

  # a config in Python (Detectron2's LazyConfig), which using it runs: read it, then trust it
  mokd train --trust --config-file configs/Quick-Start/student_retinanet_mokd.py train.max_iter=50
  mokd train --trust --config-file configs/Quick-Start/student_retinanet_mokd.py --eval-only \\
      train.init_checkpoint=output/quick_start/student_retinanet_mokd/model_final.pth

Results are printed and written to OUTPUT_DIR/results.json; the teacher's to
OUTPUT_DIR/teacher/results.json, the row to OUTPUT_DIR/zoo_row.json.
"""

import argparse
import os
import sys

from ..command_line import add_debug, add_imports, add_timeout, add_verbosity


def argument_parser() -> argparse.ArgumentParser:
    """Return a parser of the arguments of Detectron2's ``default_argument_parser``, and more."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="path to config file")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--eval-only", action="store_true", help="evaluate, do not train")
    parser.add_argument("--num-gpus", type=int, default=1, help="of each machine (%(default)s)")
    parser.add_argument("--num-machines", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--machine-rank", type=int, default=0, help="of this one (%(default)s)")
    # A port for each user, as Detectron2's: those of one machine do not meet.
    user = os.getuid() if sys.platform != "win32" else 1
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{2**15 + 2**14 + hash(user) % 2**14}",
        help="where several machines meet (%(default)s)",
    )
    parser.add_argument("--with-teacher", action="store_true", help="evaluate the teacher as well")
    parser.add_argument("--zoo-row", action="store_true", help="print a row for a model zoo")
    parser.add_argument("--trust", action="store_true", help="run the code in config files")
    parser.add_argument(
        "--overwrite", action="store_true", help="remove an earlier run in OUTPUT_DIR, start anew"
    )
    add_imports(parser)
    add_debug(parser)
    add_verbosity(parser)
    add_timeout(parser)
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        help="overrides: KEY VALUE ... (Python: path.key=value ...)",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Train or evaluate in as many processes as the arguments say."""
    from ..engine import launch

    if args.config_file.endswith(".py"):
        from .lazy_training import main, read

        launch(main, args, read(args).train.device)
    else:
        from .training import main

        launch(main, args)
