#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Write the plain student (detector or classifier) for deployment, and compare the file with it.

Examples:
  # a file for torch + torchvision alone: Python (tools/run_exported.py) or C++
  python tools/export_model.py --config-file configs/Quick-Start/student_mokd.yaml \\
      --format torchscript --method tracing --output out \\
      MODEL.WEIGHTS output/quick_start/student_mokd/model_final.pth

  # ... with float16 inside, compared on one's own images
  python tools/export_model.py ... --half --images photo.jpg other.jpg MODEL.WEIGHTS ...

  # speed and size beside the teacher's, and beside the same model from scratch
  python tools/export_model.py ... --benchmark MODEL.WEIGHTS ...

  # what stock Detectron2 loads
  python tools/export_model.py ... --format checkpoint --output out MODEL.WEIGHTS ...

Formats (docs/export.md has what each family of models can do):
  torchscript   model.ts, by tracing or scripting (--method); metadata inside
  onnx          model.onnx, by tracing; needs the extra "onnx"
  torch_export  model.pt2, experimental: classifiers; backbone and dense head of detectors
  checkpoint    model.pth and config.yaml, which stock Detectron2 loads

Results are printed and written to OUTPUT/export.json. The exit code is 0 only if the file returns
what the model returns, within --tolerance.
"""

import argparse
import json
import os
import sys

import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from mokd_det.command_line import add_debug, errors_as_messages
from mokd_det.config import check_device, load_config, split_overrides, trust_files
from mokd_det.engine import validate
from mokd_det.export import (
    DEFAULT_TOLERANCE,
    FORMATS,
    METHODS,
    PIXELS,
    ExportOptions,
    benchmark,
    check_benchmark,
    check_options,
    export_model,
    format_benchmark,
)


def argument_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="the student's config")
    parser.add_argument("--format", choices=list(FORMATS), default="checkpoint")
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
    add_debug(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    return parser


def report(result):
    """Return the results as lines for people."""
    lines = [f"{result['file']}: {result['bytes'] / 2**20:.1f} MiB"]
    parity = result["parity"]
    lines.append(f"compared with the model on {result['images']}, {len(parity['sizes'])} inputs:")
    for name, value in parity.items():
        if "difference" in name:
            lines.append(f"  {name.replace('_', ' ')}: {value:.3g}")
    if "detections" in parity:
        lines.append(f"  detections: {parity['detections']}, unmatched: {parity['unmatched']}")
        if not parity["without_detections"]:
            lines.append("  (no image among them was without detections)")
    notes = {
        "batch": "two sizes in a batch",
        "float32": "against float32",
        "ties": "the model itself, by the order of equal scores",
    }
    for name, words in notes.items():
        if name in parity:
            found = ", ".join(
                f"{key.replace('_', ' ')} {value:.3g}"
                for key, value in parity[name].items()
                if "difference" in key or key == "unmatched"
            )
            lines.append(f"  {words}: {found}")
    if result["metadata"].get("image_size", "any") != "any":
        side = result["metadata"]["image_size"]
        lines.append(f"  takes images of {side} x {side} only")
    return "\n".join(lines)


def export(args):
    """Export as the arguments say; print and return the results."""
    args.images, overrides = split_overrides(args.images)
    args.opts = overrides + args.opts
    check_options(args.format, args.method, args.half, args.freeze)
    if not 0 < args.tolerance < float("inf"):
        raise ValueError(f"--tolerance is {args.tolerance}: expected a finite number > 0.")
    setup_logger(name="mokd_det", abbrev_name="mokd")
    cfg = load_config(args.config_file, args.opts)
    weights = cfg.MODEL.WEIGHTS
    if weights and "://" not in weights and not PathManager.isfile(weights):
        raise FileNotFoundError(f"MODEL.WEIGHTS '{weights}' does not exist.")
    task = validate(cfg, is_training=False)
    check_device(cfg)
    if args.benchmark:
        check_benchmark(task, cfg, args.format)
    options = ExportOptions(args.format, args.method, args.half, args.freeze, args.tolerance)
    result = export_model(task, cfg, args.output, options, args.images)
    if args.format == "checkpoint":
        print(json.dumps(result))
        return result
    if args.benchmark:
        result["benchmark"] = benchmark(task, cfg, result, args.output, options, args.images)
        with open(os.path.join(args.output, "export.json"), "w") as f:
            json.dump(result, f, indent=2)
    print(report(result))
    if args.benchmark:
        print(format_benchmark(result["benchmark"]))
    print(json.dumps({key: value for key, value in result.items() if key != "metadata"}))
    return result


def main():
    args = argument_parser().parse_args()
    trust_files(args.trust)
    with errors_as_messages(args.debug):
        result = export(args)
    if args.format != "checkpoint" and not result["parity"]["passed"]:
        nothing = result["parity"].get("detections") == 0
        sys.exit(
            "export_model.py: the model found nothing in any image, so nothing was compared. Give "
            "images with objects by --images, or lower the config's SCORE_THRESH_TEST."
            if nothing
            else "export_model.py: the exported model DIFFERS from its source by more than "
            f"--tolerance {args.tolerance} (see above). Do not use it."
        )


if __name__ == "__main__":
    main()
