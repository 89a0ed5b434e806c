# Copyright (c) The mokd_det authors.
"""A study: its file, the records of its runs, and their table."""

import json
import math
import re
import statistics
from pathlib import Path

import yaml
from scipy.stats import t as student_t

__all__ = [
    "format_table",
    "load_study",
    "metric_of",
    "read_records",
    "record_of",
    "runs_of",
    "summarize",
    "values_of",
]

KEYS = {"teacher", "seeds", "baseline", "metrics", "opts", "axis", "methods"}
METHOD_KEYS = {"commit", "config", "opts", "seeds", "line", "x"}


def load_study(path):
    """
    Args:
        path (str): of the study file.

    Returns:
        dict: with all keys, and ``folder`` and ``name``.

    Raises:
        ValueError: an unknown or missing key, or two methods whose records would be one file.
    """
    path = Path(path)
    study = yaml.safe_load(path.read_text())
    if unknown := set(study) - KEYS:
        raise ValueError(f"{path}: unknown {sorted(unknown)}; expected some of {sorted(KEYS)}.")
    if missing := {"seeds", "baseline", "metrics", "methods"} - set(study):
        raise ValueError(f"{path}: {sorted(missing)} are missing.")
    study = {"teacher": [], "opts": [], "axis": "", **study}
    for key in ("teacher", "baseline"):
        if isinstance(study[key], str):
            study[key] = [study[key]]
    for baseline in study["baseline"]:
        if baseline not in study["methods"]:
            raise ValueError(f"{path}: the baseline '{baseline}' is none of its methods.")
    for name, method in study["methods"].items():
        if unknown := set(method) - METHOD_KEYS:
            raise ValueError(f"{path}: method '{name}' has unknown {sorted(unknown)}.")
        if "config" not in method:
            raise ValueError(f"{path}: method '{name}' has no config.")
        if ("line" in method) != ("x" in method) or ("x" in method and not study["axis"]):
            raise ValueError(f"{path}: '{name}' needs line and x, and the study an axis, or none.")
    study = {**study, "folder": path.with_suffix(""), "name": path.stem}
    names = {}
    for name in study["methods"]:
        file = record_of(study, name, 1).name
        if file in names:
            raise ValueError(
                f"{path}: '{names[file]}' and '{name}' would both be {file}: rename one."
            )
        names[file] = name
    return study


def runs_of(study, only=(), first=None):
    """
    Return (method, seed) of all runs, or of the methods ``only`` and each method's ``first`` seeds.
    The first seed of every method comes first. Methods with a ``commit`` are of older code: their
    records are shown, but this code cannot run them.
    """
    if unknown := set(only) - set(study["methods"]):
        raise ValueError(f"--only {sorted(unknown)}: the methods are {list(study['methods'])}.")
    for name in only:
        if commit := study["methods"][name].get("commit"):
            raise ValueError(
                f"--only '{name}': it is of the code of commit {commit}, which is not this one's. "
                "Check that commit out and run the study file it has."
            )
    seeds = {
        name: method.get("seeds", study["seeds"])[:first]
        for name, method in study["methods"].items()
        if (not only or name in only) and "commit" not in method
    }
    return [
        (name, own[i])
        for i in range(max(map(len, seeds.values()), default=0))
        for name, own in seeds.items()
        if i < len(own)
    ]


def record_of(study, name, seed):
    """The file of one run's results."""
    name = re.sub(r"[^\w.]+", "_", name).strip("_")
    return study["folder"] / f"{name}-{seed}.json"


def metric_of(results, metric):
    """Return results["a"]["b"]["c"] for "a/b/c", as :func:`number_of` counts it."""
    for key in metric.split("/"):
        results = results[key]
    return number_of(results)


def number_of(value):
    """
    Return a metric's value, 0.0 for None or NaN: Detectron2 has no AP for a detector that predicts
    nothing at all, and such a detector finds nothing.
    """
    return 0.0 if value is None or math.isnan(value) else value


def read_records(study):
    """Return dict: method -> seed -> record, of the runs that are there."""
    records = {}
    for name, method in study["methods"].items():
        for seed in method.get("seeds", study["seeds"]):
            path = record_of(study, name, seed)
            if path.is_file():
                records.setdefault(name, {})[seed] = json.loads(path.read_text())
    return records


def interval(values):
    """Half of the 95 % confidence interval of a mean (Student's t); NaN for a single value."""
    if len(values) < 2:
        return math.nan
    quantile = student_t.ppf(0.975, len(values) - 1)
    return float(quantile) * statistics.stdev(values) / math.sqrt(len(values))


def values_of(by_seed, metric):
    """Return dict: seed -> value of the metric, see :func:`metric_of`."""
    return {seed: metric_of(record["results"], metric) for seed, record in by_seed.items()}


def _comparable(others, by_seed):
    """The baseline's records whose seed is there too, and whose teacher, if any, is the same."""
    return {
        seed: record
        for seed, record in others.items()
        if seed in by_seed
        and record.get("teacher_sha256") in (None, by_seed[seed].get("teacher_sha256"))
    }


def summarize(study):
    """
    Returns:
        list[dict]: for each method and metric ``teachers``, the checksums of its teachers' weights
        (names of those without a file) as far as they were recorded; ``values`` by seed, ``mean``,
        ``std``, and for each baseline in ``differences`` the mean of the paired ``difference`` to
        it and ``interval``, half of its 95 % interval; None where there is too little to say. A run
        is not compared with one that had another teacher: that difference would be the teachers'.
    """
    records = read_records(study)
    rows = []
    for name, by_seed in records.items():
        checksums = {record.get("teacher_sha256") for record in by_seed.values()}
        for metric in study["metrics"]:
            values = values_of(by_seed, metric)
            differences = {}
            for baseline in study["baseline"]:
                others = records.get(baseline, {}) if baseline != name else {}
                base = values_of(_comparable(others, by_seed), metric)
                pairs = [values[seed] - base[seed] for seed in base]
                differences[baseline] = {
                    "difference": statistics.mean(pairs) if pairs else None,
                    "interval": interval(pairs) if len(pairs) > 1 else None,
                }
            rows.append(
                {
                    "method": name,
                    "metric": metric,
                    "teachers": sorted(checksums - {None}),
                    "seeds": len(values),
                    "values": values,
                    "mean": statistics.mean(values.values()),
                    "std": statistics.stdev(values.values()) if len(values) > 1 else None,
                    "differences": differences,
                }
            )
    return rows


def format_table(study, rows):
    """Return the rows as a Markdown table, one line a method."""
    head = ["method", "teacher", "seeds"]
    for metric in study["metrics"]:
        head += [metric, *(f"difference to {baseline}" for baseline in study["baseline"])]
    lines = [head, ["---"] * len(head)]
    for name in dict.fromkeys(row["method"] for row in rows):
        own = {row["metric"]: row for row in rows if row["method"] == name}
        first = next(iter(own.values()))
        # The start of a SHA-256 is enough; a name, "IMAGENET1K_V1", is not known by its start.
        teachers = ", ".join(t[:8] if len(t) == 64 else t for t in first["teachers"])
        cells = [name, teachers, str(first["seeds"])]
        for metric in study["metrics"]:
            row = own[metric]
            std = "" if row["std"] is None else f" (std {row['std']:.2f})"
            cells.append(f"{row['mean']:.2f}{std}")
            for paired in row["differences"].values():
                difference, half = paired["difference"], paired["interval"]
                spread = "" if half is None else f" ± {half:.2f}"
                cells.append("" if difference is None else f"{difference:+.2f}{spread}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
