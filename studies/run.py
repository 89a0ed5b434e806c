#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Run a study, methods x seeds, and make its table and pictures.

Examples:
  python studies/run.py studies/fashion_mnist.yaml --run --jobs 2 --output output/my_study
  python studies/run.py studies/fashion_mnist.yaml --run --only scratch --only "loss ratio"
  python studies/run.py studies/fashion_mnist.yaml --summarize

Every run is one call of tools/train_net.py, on one thread. With several GPUs (those of
CUDA_VISIBLE_DEVICES, if it is set) the jobs take turns on them. The records of all runs are kept in
one file, studies/NAME.json (or in the folder --output). A run that is in it is not run again, so a
study that was stopped goes on. A run's own folder is output/studies/NAME/METHOD-SEED; what an
unfinished run left there is removed. A run that fails leaves the others, and the study fails at its
end. The table (means, and paired differences to the baselines with their 95 % interval) is printed,
pictures go beside the records.

A study file:
  teacher: CONFIG              # or a list; trained once, unless their weights are there
  seeds: [1, 2, 3]
  baseline: scratch            # differences are to this method, seed by seed; or a list of them
  metrics: [SET/TASK/METRIC]   # of results.json; null, which is AP without any box, counts as 0
  opts: [KEY, VALUE, ...]      # overrides of every run
  axis: LABEL                  # of NAME.axis.png: the last metric of methods with "line" and "x"
  balance: [METHOD, ...]       # whose conflict, dominance and weights are kept: NAME.balance.png
  methods:
    scratch: {config: CONFIG}
    mokd: {config: CONFIG, opts: [KEY, VALUE, ...], seeds: [1]}   # seeds: if not all
    mokd 10: {config: CONFIG, opts: [...], line: mokd, x: 10}
    fixed: {config: CONFIG, note: A footnote for MODEL_ZOO.md.}

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
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)
import plots
import records
import torch
from detectron2.utils.file_io import PathManager

from mokd_det.command_line import add_debug, errors_as_messages, positive
from mokd_det.config import load_config
from mokd_det.data.paths import sha256_of
from mokd_det.engine import find_checkpoint
from mokd_det.evaluation import read_json_lines
from mokd_det.files import check_whole

ROOT = Path(__file__).resolve().parent.parent
# What CUDA_VISIBLE_DEVICES calls the GPUs, each lent to one run at a time; filled by run().
gpus = queue.SimpleQueue()
flags = []  # of every run's command, before its overrides
POINTS = 24  # of a series of the balance that is kept
BALANCE = ("cosine_", "dominance_", "weight_", "share_task")  # what balance.png draws


def train(config, opts, output, *more):
    """Run tools/train_net.py; return seconds. RuntimeError if it fails, with the end of its log."""
    command = [sys.executable, "tools/train_net.py", "--config-file", config, *flags, *more]
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


def flag_to_train(output):
    """
    Return the flag with which tools/train_net.py trains a teacher, "" if it is trained. A damaged
    one is trained again, from its last whole checkpoint if there is one.
    """
    weights = output / "model_final.pth"
    if not weights.is_file():
        return "--resume"  # also where nothing is yet
    try:
        check_whole(str(weights))
        return "" if (output / "results.json").is_file() else "--resume"
    except ValueError as error:
        print(f"{weights} is damaged: {error}. It is trained again.", file=sys.stderr, flush=True)
    try:
        find_checkpoint(str(output))
        return "--resume"
    except ValueError:
        return "--overwrite"


def train_teachers(study):
    """Train each teacher unless its weights are there already, and keep its results."""
    for config in study["teacher"]:
        output = ROOT / load_config(str(ROOT / config)).OUTPUT_DIR
        if flag := flag_to_train(output):
            seconds = train(config, [], output, flag)
            print(f"teacher: {config} ({seconds:.0f} s)", flush=True)
        record = {"config": config}
        record["results"] = json.loads((output / "results.json").read_text())
        record["weights_sha256"] = sha256_of(output / "model_final.pth")
        records.add_record(study["records"], "teachers", record)


def read_run(folder, balance=False):
    """
    Args:
        folder (Path): OUTPUT_DIR of a finished run of tools/train_net.py.
        balance (bool): also keep what balance.png draws.

    Returns:
        dict: ``results`` as in results.json; ``balance``, name -> list of [iteration, value],
        medians over equal parts of the training; ``weights_sha256``, of model_final.pth.

    Raises:
        FileNotFoundError: the run is not finished.
    """
    record = {"results": json.loads((folder / "results.json").read_text())}
    if balance and (folder / "balance.json").is_file():
        lines = read_json_lines(str(folder / "balance.json"))
        names = sorted({name for line in lines for name in line})
        record["balance"] = {
            name.rsplit("/", 1)[-1]: medians(lines, name)
            for name in names
            if name.rsplit("/", 1)[-1].startswith(BALANCE)
        }
    record["weights_sha256"] = sha256_of(folder / "model_final.pth")
    return record


def medians(lines, name):
    """A series in few points. Of an iteration that was run twice the later one counts."""
    points = sorted({line["iteration"]: line[name] for line in lines if name in line}.items())
    parts = min(POINTS, len(points))
    edges = [round(i * len(points) / parts) for i in range(parts + 1)]
    found = []
    for start, end in zip(edges, edges[1:]):
        iteration, value = map(statistics.median, zip(*points[start:end]))
        found.append([iteration, float(f"{value:.5g}")])
    return found


