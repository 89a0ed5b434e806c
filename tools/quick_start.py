#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
From nothing to a distilled tree detector: prepare the data, train a teacher, train the same student
from scratch and with MoKD, evaluate the three, draw pictures, print one table. `make demo` runs it.

Examples:
  python tools/quick_start.py
  python tools/quick_start.py SEED 2 MODEL.DEVICE cuda      # overrides for every run

Everything lands in output/quick_start/: results.json, predictions.png, balance.png, a folder for
each run and the exported student. What an earlier start left there is kept, as
output/quick_start.1 (or .2, ...). AP and AP50 are fractions, as in COCO's own table.
"""

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from mokd_det.command_line import add_debug, errors_as_messages

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = "output/quick_start"
CONFIGS = {
    "teacher": "configs/Quick-Start/teacher_quick.yaml",
    "scratch": "configs/Quick-Start/student_mobilenet_scratch.yaml",
    "mokd": "configs/Quick-Start/student_mobilenet_mokd.yaml",
}
RUNS = {name: f"{OUTPUT}/{Path(config).stem}" for name, config in CONFIGS.items()}
WEIGHTS = {name: f"{run}/model_final.pth" for name, run in RUNS.items()}
SPLITS = {"val": "neon_trees_val", "test": "neon_trees_test"}
METRICS = ("AP", "AP50")
# Each run has its own.
NOT_OVERRIDDEN = ("OUTPUT_DIR", "MODEL.WEIGHTS")


class Stage(NamedTuple):
    """
    Attributes:
        label (str): what is done.
        command (list[str]): arguments of the Python interpreter.
        share (float): the usual part of its lane's time, in any unit.
    """

    label: str
    command: list
    share: float


def phases(opts):
    """
    Return what to do as a list of phases; a phase is a list of lanes that run side by side, one
    core each; a lane is a list of stages, one after the other.
    """

    def train(name, label, share):
        command = ["tools/train_net.py", "--config-file", CONFIGS[name], *opts]
        return Stage(f"train and evaluate {label}", command, share)

    models = [part for name in CONFIGS for part in ("--model", name, CONFIGS[name], WEIGHTS[name])]
    prepare = [
        Stage("get and tile the aerial photos", ["datasets/prepare_neon_trees.py"], 12),
        Stage("get ImageNet weights for the teacher", ["datasets/prepare_pretrained.py"], 8),
    ]
    teacher_and_student = [
        train("teacher", "the teacher", 130),
        train("mokd", "the student with MoKD", 130),
    ]
    show = [
        Stage(
            "draw predictions",
            ["tools/visualize_predictions.py", "--dataset", SPLITS["val"], *models]
            + ["--output", f"{OUTPUT}/predictions.png", *opts],
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
            + ["--output", f"{OUTPUT}/student", *opts, "MODEL.WEIGHTS", WEIGHTS["mokd"]],
            8,
        ),
    ]
    scratch = [train("scratch", "the student from scratch", 80)]
    return [[prepare], [teacher_and_student, scratch], [show]]


class Progress:
    """Says how much of the longest lane of every phase is done, and what the rest takes."""

    STEP = 0.05  # of the whole, between two lines

    def __init__(self, todo):
        self.start = time.time()
        self.lock = threading.Lock()
        self.total = sum(max(map(lane_share, phase)) for phase in todo)
        self.done = 0.0

    def say(self, done):
        with self.lock:
            if done < self.total and done - self.done < self.STEP * self.total:
                return
            self.done = done
            elapsed = time.time() - self.start
            left = elapsed * (self.total / done - 1)
            print(
                f"[quick start] {100 * done / self.total:.0f} %, {elapsed / 60:.1f} min so far, "
                f"about {left / 60:.1f} min left",
                flush=True,
            )


def lane_share(lane):
    return sum(stage.share for stage in lane)


def written(lines, path):
    """Yield lines that are written to a file as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        for line in lines:
            file.write(line)
            file.flush()
            yield line


def run_lane(lane, before, progress):
    """Run the stages of a lane; ``before`` is the share of all that came before the lane."""
    # One thread a lane: the lanes share the cores, and sums come out the same on any number.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = 0.0
    longest = progress is not None
    for stage in lane:
        log = Path(OUTPUT, "logs", f"{stage.label.replace(' ', '_')}.log")
        print(f"[quick start] {stage.label} (log: {log})", flush=True)
        process = subprocess.Popen(
            [sys.executable, *stage.command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in written(process.stdout, ROOT / log):
            # Detectron2's trainer prints: eta: 0:04:35  iter: 39 ... time: 1.0843 ...
            match = re.search(r"eta: (\d+):(\d+):(\d+) .*iter: (\d+) .*\btime: ([\d.]+)", line)
            if longest and match:
                hours, minutes, seconds, iteration = map(int, match.groups()[:4])
                spent = (iteration + 1) * float(match[5])
                left = 3600 * hours + 60 * minutes + seconds
                progress.say(before + done + stage.share * spent / (spent + left))
        if process.wait() != 0:
            end = (ROOT / log).read_text(errors="replace")[-2000:]
            raise RuntimeError(f"'{stage.label}' failed. The end of {log}:\n{end}")
        done += stage.share
        if longest:
            progress.say(before + done)


def run_phases(todo):
    progress = Progress(todo)
    before = 0.0
    for phase in todo:
        longest = max(phase, key=lane_share)
        with concurrent.futures.ThreadPoolExecutor(len(phase)) as pool:
            lanes = [
                pool.submit(run_lane, lane, before, progress if lane is longest else None)
                for lane in phase
            ]
        for lane in lanes:
            try:
                lane.result()
            except RuntimeError as error:
                raise SystemExit(f"quick start: {error}") from error
        before += lane_share(longest)


def collect(seconds, opts):
    """Return the content of results.json from the results of the runs with overrides ``opts``."""
    import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)
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
        cfg = load_config(str(ROOT / config), [*opts, "MODEL.TORCHVISION.WEIGHTS", ""])
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
    for option in NOT_OVERRIDDEN:
        if option in args.opts[::2]:
            parser.error(
                f"{option} cannot be an override: each run has its own, in {OUTPUT}. Leave it out."
            )
    with errors_as_messages(args.debug):
        quick_start(args.opts)


def quick_start(opts):
    """Do all, with overrides ``opts`` of every run."""
    import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)

    from mokd_det.config import load_config
    from mokd_det.evaluation.results import set_aside

    os.chdir(ROOT)
    for config in CONFIGS.values():  # a wrong override is found before anything is moved
        load_config(config, opts)
    start = time.time()
    # Metrics are appended, so what an earlier start left would mix with this one's.
    if moved := set_aside(OUTPUT):
        print(f"[quick start] what was in {OUTPUT} is now in {moved}", flush=True)
    run_phases(phases(opts))
    results = collect(time.time() - start, opts)
    Path(OUTPUT, "results.json").write_text(json.dumps(results, indent=2))
    print(f"\n{table(results)}\n")
    print(f"In {OUTPUT}/: results.json, predictions.png, balance.png, student/ (the export)")
    print("Your own detector: GETTING_STARTED.md")


if __name__ == "__main__":
    main()
