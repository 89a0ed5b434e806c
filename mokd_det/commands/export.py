# Copyright (c) The mokd_det authors.
"""
Write the plain student (detector or classifier) for deployment, and compare the file with it.

Examples:
  # a file for torch + torchvision alone: Python (tools/run_exported.py) or C++
  mokd export --config-file configs/Quick-Start/student_mokd.yaml \\
      --format torchscript --method tracing --output out \\
      MODEL.WEIGHTS output/quick_start/student_mokd/model_final.pth

  # ... with float16 inside, compared on one's own images
  mokd export ... --half --images photo.jpg other.jpg MODEL.WEIGHTS ...

  # speed and size beside the teacher's, and beside the same model from scratch
  mokd export ... --benchmark MODEL.WEIGHTS ...

  # what stock Detectron2 loads
  mokd export ... --format checkpoint --output out MODEL.WEIGHTS ...

Formats (docs/export.md has what each family of models can do):
  torchscript   model.ts, by tracing or scripting (--method); metadata inside
  onnx          model.onnx, by tracing; needs the extra "onnx"
  torch_export  model.pt2, experimental: classifiers; backbone and dense head of detectors
  checkpoint    model.pth and config.yaml, which stock Detectron2 loads

Results are printed and written to OUTPUT/export.json. The exit code is 0 only if the file returns
what the model returns, within --tolerance.
"""

import argparse
import os
import sys

from ..command_line import add_debug, add_imports

# What mokd_det.export has: it needs torch, and --help is not to wait for that.
FORMATS = ("checkpoint", "torchscript", "onnx", "torch_export")
METHODS = ("tracing", "scripting")
DEFAULT_TOLERANCE, PIXELS = 1e-3, 10


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="the student's config")
    parser.add_argument("--format", choices=FORMATS, default="checkpoint")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="",
        help="for torchscript (tracing; torchvision's detectors: scripting)",
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--half",
        action="store_true",
        help="float16 inside a detector's backbone or a classifier's network (torchscript)",
    )
    parser.add_argument(
        "--freeze", action="store_true", help="weights as constants, BatchNorm folded (torchscript)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=DEFAULT_TOLERANCE,
        help="largest difference of a score, mask probability or logit; boxes and keypoints: "
        f"{PIXELS} times as much, in pixels (%(default)s)",
    )
    parser.add_argument(
        "--images", nargs="+", default=[], help="to compare on; else the first of DATASETS.TEST"
    )
    parser.add_argument(
        "--benchmark", action="store_true", help="latency and size beside the teacher's"
    )
    parser.add_argument("--trust", action="store_true", help="run the code in config files")
    add_imports(parser)
    add_debug(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    return parser


def run(args: argparse.Namespace) -> str | None:
    """Export; return a message (exit code 1) if the file differs from the model."""
    from ..config import trust_files
    from .exporting import export

    trust_files(args.trust)
    result = export(args)
    if args.format == "checkpoint" or result["parity"]["passed"]:
        return None
    nothing = result["parity"].get("detections") == 0
    return f"{os.path.basename(sys.argv[0])}: " + (
        "the model found nothing in any image, so nothing was compared. Give images with objects "
        "by --images, or lower the config's SCORE_THRESH_TEST."
        if nothing
        else "the exported model DIFFERS from its source by more than --tolerance "
        f"{args.tolerance} (see above). Do not use it."
    )
