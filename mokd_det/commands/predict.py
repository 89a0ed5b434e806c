# Copyright (c) The mokd_det authors.
"""
Find objects in photos with a trained detector, or name their classes with a trained classifier.

Examples:
  mokd predict --config-file my_student.yaml --weights output/model_final.pth photo.jpg
  mokd predict --config-file my_student.yaml --weights output/model_final.pth photos/ \\
      --output found --threshold 0.3
  mokd predict --config-file my_student.yaml --weights model.pth photos/ MODEL.DEVICE cpu

Writes OUTPUT/predictions.json and, of detectors, a picture for each photo with what was found.
Folders are looked through at any depth. The JSON is a list:
  detectors    COCO's results ("image_id", "category_id", "bbox" x y w h in pixels, "score"; masks
               as "segmentation", "keypoints"), each with "file_name" and "category_name"
  classifiers  for each photo "file_name" and the five best "classes" ("class", "name", "score")
"""

import argparse

from ..command_line import add_debug, add_imports


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the model's config")
    parser.add_argument("--weights", required=True, help="its checkpoint")
    parser.add_argument("--output", default="predictions", help="folder to write (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="earlier predictions there")
    parser.add_argument(
        "--threshold", type=float, help="of detectors: smallest score of a box (0.5)"
    )
    parser.add_argument("--trust", action="store_true", help="run the code in config files")
    add_imports(parser)
    add_debug(parser)
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="photos or folders; then overrides KEY VALUE ..."
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Predict, and print what was written."""
    from ..config import trust_files
    from .predicting import predict

    trust_files(args.trust)
    predict(args)
