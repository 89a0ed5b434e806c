#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
From nothing to a distilled detector in minutes: make the data (real handwritten digits, composed
onto real aerial photos), train a teacher, train the same small student from scratch and with MoKD,
draw pictures, export the student, print one table. `make demo` runs it.

Examples:
  python tools/quick_start.py
  python tools/quick_start.py SEED 2 MODEL.DEVICE cuda      # overrides for every run

Everything lands in output/demo/: results.json, predictions.png, export/, logs/ and a folder for
each run. After Ctrl-C the same command goes on. What a complete demo left is kept,
as output/demo.1 (or .2, ...). AP and AP50 are fractions, as in COCO's own table.
"""

import argparse
import json
import os

from mokd_det.command_line import add_debug, errors_as_messages
from stages import ROOT, Demo, Stage, check_overrides, stoppable

OUTPUT = "output/demo"
CONFIGS = {
    "teacher": "configs/Aerial-Digits/teacher.yaml",
    "scratch": "configs/Aerial-Digits/student_scratch.yaml",
    "mokd": "configs/Aerial-Digits/student_mokd.yaml",
}
RUNS = {
    "teacher": f"{OUTPUT}/teacher",
    "scratch": f"{OUTPUT}/student_scratch",
    "mokd": f"{OUTPUT}/student_mokd",
}
WEIGHTS = {name: f"{run}/model_final.pth" for name, run in RUNS.items()}
SPLITS = {"val": "aerial_digits_val", "test": "aerial_digits_test"}
METRICS = ("AP", "AP50")


def stages(opts):
    """Return what to do, with overrides ``opts`` of every run, as a list of stages."""

    def train(*names):
        return {
            name: ["tools/train_net.py", "--resume", "--config-file", CONFIGS[name], *opts]
            for name in names
        }

    models = [part for name in CONFIGS for part in ("--model", name, CONFIGS[name], WEIGHTS[name])]
    draw = ["tools/visualize_predictions.py", "--dataset", SPLITS["val"], *models]
    draw += ["--score", "0.3", "--output", f"{OUTPUT}/predictions.png", *opts]
    export = ["tools/export_model.py", "--config-file", CONFIGS["mokd"], "--format", "torchscript"]
    export += ["--method", "tracing", "--output", f"{OUTPUT}/export", *opts]
    export += ["MODEL.WEIGHTS", WEIGHTS["mokd"]]
    data = {
        "data": ["datasets/prepare_aerial_digits.py"],
        "weights": ["datasets/prepare_pretrained.py"],
    }
    return [
        Stage("get digits, aerial photos and ImageNet weights", data, 15),
        Stage(
            "train the teacher, and the student from scratch",
            train("teacher", "scratch"),
            85,
            runs=RUNS,
        ),
        Stage("train the student with MoKD", train("mokd"), 80, runs=RUNS),
        Stage(
            "draw predictions, export the distilled student", {"draw": draw, "export": export}, 15
        ),
    ]


def collect(seconds, opts):
    """Return the content of results.json from the results of the runs with overrides ``opts``."""
    import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)
    from detectron2.modeling import build_model

    from mokd_det import modeling  # noqa: F401  (registers the torchvision backbones)
    from mokd_det.config import load_config
    from mokd_det.evaluation import count_parameters

    results = {}
    for name, config in CONFIGS.items():
        with open(f"{RUNS[name]}/results.json") as f:
            found = json.load(f)
        # Detectron2 counts in percent.
        metrics = {
            metric: {split: found[data]["bbox"][metric] / 100 for split, data in SPLITS.items()}
            for metric in METRICS
        }
        cfg = load_config(config, [*opts, "MODEL.TORCHVISION.WEIGHTS", ""])
        results[name] = {
            **metrics,
            "params": count_parameters(build_model(cfg)),
            "config": config,
            "weights": WEIGHTS[name],
        }
    return {**results, "seconds": round(seconds, 1)}


def table(results):
    """Return the results as a Markdown table."""
    titles = ["model", "parameters", *(f"{m} {s}" for m in METRICS for s in SPLITS)]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name in CONFIGS:
        row = results[name]
        values = [f"{row[m][s]:.3f}" for m in METRICS for s in SPLITS]
        lines.append(f"| {name} | {row['params']:,} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_debug(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    args = parser.parse_args()
    with errors_as_messages(args.debug), stoppable(OUTPUT):
        quick_start(args.opts)


def quick_start(opts):
    """Do all, with overrides ``opts`` of every run."""
    os.chdir(ROOT)
    check_overrides(CONFIGS.values(), opts)  # before anything is moved
    demo = Demo(OUTPUT, opts)
    results = collect(demo.run(stages(opts)), opts)
    demo.finish(results)
    print(f"\n{table(results)}\n\nPicture: {OUTPUT}/predictions.png")
    print(
        f"The distilled student is a plain Detectron2 model, {WEIGHTS['mokd']} with student.yaml "
        f"beside it, and {OUTPUT}/export/model.ts for torch alone. Now your own "
        "detector: docs/tutorials/detector.md"
    )


if __name__ == "__main__":
    main()
