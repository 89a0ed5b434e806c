#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Write MODEL_ZOO.md: a table for each study in studies/, from the records of its runs, and the
recipes that have not been run, with their commands.

Example:
  python tools/model_zoo.py
"""

import argparse
from pathlib import Path

import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)

from mokd_det.study import load_study, read_records, record_of, summarize

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Model zoo and studies

Written by `python tools/model_zoo.py` from the records in `studies/`; a test holds it to them.
Every number is a mean over the seeds ± the standard deviation; a column "- X" is the paired
difference to method X, seed by seed, ± half of its 95 % interval (Student's t). All rows are kept,
also those that lose.

"json" is the record of the first seed; one for each seed lies beside it: config, overrides,
commit, metrics and losses over the training, balance, and the SHA-256 of model_final.pth, whose
start is in the table (the file holds the trainer's state as well, so that of equal students may
differ); "teacher" is that of the teacher's. Records without them were made before they
were noted. Rows of other teachers cannot be compared: the same seed trains another one on another
kind of processor. "No record" lists methods of the study file that have not been run with the
teacher of its table.

A row is run again by
`python tools/study.py studies/NAME.yaml --run --only "METHOD" --output FOLDER`; the folded rows
are of older code or another teacher: their study file gives the commit, and they run from it only.
Their names:

- *teacher A*, *teacher B*: run by two other kinds of processor, each with the teacher that the
  same seed gave there; *teacher A* in bfloat16 as well. Of these, *constant dominance* is the
  default rule until commit 56adb64 (the mean cosine started from the first batch, and counted in
  proportion below `AGREEMENT`), *aligned* the default before it, and *task_progress* that with
  another length (commits 27de59a to 83ace7f).
- *dominance 3*: g_task + 3 |g_task| d with a plain running mean of the Gram matrix (commit
  1846406; some records say f1760c0-dirty, the same code before it was committed).
- *constant dominance 3, rising*, and *constant dominance* in names of digits_scale and
  digits_teachers: the default until `loss_ratio` was made it. Records of rows without a rule in
  their overrides are of `constant_dominance`, which the study files say now.
- *constant dominance 3*: the default until commit d968b3b, with a dominance that does not rise.
- *joint trust*: the default until commit 66165f4. `AGREEMENT` was asked of the gradient that
  agrees best, and its answer stood for all.
- *by cosine*: the default from there until 356c07d. Each gradient counted in proportion to its
  cosine with the task's, and projectors learned with their objective's weight.
- *squared trust*: commit 356c07d. Equal shares, but the trust below `AGREEMENT` was the square of
  the ratio, not zero at half of it.
- *heads only*: until commit 26e2714 outputs were distilled at the teacher's proposals only, now the
  RPN is as well where both sides have the same anchors (the trees' pair). All names above are of
  that time, too.
"""
INDEX = """
Studies of today's default, the rule `loss_ratio`: {}.

Of those before it, and of other rules: {}.
"""
NOT_RUN = """## Recipes that were not run here

Neither their data nor the GPUs were there. Each file builds, trains and evaluates on small data in
the tests; its twin without a teacher is the same command with
`MOKD.ENABLED False DATALOADER.RESUMABLE True`.

| config | command |
|---|---|
"""


def table_of(head, rows):
    """Markdown of a table whose cells are strings."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def section(study, records):
    """One study, Markdown: its table, rows of older code folded."""
    comment = [line[1:].strip() for line in study["comment"]]
    metrics = study["metrics"]
    head = ["method", "teacher", "seeds"]
    for metric in metrics:
        head += [metric, *(f"- {baseline}" for baseline in study["baseline"])]
    head += ["config", "record", "weights"]
    current, older = [], []
    rows = summarize(study)
    for name in dict.fromkeys(row["method"] for row in rows):
        own = {row["metric"]: row for row in rows if row["method"] == name}
        first = own[metrics[0]]
        teachers = ", ".join(f"`{checksum[:8]}`" for checksum in first["teachers"])
        cells = [name, teachers, str(first["seeds"])]
        for metric in metrics:
            row = own[metric]
            std = "" if row["std"] is None else f" ± {row['std']:.2f}"
            cells.append(f"{row['mean']:.2f}{std}")
            for paired in row["differences"].values():
                half = "" if paired["interval"] is None else f" ± {paired['interval']:.2f}"
                cells.append(
                    "" if paired["difference"] is None else f"{paired['difference']:+.2f}{half}"
                )
        seed = min(records[name])
        path = f"studies/{study['name']}/{record_of(study, name, seed).name}"
        config = study["methods"][name]["config"]
        sha = records[name][seed].get("weights_sha256")
        cells += [
            f"[{Path(config).stem}]({config})",
            f"[json]({path})",
            f"`{sha[:12]}`" if sha else "",
        ]
        (older if "commit" in study["methods"][name] else current).append(cells)
    pictures = [
        f"[{p.stem}](studies/{study['name']}/{p.name})"
        for p in sorted(study["folder"].glob("*.png"))
    ]
    pictures = f"\n\nPictures: {', '.join(pictures)}." if pictures else ""
    folded = (
        "\n\n<details><summary>Rows of older code or another teacher</summary>\n\n"
        f"{table_of(head, older)}\n\n</details>"
        if older
        else ""
    )
    missing = [f"*{name}*" for name in study["methods"] if name not in records]
    missing = f"\n\nNo record: {', '.join(missing)}." if missing else ""
    parts = (f"## {study['name']}", " ".join(comment), table_of(head, current))
    return "\n\n".join(parts) + f"{missing}{folded}{pictures}\n"


def links_of(names):
    return ", ".join(f"[{name}](#{name})" for name in names)


def model_zoo():
    """The whole text."""
    parts, of_default, others = [HEAD], [], []
    for path in sorted((ROOT / "studies").glob("*.yaml")):
        study = load_study(path)
        study["comment"] = [line for line in path.read_text().splitlines() if line.startswith("#")]
        if records := read_records(study):
            parts.append(section(study, records))
            of_rule = "loss_ratio" in str([study["opts"], study["methods"]])
            (of_default if of_rule else others).append(study["name"])
    parts[0] += INDEX.format(*map(links_of, (of_default, others)))
    recipes = sorted(
        str(path.relative_to(ROOT))
        for group in ("COCO-Detection", "COCO-InstanceSegmentation", "ImageNet-Classification")
        for path in (ROOT / "configs" / group).glob("mokd_*.yaml")
    )
    command = "python tools/train_net.py --config-file {} --num-gpus 8"
    parts.append(
        NOT_RUN + "\n".join(f"| {Path(r).stem} | `{command.format(r)}` |" for r in recipes) + "\n"
    )
    return "\n".join(parts)


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    (ROOT / "MODEL_ZOO.md").write_text(model_zoo())
    print("MODEL_ZOO.md")


if __name__ == "__main__":
    main()
