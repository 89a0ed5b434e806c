# Copyright (c) The mokd_det authors.
"""``mokd export``: the work."""

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from .. import compat  # noqa: F401  (first: patches Detectron2 where it needs it)
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from ..config import check_device, load_config, split_overrides
from ..engine import validate
from ..export import (
    ExportOptions,
    benchmark,
    check_benchmark,
    check_options,
    export_model,
    format_benchmark,
)


def report(result: Mapping[str, Any]) -> str:
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


def export(args: argparse.Namespace) -> dict[str, Any]:
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
