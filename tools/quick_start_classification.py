#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
From nothing to a distilled classifier: get 5,000 handwritten digits of MNIST, train a teacher,
train the same small student from scratch and with MoKD, print a table, draw a picture.
`make demo-classification` runs it.

Examples:
  python tools/quick_start_classification.py
  python tools/quick_start_classification.py SEED 2      # overrides for every run

Everything lands in output/quick_start_classification/: results.json, digits.png with the first
test digits that only one of both students reads rightly, logs/ and a folder for each run. After
Ctrl-C the same command goes on. What a complete demo left is kept, as
output/quick_start_classification.1 (or .2, ...). Accuracies are top-1 in percent.
"""

import argparse
import json
import os

from mokd_det.command_line import add_debug, errors_as_messages
from stages import ROOT, Demo, Stage, check_overrides, stoppable

OUTPUT = "output/quick_start_classification"
CONFIGS = {
    "teacher": "configs/Digits/teacher.yaml",
    "scratch": "configs/Digits/student_scratch.yaml",
    "mokd": "configs/Digits/student_mokd.yaml",
}
RUNS = {
    "teacher": f"{OUTPUT}/teacher",
    "scratch": f"{OUTPUT}/student_scratch",
    "mokd": f"{OUTPUT}/student_mokd",
}
SPLITS = {"val": "mnist_val", "test": "mnist_test"}
STUDENTS = ("scratch", "mokd")


def stages(opts):
    """Return what to do, with overrides ``opts`` of every run, as a list of stages."""

    def train(name, *schedule):
        return ["tools/train_net.py", "--resume", "--config-file", CONFIGS[name], *schedule, *opts]

    return [
        Stage("get the digits", {"data": ["datasets/prepare_mnist.py"]}, 6),
        # The teacher's steps are the long ones: half of its schedule is enough here.
        Stage(
            "train the teacher, and the student from scratch",
            {"teacher": train("teacher", "SOLVER.MAX_ITER", "2"), "scratch": train("scratch")},
            35,
            runs=RUNS,
        ),
        Stage("train the student with MoKD", {"mokd": train("mokd")}, 45, runs=RUNS),
    ]


def collect(seconds):
    """Return the content of results.json: top-1 of each model by split."""
    results = {}
    for name, run in RUNS.items():
        with open(f"{run}/results.json") as f:
            found = json.load(f)
        results[name] = {s: found[data]["classification"]["top1"] for s, data in SPLITS.items()}
    return {**results, "seconds": round(seconds, 1)}


def table(results):
    """Return the results as a Markdown table."""
    lines = ["| model | " + " | ".join(f"top-1 {s}" for s in SPLITS) + " |"]
    lines.append("|---" * (1 + len(SPLITS)) + "|")
    for name in RUNS:
        lines.append(f"| {name} | " + " | ".join(f"{results[name][s]:.1f}" for s in SPLITS) + " |")
    return "\n".join(lines)


def draw(results, path, columns=10):
    """
    Accuracies as bars, and the first test digits that only one of both students reads rightly.

    Args:
        results (dict): of :func:`collect`.
        path (str): of the picture.
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
        with open(f"{RUNS[name]}/inference/{SPLITS['test']}/predictions.json") as f:
            predictions[name] = json.load(f)
    figure = plt.figure(figsize=(13, 4.2))
    bars, right = figure.subfigures(1, 2, width_ratios=(1, 3))
    axes = bars.subplots()
    bars.subplots_adjust(left=0.22)
    values = [results[name]["test"] for name in STUDENTS]
    axes.bar(STUDENTS, values, color=("0.7", "tab:blue"))
    axes.axhline(results["teacher"]["test"], color="tab:green", label="teacher")
    axes.set_ylabel("test top-1, %")
    axes.set_ylim(max(min(values) - 10, 0), 100)
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
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    args = parser.parse_args()
    with errors_as_messages(args.debug), stoppable(OUTPUT):
        quick_start(args.opts)


def quick_start(opts):
    """Do all, with overrides ``opts`` of every run."""
    os.chdir(ROOT)
    check_overrides(CONFIGS.values(), opts)  # before anything is moved
    demo = Demo(OUTPUT, opts)
    results = collect(demo.run(stages(opts)))
    draw(results, f"{OUTPUT}/digits.png")
    demo.finish(results)
    print(f"\n{table(results)}\n\nPicture: {OUTPUT}/digits.png")
    print(
        f"The distilled student: {RUNS['mokd']}/model_final.pth. Now your own classifier: "
        "docs/tutorials/classifier.md"
    )


if __name__ == "__main__":
    main()
