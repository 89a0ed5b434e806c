# Copyright (c) The mokd_det authors.
"""A run, as the files in its OUTPUT_DIR tell it."""

import dataclasses
import json
import math
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..logs import Series, read_series

Results = dict[str, dict[str, dict[str, float | None]]]
"""By data set, task and metric."""


# Of Detectron2's evaluators and ours.
TASKS = ("bbox", "segm", "keypoints", "panoptic_seg", "sem_seg", "classification")


@dataclasses.dataclass
class Run:
    """
    Attributes:
        label: a short name, unique among the runs of a report.
        options: the config as {full key: value}.
        metrics: losses, speed and evaluations, from ``metrics.json``.
        balance: from ``balance.json``; empty without a teacher.
        results: of the last evaluation; None where a metric has no value.
        results_at: after how many iterations, if the run has not written its final results.
        teacher_results: of ``--with-teacher``; mostly empty.
        summary: what training wrote at its start (``summary.json``); may be empty.
        zoo_row: what ``--zoo-row`` wrote; may be empty.
    """

    folder: Path
    label: str
    options: dict[str, Any]
    metrics: Series
    balance: Series
    results: Results
    results_at: int | None
    teacher_results: Results
    summary: dict[str, Any]
    zoo_row: dict[str, Any]

    @property
    def is_distilled(self) -> bool:
        return bool(self.options.get("MOKD.ENABLED"))

    @property
    def iterations(self) -> int:
        """How many were logged."""
        steps = self.metrics.get("total_loss", ([], []))[0]
        return steps[-1] + 1 if steps else 0

    def median(self, name: str) -> float | None:
        """Return the median over time of what ``metrics.json`` has under a name."""
        values = self.metrics.get(name, ([], []))[1]
        return statistics.median(values) if values else None

    @property
    def memory(self) -> int | None:
        """Return the most MiB on a GPU, which only ``log.txt`` has."""
        return max(map(int, re.findall(r"max_mem: (\d+)M", self._log())), default=None)

    @property
    def hours(self) -> float | None:
        """Return how long training took, all parts of a resumed run; None: it has not ended."""
        pattern = r"Total training time: (?:(\d+) days?, )?(\d+):(\d+):(\d+)"
        parts = [[int(x or 0) for x in found] for found in re.findall(pattern, self._log())]
        return sum(24 * d + h + m / 60 + s / 3600 for d, h, m, s in parts) if parts else None

    def _log(self) -> str:
        path = self.folder / "log.txt"
        return path.read_text(errors="replace") if path.is_file() else ""


def read_runs(folders: Sequence[str]) -> list[Run]:
    """
    Read the runs in these folders. ValueError: a folder is given twice, or a file in it is no JSON
    or YAML; FileNotFoundError: it is not the OUTPUT_DIR of a training.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if twice := sorted({str(path) for path in paths if paths.count(path) > 1}):
        raise ValueError(f"RUN '{twice[0]}' is given twice: give each folder once.")
    return [_read_run(path, label) for path, label in zip(paths, _labels(paths))]


def role_of(run: Run, runs: Sequence[Run]) -> str:
    """Return what a run is among others: "student", "from scratch", "teacher" or "run"."""
    if run.is_distilled:
        return "student"
    students = [other for other in runs if other.is_distilled]
    if any(run.folder == _teacher_folder(student) for student in students):
        return "teacher"
    return "from scratch" if any(has_model_of(run, student) for student in students) else "run"


def _teacher_folder(run: Run) -> Path:
    weights = str(run.options.get("MOKD.TEACHER.WEIGHTS", ""))
    return Path(os.path.abspath(os.path.dirname(weights)))


def has_model_of(run: Run, other: Run) -> bool:
    """Whether the options of both models are the same, but for device and initial weights."""
    return _model(run) == _model(other)


def _model(run: Run) -> dict[str, Any]:
    free = ("MODEL.WEIGHTS", "MODEL.DEVICE")
    return {k: v for k, v in run.options.items() if k.startswith("MODEL.") and k not in free}


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths, as many as it takes to tell them apart."""
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _read_run(folder: Path, label: str) -> Run:
    path = folder / "options.yaml"  # of a Python config, whose config.yaml has objects
    if not path.is_file():
        path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"RUN '{folder}' has no config.yaml: expected the OUTPUT_DIR of a training."
        )
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is no YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' is no config: expected keys and values.")
    options = dict(_flat(config))
    metrics = _series(folder / "metrics.json")
    names = options.get("DATASETS.TEST") or ["test"]
    results, results_at = _results(_json(folder / "results.json"), names), None
    if not results and (evaluated := evaluations(metrics)):
        results = _results(_last_evaluation(evaluated), names)
        results_at = max(steps[-1] for steps, _ in evaluated.values()) + 1
    return Run(
        folder=folder,
        label=label,
        options=options,
        metrics=metrics,
        balance=_series(folder / "balance.json"),
        results=results,
        results_at=results_at,
        teacher_results=_results(_json(folder / "teacher" / "results.json"), names),
        summary=_json(folder / "summary.json"),
        zoo_row=_json(folder / "zoo_row.json"),
    )


def _series(path: Path) -> Series:
    return read_series(path) if path.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"'{path}' is no JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def evaluations(metrics: Series) -> Series:
    """Return of a run's scalars those of evaluations, "bbox/AP" or "data set/bbox/AP"."""
    # Detectron2 logs scalars of training such as "fast_rcnn/cls_accuracy", too.
    return {n: x for n, x in metrics.items() if "/" in n and n.split("/")[-2] in TASKS}


def _last_evaluation(evaluated: Series) -> dict[str, Any]:
    """Return the nested results that the names of the scalars spell."""
    nested: dict[str, Any] = {}
    for name, (_, values) in evaluated.items():
        *path, metric = name.split("/")
        node = nested
        for part in path:
            node = node.setdefault(part, {})
        node[metric] = values[-1] if math.isfinite(values[-1]) else None
    return nested


def _results(content: dict[str, Any], names: Sequence[str]) -> Results:
    """Return results in either form of ``write_results`` by data set."""
    if not content:
        return {}
    is_nested = all(isinstance(v, dict) for task in content.values() for v in task.values())
    return content if is_nested else {str(names[0]): content}
