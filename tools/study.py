#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Run a study, methods x seeds, and make its table and pictures.

Examples:
  python tools/study.py studies/fashion_mnist.yaml --run --jobs 2
  python tools/study.py studies/fashion_mnist.yaml --run --only scratch --only mokd
  python tools/study.py studies/fashion_mnist.yaml --summarize

Every run is one call of tools/train_net.py, on one thread; with GPUs (those of
CUDA_VISIBLE_DEVICES, if it is set) the jobs take turns on them. What it gave (results, metrics over
iterations, losses, balance, checksums of weights) is kept in studies/NAME/METHOD-SEED.json (or in
the folder --output); a run whose file is there is not run again, so a study that was stopped goes
on. A run starts in an empty folder: what an earlier one without that file left in
output/studies/NAME/METHOD-SEED is removed. A run that fails leaves the others, and the study fails
at its end. The table (mean, standard deviation, paired difference to the baselines with its 95 %
interval) is printed and written beside them to table.md and table.json, pictures to curves.png,
balance.png and axis.png as far as there is something to draw.

A study file:
  teacher: CONFIG              # or a list; trained once, unless their weights are there
  seeds: [1, 2, 3]
  baseline: scratch            # differences are to this method, seed by seed; or a list of them
  metrics: [SET/TASK/METRIC]   # of results.json; null, which is AP without any box, counts as 0
  opts: [KEY, VALUE, ...]      # overrides of every run
  axis: LABEL                  # of axis.png: the last metric of methods that have "line" and "x"
  methods:
    scratch: {config: CONFIG}
    mokd: {config: CONFIG, opts: [KEY, VALUE, ...], seeds: [1]}   # seeds: if not all
    mokd 10: {config: CONFIG, opts: [...], line: mokd, x: 10}
    before: {config: CONFIG, commit: HASH}   # of older code: its records are shown, never run

Seeds give initial weights, order of the data and augmentation, alike for every method (a detector
from scratch needs DATALOADER.RESUMABLE True for that).
"""

import argparse
import concurrent.futures
import functools
import json
import os
import queue
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)
import torch
from detectron2.utils.file_io import PathManager

from mokd_det.config import load_config
from mokd_det.data.packages import sha256_of
from mokd_det.study import (
    format_table,
    load_study,
    metric_of,
    plot_axis,
    plot_balance,
    plot_curves,
    read_records,
    read_run,
    record_of,
    runs_of,
    summarize,
    values_of,
)

ROOT = Path(__file__).resolve().parent.parent
# What CUDA_VISIBLE_DEVICES calls the GPUs, each lent to one run at a time; filled by run().
gpus = queue.SimpleQueue()


def train(config, opts, output):
    """Run tools/train_net.py; return seconds. RuntimeError if it fails, with the end of its log."""
    command = [sys.executable, "tools/train_net.py", "--config-file", config]
    command += [str(opt) for opt in opts] + ["OUTPUT_DIR", str(output)]
    start = time.time()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    gpu = None if gpus.empty() else gpus.get()
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    finally:
        if gpu is not None:
            gpus.put(gpu)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return time.time() - start


def train_teachers(study):
    """Train each teacher unless its weights are there already, and keep its results."""
    for config in study["teacher"]:
        output = ROOT / load_config(str(ROOT / config)).OUTPUT_DIR
        if not (output / "model_final.pth").is_file():
            seconds = train(config, [], output)
            print(f"teacher: {config} ({seconds:.0f} s)", flush=True)
        results = json.loads((output / "results.json").read_text())
        name = "teacher" if len(study["teacher"]) == 1 else f"teacher_{Path(config).stem}"
        content = {"config": config, "results": results}
        content["weights_sha256"] = sha256_of(output / "model_final.pth")
        write_json(study["folder"] / f"{name}.json", content)


def write_json(path, content):
    """A line for each key. Within one folder, so the file is either absent or whole."""
    part = path.with_suffix(f".{os.getpid()}.part")  # another process may fill the same folder
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(part, path)


def commit():
    """
    Of the code that runs; "-dirty" if files were changed since, but for studies' records, which
    change nothing. None outside a repository.
    """
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    done = git(["git", "rev-parse", "--short=12", "HEAD"])
    if done.returncode:
        return None
    changed = git(["git", "diff", "--quiet", "HEAD", "--", ".", ":!studies/*/*"]).returncode
    return done.stdout.strip() + ("-dirty" if changed else "")


def teacher_of(study, name):
    """The weights of a method's teacher; None if it needs none."""
    method = study["methods"][name]
    opts = [str(opt) for opt in (*study["opts"], *method.get("opts", []))]
    mokd = load_config(str(ROOT / method["config"]), opts).MOKD
    return mokd.TEACHER.WEIGHTS if mokd.ENABLED else None


