#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
From nothing to a distilled tree detector: prepare the data, train a teacher, train the same student
from scratch and with MoKD, evaluate the three, draw pictures, print one table. `make demo` runs it.

Examples:
  python tools/quick_start.py
  python tools/quick_start.py SEED 2 MODEL.DEVICE cuda      # overrides for every run

Everything lands in output/quick_start/: results.json, predictions.png, balance.png, a folder for
each run and the exported student. AP and AP50 are fractions, as in COCO's own table.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = "output/quick_start"
CONFIGS = {
    "teacher": "configs/Quick-Start/teacher.yaml",
    "scratch": "configs/Quick-Start/student_scratch.yaml",
    "mokd": "configs/Quick-Start/student_mokd.yaml",
}
RUNS = {name: f"{OUTPUT}/{Path(config).stem}" for name, config in CONFIGS.items()}
WEIGHTS = {name: f"{run}/model_final.pth" for name, run in RUNS.items()}
SPLITS = {"val": "neon_trees_val", "test": "neon_trees_test"}
METRICS = ("AP", "AP50")


class Stage(NamedTuple):
    """
    Attributes:
        label (str): what is done.
        command (list[str]): arguments of the Python interpreter.
        share (float): the usual part of the whole time, in any unit.
    """

    label: str
    command: list
    share: float


def stages(opts):
    train = [
        Stage(
            f"train and evaluate {label}",
            ["tools/train_net.py", "--config-file", CONFIGS[name], *opts],
            share,
        )
        for name, label, share in (
            ("teacher", "the teacher", 300),
            ("scratch", "the student from scratch", 200),
            ("mokd", "the student with MoKD", 300),
        )
    ]
    models = [part for name in CONFIGS for part in ("--model", name, CONFIGS[name], WEIGHTS[name])]
    return [
        Stage("get and tile the aerial photos", ["datasets/prepare_neon_trees.py"], 12),
        Stage("get ImageNet weights for the teacher", ["datasets/prepare_pretrained.py"], 8),
        *train,
        Stage(
            "draw predictions",
            ["tools/visualize_predictions.py", "--dataset", SPLITS["val"], *models]
            + ["--output", f"{OUTPUT}/predictions.png"],
            12,
        ),
        Stage(
            "draw conflict, dominance and weights",
            ["tools/plot_balance.py", RUNS["mokd"], "--output", f"{OUTPUT}/balance.png"],
            3,
        ),
        Stage(
            "export the plain student",
            ["tools/export_model.py", "--config-file", CONFIGS["mokd"], "--format", "checkpoint"]
            + ["--output", f"{OUTPUT}/student", "MODEL.WEIGHTS", WEIGHTS["mokd"]],
            8,
        ),
    ]


def run_stages(todo):
    """Run the stages one after the other and say all along how much is left."""
    start, total, done = time.time(), sum(stage.share for stage in todo), 0.0

    def say(finished):
        elapsed = time.time() - start
        left = elapsed * (total - finished) / max(finished, 1e-9)
        estimate = f", about {left / 60:.1f} min left" if finished > 0.04 * total else ""
        spent = f"{elapsed / 60:.1f} min so far"
        print(f"[quick start] {100 * finished / total:.0f} %, {spent}{estimate}", flush=True)

    for number, stage in enumerate(todo, start=1):
        print(f"\n=== {number}/{len(todo)}: {stage.label}")
        print("$ python " + " ".join(stage.command), flush=True)
        process = subprocess.Popen(
            [sys.executable, *stage.command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in process.stdout:
            print(line, end="", flush=True)
            # Detectron2's trainer prints: eta: 0:04:35  iter: 39 ... time: 1.0843 ...
            if match := re.search(r"eta: (\d+):(\d+):(\d+) .*iter: (\d+) .*\btime: ([\d.]+)", line):
                hours, minutes, seconds, iteration = map(int, match.groups()[:4])
                spent = (iteration + 1) * float(match[5])
                left = 3600 * hours + 60 * minutes + seconds
                say(done + stage.share * spent / (spent + left))
        if process.wait() != 0:
            raise SystemExit(f"quick start: '{stage.label}' failed, see above.")
        done += stage.share
        say(done)


def collect(seconds):
    """Return the content of results.json from the runs' own results."""
    import mokd_det  # noqa: F401  (first: mends Detectron2 where it needs it)
    from detectron2.modeling import build_model

    from mokd_det import modeling  # noqa: F401  (registers the torchvision backbones)
    from mokd_det.config import load_config
    from mokd_det.evaluation import count_parameters

    results = {}
    for name, config in CONFIGS.items():
        with open(ROOT / RUNS[name] / "results.json") as f:
            found = json.load(f)
        # Detectron2 counts in percent.
        metrics = {
            metric: {split: found[data]["bbox"][metric] / 100 for split, data in SPLITS.items()}
            for metric in METRICS
        }
        cfg = load_config(str(ROOT / config), ["MODEL.TORCHVISION.WEIGHTS", ""])
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
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    args = parser.parse_args()
    os.chdir(ROOT)
    start = time.time()
    # Metrics are appended, so what an earlier start left would mix with this one's.
    shutil.rmtree(OUTPUT, ignore_errors=True)
    run_stages(stages(args.opts))
    results = collect(time.time() - start)
    Path(OUTPUT, "results.json").write_text(json.dumps(results, indent=2))
    print(f"\n{table(results)}\n")
    print(f"In {OUTPUT}/: results.json, predictions.png, balance.png, student/ (the export)")


if __name__ == "__main__":
    main()
