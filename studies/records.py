# Copyright (c) The mokd_det authors.
"""A study: its file, the records of its runs, means and paired differences."""

import fcntl
import json
import math
import os
import re
import statistics
from pathlib import Path

import yaml
from mokd_det.untrusted import check_file_name, markdown_row, printable
from scipy.stats import t as student_t

KEYS = {"teacher", "seeds", "baseline", "metrics", "opts", "axis", "balance", "methods"}
METHOD_KEYS = {"config", "opts", "seeds", "line", "x", "note"}


def load_study(path):
    """
    Args:
        path (str or Path): of the study file.

    Returns:
        dict: with all keys, ``name``, and ``records``, the path of its JSON file.

    Raises:
        ValueError: no YAML, an unknown or missing key, a wrong type, two methods whose runs would
            share a folder, or what would be an option of the command that a run is, or lead out of
            its folder.
    """
    path = Path(path)
    try:
        study = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no plain YAML: {printable(str(error))}") from error
    if not isinstance(study, dict):
        raise ValueError(f"{path} is no study: expected a mapping with {sorted(KEYS)}.")
    if unknown := set(study) - KEYS:
        raise ValueError(f"{path}: unknown {sorted(unknown)}; expected some of {sorted(KEYS)}.")
    if missing := {"seeds", "baseline", "metrics", "methods"} - set(study):
        raise ValueError(f"{path}: {sorted(missing)} are missing.")
    study = {"teacher": [], "opts": [], "axis": "", "balance": [], **study}
    for key in ("teacher", "baseline"):
        if isinstance(study[key], str):
            study[key] = [study[key]]
    _check_types(path, study)
    for key in ("baseline", "balance"):
        for name in set(study[key]) - set(study["methods"]):
            raise ValueError(f"{path}: {key} '{name}' is none of its methods.")
    _check_methods(path, study)
    _check_commands(path, study)
    check_file_name(path.stem, "the name of a study")
    return {**study, "name": path.stem, "records": path.with_suffix(".json")}


TYPES = {"teacher": str, "baseline": str, "metrics": str, "balance": str, "seeds": int}


def _check_types(path, study):
    if not isinstance(study["methods"], dict) or not study["methods"]:
        raise ValueError(
            f"{path}: methods is {study['methods']!r}: expected NAME: {{config: ...}}."
        )
    lists = [(key, study[key], kind) for key, kind in TYPES.items()]
    for name, method in study["methods"].items():
        if not isinstance(method, dict):
            raise ValueError(f"{path}: method '{name}' is {method!r}: expected {{config: ...}}.")
        lists.append((f"seeds of method '{name}'", method.get("seeds", []), int))
        lists.append((f"opts of method '{name}'", method.get("opts", []), object))
    for key, value, kind in [*lists, ("opts", study["opts"], object)]:
        fits = isinstance(value, list) and all(
            type(x) is int if kind is int else isinstance(x, kind) for x in value
        )
        if not fits:
            expected = {int: " of integers", str: " of strings"}.get(kind, " KEY, VALUE, ...")
            raise ValueError(f"{path}: {key} is {value!r}: expected a list{expected}.")


def _check_methods(path, study):
    names = {}
    for name, method in study["methods"].items():
        if unknown := set(method) - METHOD_KEYS:
            raise ValueError(f"{path}: method '{name}' has unknown {sorted(unknown)}.")
        if "config" not in method:
            raise ValueError(f"{path}: method '{name}' has no config.")
        if ("line" in method) != ("x" in method) or ("x" in method and not study["axis"]):
            raise ValueError(f"{path}: '{name}' needs line and x, and the study an axis, or none.")
        folder = folder_of(name, 1)
        if folder in names:
            raise ValueError(f"{path}: '{names[folder]}' and '{name}' share {folder}: rename one.")
        names[folder] = name


def _check_commands(path, study):
    """A study chooses configs and their keys, but no options of the command, such as --trust."""
    methods = study["methods"].values()
    configs = [*study["teacher"], *(method["config"] for method in methods)]
    keys = [key for opts in (study["opts"], *(m.get("opts", []) for m in methods)) for key in opts]
    for text in (*configs, *keys):
        if str(text).startswith("--"):
            raise ValueError(f"{path}: '{text}' is an option of the command line: remove it.")


def folder_of(name, seed):
    """Name of a run's output folder."""
    name = re.sub(r"[^\w.]+", "_", name).strip("_")
    return f"{name}-{seed}"


def runs_of(study, only=(), first=None):
    """
    Return (method, seed) of all runs, or of the methods ``only`` and each method's ``first`` seeds.
    The first seed of every method comes first.
    """
    if unknown := set(only) - set(study["methods"]):
        raise ValueError(f"--only {sorted(unknown)}: the methods are {list(study['methods'])}.")
    seeds = {
        name: method.get("seeds", study["seeds"])[:first]
        for name, method in study["methods"].items()
        if not only or name in only
    }
    return [
        (name, own[i])
        for i in range(max(map(len, seeds.values()), default=0))
        for name, own in seeds.items()
        if i < len(own)
    ]


