# Copyright (c) The mokd_det authors.
"""
Draw ground truth and the predictions of one or several detectors side by side, as one PNG. Right
predictions are green, wrong ones red: an IoU of 0.5 with an object of the same class counts, and
each object once. The images are those with the most boxes; of equals, the first ones of the set.

Example:
  mokd visualize --dataset neon_trees_val --count 3 --output grid.png \\
      --model teacher configs/Quick-Start/teacher.yaml output/quick_start/teacher/model_final.pth \\
      --model MoKD configs/Quick-Start/student_mokd.yaml \\
              output/quick_start/student_mokd/model_final.pth

Overrides KEY VALUE ... at the end are for all models, such as MODEL.DEVICE cpu without a GPU.
"""

import argparse

from ..command_line import add_debug, add_imports


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="name of a data set")
    parser.add_argument(
        "--model",
        required=True,
        action="append",
        nargs=3,
        metavar=("LABEL", "CONFIG", "WEIGHTS"),
        help="a column of the grid; may be given several times",
    )
    parser.add_argument("--output", required=True, help="PNG to write")
    parser.add_argument("--count", type=int, default=3, help="number of images (%(default)s)")
    parser.add_argument("--score", type=float, default=0.5, help="smallest score (%(default)s)")
    parser.add_argument("--trust", action="store_true", help="run the code in config files")
    add_imports(parser)
    add_debug(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    return parser


def run(args: argparse.Namespace) -> None:
    """Draw, and print the name of the file."""
    from ..config import trust_files
    from .visualizing import visualize

    trust_files(args.trust)
    visualize(args.dataset, args.model, args.output, args.count, args.score, args.opts)
    print(args.output)
