#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Write MODEL_ZOO.md and docs/chart.svg from the records in studies/ and the configs.

Example:
  python studies/model_zoo.py
"""

import argparse
from pathlib import Path

from mokd_det.command_line import add_debug, errors_as_messages
import plots
import records

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Model zoo

Written by `python studies/model_zoo.py`; a test holds it to the records. Every model is trained by `python tools/train_net.py --config-file CONFIG [--num-gpus 8]`, at the COCO and ImageNet schedules on 8 GPUs.

Numbers are val / test, means over seeds. Differences are paired seed by seed, ± half of the 95 % interval (Student's t; none for one seed). *Loss ratio* is the default rule. A collapsed run is one that ended far below the others of its row; it is in the mean.
The studies train shorter or at another learning rate than some configs: `studies/NAME.yaml` has the overrides. `studies/NAME.json` has every run: results, commit, checksums of weights, and the overrides as they were run, with the option names of that time.
`python studies/run.py studies/NAME.yaml --run --only "METHOD" --output FOLDER` runs a row again. The same seed trains another teacher on another kind of processor, so only runs with the same teacher are compared.
"""  # noqa: E501
# Task -> (study, data and measure, methods, the last of them today's default). The study's first
# baselines are the student from scratch and, if there is another, fixed weights.
MAIN = {
    "Detection": (
        ("bccd_features_random", "BCCD, box AP", "default"),
        ("neon_features", "NEON trees, box AP50", "default"),
    ),
    "Classification": (
        ("mnist", "MNIST, 3,500 images, top-1", "loss ratio"),
        ("fashion_mnist", "Fashion-MNIST, 10,000 images, top-1", "loss ratio"),
    ),
}
RECIPES = {
    "Detection": (("COCO-Detection", "COCO"), ("COCO-InstanceSegmentation", "COCO")),
    "Classification": (("ImageNet-Classification", "ImageNet"),),
}
ENDS = ("_3x_LSJ", "_3x", "_1x")  # schedules of one recipe
FIXED = [f"fixed 1:{features}:{logits}" for features in (0.1, 1, 10) for logits in (0.1, 0.3, 1, 3)]
# Below this the chart has no interval.
FEW_SEEDS = 3
LONG = ["scratch, twice as long", "loss ratio, twice as long"]
# Title, rows as (prefix, study, methods), and a column more: its baseline.
TABLES = (
    (
        "Twice the length",
        (("MNIST: ", "mnist", ["loss ratio", "loss ratio, every tenth step measured", *LONG]),),
        "scratch, twice as long",
    ),
    (
        "Features of detectors",
        (
            ("Trees, AP50: ", "neon_features", None),
            ("BCCD, random RetinaNet: ", "bccd_features_random", None),
            ("BCCD, R-CNN: ", "bccd_features_rcnn", None),
            ("BCCD, RetinaNet: ", "bccd_features", None),
            ("BCCD, SSDlite: ", "bccd_torchvision", None),
        ),
        "features and outputs",
    ),
    ("Fixed weights on MNIST", (("", "mnist", FIXED),), None),
    ("Ablation of the features on MNIST", (("", "mnist_ablation", None),), None),
    (
        "AdamW and bad teachers on MNIST",
        (("AdamW: ", "mnist_adamw", None), ("Teachers: ", "mnist_teachers", None)),
        None,
    ),
    ("Units of the distillation losses on MNIST", (("", "mnist_scale", None),), None),
)


def load(name):
    """Return a study and its summary."""
    study = records.load_study(ROOT / "studies" / f"{name}.yaml")
    return study, records.summarize(study)


def link(path, text=None):
    return f"[{text or Path(path).stem}]({path})"


class Notes:
    """Footnotes of one table, numbered in the order of its rows."""

    def __init__(self):
        self.texts = []

    def mark(self, method):
        """Return the mark of a method's note, if it has one."""
        if "note" not in method:
            return ""
        if method["note"] not in self.texts:
            self.texts.append(method["note"])
        return f" ({self.texts.index(method['note']) + 1})"

    def text(self):
        notes = " ".join(f"({number}) {text}" for number, text in enumerate(self.texts, 1))
        return f"\n\n{notes}" if notes else ""


def rows_of_study(notes, name, data, *methods):
    """Rows of a main table: teacher, from scratch, fixed weights, methods, today's default."""
    study, summary = load(name)
    scratch, fixed = [*study["baseline"], None][:2]
    file = link(f"studies/{name}.json")
    teacher = records.read_file(study["records"])["teachers"][0]
    values = (records.metric_of(teacher["results"], metric) for metric in study["metrics"])
    result = " / ".join(f"{value:.1f}" for value in values)
    rows = [[link(teacher["config"]), f"{data}: teacher", "1", result, "", "", file]]
    labels = {scratch: "from scratch", fixed: fixed, **{method: method for method in methods}}
    labels[methods[-1]] = "**default**"
    for method, label in labels.items():
        if method is None:
            continue
        row, config = summary[method], study["methods"][method]["config"]
        mark = notes.mark(study["methods"][method])
        cells = [link(config), f"{data}: {label}{mark}", str(records.seeds_of(row))]
        cells.append(records.means_cell(row))
        cells += [records.difference_cell(row, baseline) for baseline in (scratch, fixed)]
        rows.append([*cells, file])
    return rows