def read_file(path):
    """Return dict: ``teachers`` and ``runs``, lists of records; empty if there is no file yet."""
    if not path.is_file():
        return {"teachers": [], "runs": []}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} holds no records of a study: {error}") from error


def write_file(path, content):
    """A line for each record. The file is replaced at once, so it is whole at any time."""
    blocks = [
        f'"{kind}": [\n' + ",\n".join(map(json.dumps, records)) + "\n]"
        for kind, records in content.items()
    ]
    part = path.with_suffix(".part")
    part.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    os.replace(part, path)


def add_record(path, kind, record):
    """
    Add a record, or replace that of the same run. Other threads and processes may do so as well.

    Args:
        path (Path): the JSON file.
        kind (str): "teachers" or "runs".
        record (dict): with ``config``, and for runs ``method`` and ``seed``.
    """

    names = {"teachers": ("config",), "runs": ("method", "seed")}[kind]

    def key(record):
        return [record[name] for name in names]

    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # released when the folder is closed
        content = read_file(path)
        others = [r for r in content[kind] if key(r) != key(record)]
        write_file(path, {**content, kind: [*others, record]})
    finally:
        os.close(folder)


def read_records(study):
    """Return dict: method -> seed -> record, of the runs that are there."""
    found = {(run["method"], run["seed"]): run for run in read_file(study["records"])["runs"]}
    records = {}
    for name, seed in sorted(runs_of(study), key=lambda run: run[1]):
        if (name, seed) in found:
            records.setdefault(name, {})[seed] = found[name, seed]
    return {name: records[name] for name in study["methods"] if name in records}


def metric_of(results, metric):
    """
    Return results["a"]["b"]["c"] for "a/b/c"; 0.0 for None or NaN: Detectron2 has no AP for a
    detector that predicts nothing at all, and such a detector finds nothing.
    """
    for key in metric.split("/"):
        results = results[key]
    return 0.0 if results is None or math.isnan(results) else results


def values_of(by_seed, metric):
    """Return dict: seed -> value of the metric."""
    return {seed: metric_of(record["results"], metric) for seed, record in by_seed.items()}


def paired(values, others):
    """
    Return the mean difference of the seeds that both have, and half of its 95 % interval (Student's
    t; None for one seed). None if they share no seed.
    """
    pairs = [values[seed] - others[seed] for seed in values if seed in others]
    if not pairs:
        return None
    if len(pairs) == 1:
        return pairs[0], None
    factor = student_t.ppf(0.975, len(pairs) - 1) / math.sqrt(len(pairs))
    return statistics.mean(pairs), factor * statistics.stdev(pairs)


def _comparable(by_seed, others):
    """Return those of ``others`` that had the same teacher as the run of their seed, or none."""

    def same(record, other):
        teacher = other.get("teacher_sha256")
        return teacher is None or teacher == record.get("teacher_sha256")

    return {s: other for s, other in others.items() if s in by_seed and same(by_seed[s], other)}


def summarize(study):
    """
    Returns:
        dict: method -> metric -> dict with ``values`` by seed, ``mean``, ``std`` (None for one
        seed), and ``differences``: baseline -> see :func:`paired`. A run is not compared with one
        of another teacher: that difference would be the teachers'.
    """
    records = read_records(study)
    rows = {}
    for name, by_seed in records.items():
        rows[name] = {}
        for metric in study["metrics"]:
            values = values_of(by_seed, metric)
            others = {b: _comparable(by_seed, records.get(b, {})) for b in study["baseline"]}
            rows[name][metric] = {
                "values": values,
                "mean": statistics.mean(values.values()),
                "std": statistics.stdev(values.values()) if len(values) > 1 else None,
                "differences": {
                    baseline: None if baseline == name else paired(values, values_of(of, metric))
                    for baseline, of in others.items()
                },
            }
    return rows


def rounded(value):
    """One decimal, halves away from zero, as a reader rounds; never -0.0."""
    return math.copysign(math.floor(abs(value) * 10 + 0.5 + 1e-6) / 10, value) + 0.0


def means_cell(row):
    """A row's means, "val / test"."""
    return " / ".join(f"{rounded(of['mean']):.1f}" for of in row.values())


def difference_cell(row, baseline):
    """A row's differences to a baseline, "val / test"; empty if there is none."""
    found = [of["differences"].get(baseline) for of in row.values()]
    if None in found:
        return ""
    return " / ".join(
        f"{rounded(difference):+.1f}" + ("" if half is None else f" ± {rounded(half):.1f}")
        for difference, half in found
    )


def seeds_of(row):
    return len(next(iter(row.values()))["values"])


def markdown(head, rows):
    """Markdown of a table whose cells are strings."""
    return "\n".join(map(markdown_row, [head, ["---"] * len(head), *rows]))


def format_table(study):
    """Return a study's summary as a Markdown table, one line a method."""
    head = ["method", "seeds", " / ".join(study["metrics"])]
    head += [f"- {baseline}" for baseline in study["baseline"]]
    lines = [
        [name, str(seeds_of(row)), means_cell(row)]
        + [difference_cell(row, baseline) for baseline in study["baseline"]]
        for name, row in summarize(study).items()
    ]
    return markdown(head, lines)