def commit():
    """
    Of the code that runs; "-dirty" if files were changed since. Records and pictures of studies do
    not count. None outside a repository.
    """
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    done = git(["git", "rev-parse", "--short=12", "HEAD"])
    if done.returncode:
        return None
    changed = git(
        ["git", "diff", "--quiet", "HEAD", "--", ".", ":!studies/*.json", ":!studies/*.png"]
    ).returncode
    return done.stdout.strip() + ("-dirty" if changed else "")


def teacher_of(study, name):
    """The weights of a method's teacher; None if it needs none."""
    method = study["methods"][name]
    opts = [str(opt) for opt in (*study["opts"], *method.get("opts", []))]
    mokd = load_config(str(ROOT / method["config"]), opts).MOKD
    return mokd.TEACHER.WEIGHTS if mokd.ENABLED else None


def remove_attempt(output):
    """
    Remove the folder of a run without a record: its metrics and balance would be appended to.

    Raises:
        ValueError: the folder leads elsewhere, by a link; nothing is removed.
    """
    if not output.exists():
        return
    studies = ROOT / "output" / "studies"
    if output.resolve() != studies.resolve() / output.relative_to(studies):
        raise ValueError(
            f"{output} is to be removed before its run, but leads to {output.resolve()}: expected "
            "a folder of output/studies, without links. Move it away or remove it."
        )
    shutil.rmtree(output)


def run_one(study, name, seed):
    """Run one method with one seed and keep its record; return what was done."""
    if seed in records.read_records(study).get(name, {}):
        return f"{name} seed {seed}: there already"
    method = study["methods"][name]
    opts = [*study["opts"], *method.get("opts", []), "SEED", seed]
    output = ROOT / "output" / "studies" / study["name"] / records.folder_of(name, seed)
    remove_attempt(output)
    code = commit()  # before the run: the checkout may be moved on meanwhile
    seconds = train(method["config"], opts, output)
    record = {"method": name, "seed": seed, "config": method["config"], "opts": opts}
    record |= {"seconds": round(seconds, 1), "commit": code}
    record |= read_run(output, balance=name in study["balance"])
    if teacher := teacher_of(study, name):
        # Another processor trains another teacher from the same seed.
        file = ROOT / PathManager.get_local_path(teacher)
        # No file: the name of a weight enum, which says it as well.
        record["teacher_sha256"] = sha256_of(file) if file.is_file() else teacher
    records.add_record(study["records"], "runs", record)
    values = [f"{m}: {records.metric_of(record['results'], m):.2f}" for m in study["metrics"]]
    return f"{name} seed {seed}: {', '.join(values)} ({seconds:.0f} s)"


def lend_gpus(jobs):
    """Fill the queue of GPUs, one entry a job, with those that this user was given."""
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = given.split(",") if given else range(count)
    for job in range(jobs if count else 0):
        gpus.put(visible[job % count])


def run(study, jobs, only, first=None):
    """Run what is missing. SystemExit at the end if any run failed."""
    runs = records.runs_of(study, only, first)
    waits = {name: teacher_of(study, name) is not None for name, _ in runs}
    failed = 0
    lend_gpus(jobs)
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
    """Write the study's pictures beside its records; return their paths."""
    found = records.read_records(study)
    balance, axis = (study["records"].with_suffix(f".{name}.png") for name in ("balance", "axis"))
    drawn = []
    if plots.plot_balance({n: found[n] for n in study["balance"] if n in found}, balance):
        drawn.append(balance)
    metric = study["metrics"][-1]
    values = {name: list(records.values_of(of, metric).values()) for name, of in found.items()}
    lines = {}
    for name, method in study["methods"].items():
        if "x" in method and name in values:
            lines.setdefault(method["line"], {})[float(method["x"])] = values[name]
    baseline = study["baseline"][0]
    if lines and baseline in values:
        plots.plot_axis(lines, (baseline, values[baseline]), study["axis"], metric, axis)
        drawn.append(axis)
    return drawn


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", help="a study file")
    parser.add_argument("--run", action="store_true", help="run what is missing")
    parser.add_argument("--summarize", action="store_true", help="only make table and pictures")
    parser.add_argument("--jobs", type=positive, default=1, help="runs side by side (%(default)s)")
    parser.add_argument("--output", help="folder of records and pictures (that of the study file)")
    parser.add_argument("--only", action="append", default=[], help="a method; may be repeated")
    parser.add_argument("--first", type=positive, help="only so many seeds of each method")
    parser.add_argument("--trust", action="store_true", help="run the code in config files")
    add_debug(parser)
    args = parser.parse_args()
    if args.run == args.summarize:
        parser.error("give one of --run and --summarize")
    flags.extend(["--trust"] if args.trust else [])
    with errors_as_messages(args.debug):
        run_study(args)


def run_study(args):
    study = records.load_study(args.study)
    if args.output:
        study["records"] = Path(args.output) / study["records"].name
    if args.run:
        run(study, args.jobs, args.only, args.first)
    if not records.read_records(study):
        raise ValueError(f"{study['records']} has no runs of {args.study}: make them with --run.")
    print(records.format_table(study))
    for path in draw(study):
        print(path)


if __name__ == "__main__":
    main()
