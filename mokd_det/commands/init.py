# Copyright (c) The mokd_det authors.
"""
Write the configs of a distillation on your own data in COCO's format, ready to train: the student
from scratch, the same student with a teacher and, if the teacher is a name, its fine-tuning.

Examples:
  mokd init --teacher r50-faster-rcnn --student r18-retinanet --data train.json images/ \\
      --val val.json images/ --output cells
  mokd init --teacher my_teacher.yaml --teacher-weights output/model_final.pth \\
      --student ssdlite --data train.json images/

Students, from ImageNet's weights: r18-retinanet, r50-retinanet, mobilenet-retinanet,
r18-faster-rcnn, r50-faster-rcnn, mobilenet-faster-rcnn, and torchvision's ssdlite and
tv-mobilenet-faster-rcnn. Teachers: the config of your own one, a name (r50-retinanet,
r101-retinanet, r50-faster-rcnn, r101-faster-rcnn: Detectron2's of COCO), or any detector of
torchvision, such as retinanet_resnet50_fpn_v2. A teacher by name is fine-tuned on your data first.

The schedule: 12 epochs, but at least 1,500 steps; the rate falls after 2/3 and 8/9 of them, as in
Detectron2's "1x". Four images a step for each GPU (on a CPU four, of 320 pixels); the learning rate
is that of the model's own recipe, scaled with the batch (Goyal et al. 2017). Change them in
common.yaml and in each config.
"""

import argparse

from ..command_line import add_debug, add_imports


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    files = ("JSON", "IMAGES")
    parser.add_argument("--teacher", required=True, help="a config file, or a name")
    parser.add_argument(
        "--teacher-weights", default="", help="of a config file (its OUTPUT_DIR/model_final.pth)"
    )
    parser.add_argument("--student", required=True, help="a name")
    parser.add_argument("--data", required=True, nargs=2, metavar=files, help="to train on")
    parser.add_argument("--val", nargs=2, metavar=files, help="to evaluate on")
    parser.add_argument("--output", default="", help="new folder (mokd_STUDENT)")
    parser.add_argument("--trust", action="store_true", help="run the code in config files")
    add_imports(parser)
    add_debug(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Write the configs, and print the commands that train them."""
    from ..config import trust_files
    from .new_project import create

    trust_files(args.trust)
    create(args)