def main_studies():
    """
    Yield, of each main study: data, summary, from scratch, fixed weights, and the method that
    stands for the default: the last one, or with too few seeds its predecessor.
    """
    for name, data, *methods in (study for task in MAIN.values() for study in task):
        study, summary = load(name)
        enough = [m for m in methods if records.seeds_of(summary[m]) >= FEW_SEEDS]
        method = (enough or methods)[-1]
        shown = data if method == methods[-1] else f"{data}\n({method})"
        yield shown, summary, *study["baseline"][:2], method


def gains():
    """
    Return what the chart shows, on test: data -> "fixed weights" and "default" -> difference to
    from scratch, half of its interval or None, and both as a label.
    """
    return {
        data: {
            label: _gain(summary[of], scratch)
            for label, of in (("fixed weights", fixed), ("default", method))
        }
        for data, summary, scratch, fixed, method in main_studies()
    }


def readme_rows():
    """Return the cells of README's table of results after the first: seeds and numbers on test."""
    rows = []
    for _, summary, scratch, fixed, method in main_studies():
        of = {name: dict([list(row.items())[-1]]) for name, row in summary.items()}  # on test
        cells = [str(records.seeds_of(of[method])), records.means_cell(of[scratch])]
        cells += [records.means_cell(of[method])]
        cells += [records.difference_cell(of[method], baseline) for baseline in (scratch, fixed)]
        rows.append(cells)
    return rows


def _gain(row, scratch):
    of = row[list(row)[-1]]  # the last metric is of test
    mean, half = of["differences"][scratch]
    seeds = len(of["values"])
    label = f"{records.rounded(mean):+.1f}"
    if seeds < FEW_SEEDS or half is None:
        return mean, None, f"{label} ({seeds} seed{'s' if seeds > 1 else ''})"
    return mean, half, f"{label} ± {records.rounded(half):.1f}"


def recipes(folder, data):
    """Rows of the configs of a folder, one for each pair of teacher and student."""
    found = {}
    for path in sorted((ROOT / "configs" / folder).glob("mokd_*.yaml")):
        end = next((end for end in ENDS if path.stem.endswith(end)), "")
        found.setdefault(path.stem.removesuffix(end), {})[end] = path.relative_to(ROOT)
    for name, files in found.items():
        more = [link(path, end[1:].replace("_", " ")) for end, path in files.items() if end]
        cell = f"{name}: {', '.join(more)}" if more else link(files[""])
        yield [cell, data, "", "not run here", "", "", ""]


def main_table(task):
    notes = Notes()
    head = ["config", "data, measure", "seeds", "val / test", "- from scratch"]
    head += ["- fixed weights", "records"]
    rows = [row for study in MAIN[task] for row in rows_of_study(notes, *study)]
    rows += [row for group in RECIPES[task] for row in recipes(*group)]
    return f"## {task}\n\n{records.markdown(head, rows)}{notes.text()}\n"


def small_table(title, groups, extra):
    """Rows of one or several studies; rows with the same numbers are joined."""
    notes = Notes()
    loaded = [(prefix, *load(name), methods) for prefix, name, methods in groups]
    # The second baseline is fixed weights, unless it is the column more.
    is_tuned = any(len({*s["baseline"]} - {extra}) > 1 for _, s, *_ in loaded)
    head = ["method", "seeds", "val / test", "- from scratch"]
    head += ["- fixed weights"] if is_tuned else []
    head += [f"- {extra}"] if extra else []
    joined = {}
    for prefix, study, summary, methods in loaded:
        scratch, fixed = [*study["baseline"], None][:2]
        baselines = [scratch, *([fixed] if is_tuned else []), *([extra] if extra else [])]
        for method in methods or summary:
            row = summary[method]
            cells = [str(records.seeds_of(row)), records.means_cell(row)]
            cells += [records.difference_cell(row, baseline) for baseline in baselines]
            label = f"{prefix}{method}{notes.mark(study['methods'][method])}"
            joined.setdefault(tuple(cells), []).append(label)
    rows = [["; ".join(labels), *cells] for cells, labels in joined.items()]
    return f"## {title}\n\n{records.markdown(head, rows)}{notes.text()}\n"


def model_zoo():
    """The whole text."""
    tables = [main_table(task) for task in MAIN] + [small_table(*table) for table in TABLES]
    return "\n".join([HEAD, *tables])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_debug(parser)
    with errors_as_messages(parser.parse_args().debug):
        (ROOT / "MODEL_ZOO.md").write_text(model_zoo())
        plots.plot_gains(gains(), ROOT / "docs/chart.svg")
    print("MODEL_ZOO.md, docs/chart.svg")


if __name__ == "__main__":
    main()
