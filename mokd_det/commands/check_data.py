# Copyright (c) The mokd_det authors.
"""
Check data sets before training, as training itself does: boxes, ids, classes, masks, image files.

Examples:
  # the sets of a config, and whether its model suits them
  mokd check-data --config-file configs/Quick-Start/student_mokd.yaml

  # an annotation file in COCO's format with its images; write down what can be completed
  mokd check-data train.json images/ --write train_completed.json

  # class folders or a packed .npz; a Pascal VOC folder (its converter is datasets/prepare_voc.py)
  mokd check-data photos/train
  mokd check-data VOC2007

  # decode every image file, too, and keep the report
  mokd check-data train.json images/ --images --report report.json

What is found is an error (training would go wrong) or a warning (counted; what has one meaning is
completed). Exit code 0: no error; 1: errors; 2: the check itself was not possible.
"""

import argparse

from ..command_line import add_debug, add_imports


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="?", help="a .json, .npz or folder; not with --config-file")
    parser.add_argument("image_root", nargs="?", help="folder of the images of a .json")
    parser.add_argument("--config-file", default="", help="check the sets of a config")
    parser.add_argument("--images", action="store_true", help="decode every image file, too")
    parser.add_argument("--masks", choices=["polygon", "bitmask"], help="needed, in this format")
    parser.add_argument("--keypoints", action="store_true", help="keypoints are needed")
    parser.add_argument("--write", default="", help="JSON file to write, with all completed")
    parser.add_argument("--report", default="", help="JSON file to write the findings to")
    add_imports(parser)
    add_debug(parser)
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ...")
    return parser


def run(args: argparse.Namespace) -> int:
    """Check; return 1 if there are errors."""
    from .checking import check

    return check(args)
