#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
From nothing to a distilled classifier: get 5,000 handwritten digits, train a teacher, train the
same small student from scratch and with MoKD with three seeds each, print a table, draw a picture.
`make demo-classification` runs it.

Example:
  python tools/quick_start_classification.py

Everything lands in output/quick_start_classification/: results.json, the study's records, the
teacher, and digits.png with digits that the distilled student learnt to read; the students' runs in
output/studies/mnist_demo/. What an earlier start left in the two folders is kept, as
output/quick_start_classification.1 and output/studies/mnist_demo.1 (or .2, ...).
Accuracies are top-1 in percent.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from mokd_det.command_line import add_debug, errors_as_messages

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path("output/quick_start_classification")
STUDY = "studies/mnist_demo.yaml"
SPLITS = {"val": "mnist_val", "test": "mnist_test"}
STUDENTS = ("scratch", "mokd")


def step(label, *command):
    """Run a Python script of the repository; SystemExit if it fails."""
    print(f"\n=== {label}\n$ python {' '.join(command)}", flush=True)
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        raise SystemExit(f"quick start: '{label}' failed, see above.")


def collect(seconds):
    """Return the content of results.json: top-1 of the teacher, and of each student by seed."""
    study = json.loads((OUTPUT / "study" / "mnist_demo.json").read_text())

    def top1(run, split):
        return run["results"][SPLITS[split]]["classification"]["top1"]

    results = {"teacher": {split: top1(study["teachers"][0], split) for split in SPLITS}}
    runs = sorted(study["runs"], key=lambda run: run["seed"])
    for name in STUDENTS:
        results[name] = {}
        for split in SPLITS:
            seeds = [top1(run, split) for run in runs if run["method"] == name]
            results[name][split] = {"mean": statistics.mean(seeds), "seeds": seeds}
    return {**results, "seconds": round(seconds, 1)}


def table(results):
    """Return the results as a Markdown table."""
    seeds = len(results["mokd"]["test"]["seeds"])
    titles = ["model", *(f"top-1 {s}, seed {i + 1}" for s in SPLITS for i in range(seeds))]
    titles += [f"mean {s}" for s in SPLITS]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    teacher = [f"{results['teacher'][s]:.1f}" for s in SPLITS]
    lines.append("| teacher | " + "| " * (len(SPLITS) * seeds) + "| ".join(teacher) + " |")
    for name in STUDENTS:
        values = [v for s in SPLITS for v in results[name][s]["seeds"]]
        values += [results[name][s]["mean"] for s in SPLITS]
        lines.append(f"| {name} | " + " | ".join(f"{v:.1f}" for v in values) + " |")
    return "\n".join(lines)


def draw(results, path, columns=10):
    """
    Accuracies as bars with a dot for each seed, and test digits that only one of both students of
    the first seed reads rightly.

    Args:
        results (dict): of :func:`collect`.
        path (Path): of the picture.
        columns (int): digits of each kind.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)

    from mokd_det.data.classification import PackedImages
    from mokd_det.data.paths import datasets_root

    digits = PackedImages(str(datasets_root() / "mnist" / "test.npz"))
    predictions = {}
    for name in STUDENTS:
        run = Path("output/studies/mnist_demo") / f"{name}-1" / "inference" / SPLITS["test"]
        predictions[name] = json.loads((run / "predictions.json").read_text())
    figure = plt.figure(figsize=(13, 4.2))
    bars, right = figure.subfigures(1, 2, width_ratios=(1, 3))
    axes = bars.subplots()
    bars.subplots_adjust(left=0.22)
    for i, name in enumerate(STUDENTS):
        values = results[name]["test"]
        axes.bar(i, values["mean"], color=("0.7", "tab:blue")[i])
        axes.plot([i] * len(values["seeds"]), values["seeds"], "k.")
    axes.axhline(results["teacher"]["test"], color="tab:green", label="teacher")
    axes.set_xticks(range(len(STUDENTS)), STUDENTS)
    axes.set_ylabel("test top-1, %")
    low = min(min(results[name]["test"]["seeds"]) for name in STUDENTS)
    axes.set_ylim(max(low - 10, 0), 100)
    axes.legend(loc="lower right")
    grid = right.subplots(len(STUDENTS), columns, squeeze=False)
    for row, name in zip(grid, reversed(STUDENTS)):
        other = next(n for n in STUDENTS if n != name)
        both = zip(predictions[name], predictions[other])
        chosen = [(a, b) for a, b in both if a["classes"][0] == a["label"] != b["classes"][0]]
        for cell in row:
            cell.axis("off")
        for cell, (_, wrong) in zip(row, chosen):
            cell.imshow(digits[int(wrong["name"].split("#")[1])]["image"], cmap="gray_r")
            cell.set_title(f"{other}: {wrong['classes'][0]}", fontsize=8)
        row[0].text(-2, -14, f"right: {name} only ({len(chosen)} of {len(digits)})", fontsize=10)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_debug(parser)
    args = parser.parse_args()
    with errors_as_messages(args.debug):
        quick_start()


def quick_start():
    """Do all."""
    import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)

    from mokd_det.evaluation.results import set_aside

    os.chdir(ROOT)
    start = time.time()
    # The study would go on with what an earlier start left.
    for folder in (OUTPUT, Path("output/studies/mnist_demo")):
        if moved := set_aside(folder):
            print(f"What was in {folder} is now in {moved}", flush=True)
    study = str(OUTPUT / "study")
    step("get the digits", "datasets/prepare_mnist.py")
    step(
        "train the teacher, and the students three times each",
        *("studies/run.py", STUDY, "--run", "--jobs", "2", "--output", study),
    )
    results = collect(time.time() - start)
    draw(results, OUTPUT / "digits.png")
    results["seconds"] = round(time.time() - start, 1)
    (OUTPUT / "results.json").write_text(json.dumps(results, indent=2))
    print(f"\n{table(results)}\n")
    print(f"In {OUTPUT}/: results.json, digits.png, study/ (records), teacher/")


if __name__ == "__main__":
    main()