def remove_attempt(study, run):
    """
    Remove the folder of a run without a record: its metrics and balance would be appended to.

    Raises:
        ValueError: the folder leads elsewhere, by a link; nothing is removed.
    """
    studies = ROOT / "output" / "studies"
    output = studies / study["name"] / run
    if not output.exists():
        return
    if output.resolve() != studies.resolve() / study["name"] / run:
        raise ValueError(
            f"{output} is to be removed before its run, but leads to {output.resolve()}: expected "
            "a folder of output/studies, without links. Move it away or remove it."
        )
    shutil.rmtree(output)


def run_one(study, name, seed):
    """Run one method with one seed and keep its results; return what was done."""
    record = record_of(study, name, seed)
    if record.is_file():
        return f"{name} seed {seed}: there already"
    method = study["methods"][name]
    opts = [*study["opts"], *method.get("opts", []), "SEED", seed]
    output = ROOT / "output" / "studies" / study["name"] / record.stem
    remove_attempt(study, record.stem)
    code = commit()  # before the run: the checkout may be moved on meanwhile
    seconds = train(method["config"], opts, output)
    content = {"method": name, "seed": seed, "config": method["config"], "opts": opts}
    content |= {"seconds": round(seconds, 1), "commit": code, **read_run(output)}
    if teacher := teacher_of(study, name):
        # Another processor trains another teacher from the same seed.
        file = ROOT / PathManager.get_local_path(teacher)
        # No file: the name of a weight enum, which says it as well.
        content["teacher_sha256"] = sha256_of(file) if file.is_file() else teacher
    write_json(record, content)
    values = ", ".join(f"{m}: {metric_of(content['results'], m):.2f}" for m in study["metrics"])
    return f"{name} seed {seed}: {values} ({seconds:.0f} s)"


def run(study, jobs, only, first=None):
    """Run what is missing. SystemExit at the end if any run failed."""
    study["folder"].mkdir(parents=True, exist_ok=True)
    runs = runs_of(study, only, first)
    names = dict.fromkeys(name for name, _ in runs)
    waits = {name: teacher_of(study, name) is not None for name in names}
    failed = 0
    count = torch.cuda.device_count()
    # Of several users of a machine each is given some of its GPUs: only those are lent.
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = given.split(",") if given else range(count)
    for job in range(jobs if count else 0):
        gpus.put(visible[job % count])
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        teacher = pool.submit(train_teachers, study) if any(waits.values()) else None

        def one(name, seed):
            if waits[name]:
                teacher.result()
            return run_one(study, name, seed)

        # Those without a teacher run beside its training.
        todo = {
            pool.submit(one, *item): item for item in sorted(runs, key=lambda item: waits[item[0]])
        }
        for done in concurrent.futures.as_completed(todo):
            try:
                print(done.result(), flush=True)
            except Exception as error:  # whatever it is, the other runs go on
                failed += 1
                name, seed = todo[done]
                lines = "".join(traceback.format_exception(error))
                print(f"{name} seed {seed} failed:\n{lines}", file=sys.stderr, flush=True)
    if failed:
        raise SystemExit(f"{failed} runs failed, see above; the others are kept.")


def draw(study):
    """Write the study's pictures beside its table; return their paths."""
    records = read_records(study)
    paths = {name: study["folder"] / f"{name}.png" for name in ("curves", "balance", "axis")}
    drawn = []
    if plot_curves(records, study["metrics"], paths["curves"]):
        drawn.append(paths["curves"])
    if plot_balance(records, paths["balance"]):
        drawn.append(paths["balance"])
    metric = study["metrics"][-1]
    lines = {}
    for name, method in study["methods"].items():
        if "x" in method and name in records:
            values = list(values_of(records[name], metric).values())
            lines.setdefault(method["line"], {})[float(method["x"])] = values
    baseline = study["baseline"][0]
    if lines and baseline in records:
        reference = baseline, list(values_of(records[baseline], metric).values())
        plot_axis(lines, reference, study["axis"], metric, paths["axis"])
        drawn.append(paths["axis"])
    return drawn


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", help="a study file")
    parser.add_argument("--run", action="store_true", help="run what is missing")
    parser.add_argument("--summarize", action="store_true", help="only make table and pictures")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (%(default)s)")
    parser.add_argument("--output", help="folder of the results (studies/NAME)")
    parser.add_argument("--only", action="append", default=[], help="a method; may be repeated")
    parser.add_argument("--first", type=int, help="only so many seeds of each method")
    args = parser.parse_args()
    if args.run == args.summarize:
        parser.error("give one of --run and --summarize")
    study = load_study(args.study)
    if args.output:
        study["folder"] = Path(args.output)
    if args.run:
        run(study, args.jobs, args.only, args.first)
    rows = summarize(study)
    if not rows:
        parser.error(f"{study['folder']} has no records of {args.study}: make them with --run")
    table = format_table(study, rows)
    (study["folder"] / "table.json").write_text(json.dumps(rows, indent=1))
    (study["folder"] / "table.md").write_text(table + "\n")
    print(table)
    for path in draw(study):
        print(path)


if __name__ == "__main__":
    main()
