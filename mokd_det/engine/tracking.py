# Copyright (c) The mokd_det authors.
"""Where a run's scalars go: files, and services that keep track of experiments."""

import abc
import csv
import functools
import importlib
import importlib.util
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter
from detectron2.utils.events import get_event_storage

from ..files import naming, replace_file

logger = logging.getLogger(__name__)

EVENTS = "events.out.tfevents.*"
Scalars = dict[int, dict[str, float]]
"""By iteration and name."""


class MetricsWriter(JSONWriter):
    """Detectron2's, whose errors name the file."""

    def __init__(self, json_file: str):
        super().__init__(json_file)
        self.path = json_file

    def write(self) -> None:
        with naming(self.path):
            super().write()

    def close(self) -> None:
        with naming(self.path):
            super().close()


class TensorBoardWriter(TensorboardXWriter):
    """
    Detectron2's, whose errors name the files. The thread that writes them hands its error on, to
    the next call here, and would print a traceback besides.
    """

    def __init__(self, folder: str):
        super().__init__(folder)
        self.path = os.path.join(folder, EVENTS)
        self._usual = threading.excepthook
        threading.excepthook = self._say_thread_error

    def _say_thread_error(self, args: threading.ExceptHookArgs) -> None:
        is_handed_on = type(args.thread).__module__.startswith("tensorboard.")
        if not (is_handed_on and isinstance(args.exc_value, OSError)):
            self._usual(args)

    def write(self) -> None:
        with naming(self.path):
            super().write()

    def close(self) -> None:
        try:
            with naming(self.path):
                super().close()
        finally:
            threading.excepthook = self._usual


class TrackingWriter(EventWriter, abc.ABC):
    """
    Hands on what is new, as Detectron2's JSONWriter: of noisy scalars the median of 20 steps.
    Nothing is opened before :meth:`start`, so that a run that is refused leaves nothing.
    """

    def __init__(self) -> None:
        self._last = -1

    def write(self) -> None:
        new: Scalars = {}
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(20).items():
            if iteration > self._last:
                new.setdefault(iteration, {})[name] = float(value)
        if new:
            self._last = max(new)
            self.put(new)

    def start(self, iteration: int) -> None:
        """Begin, or go on with the run before this iteration."""

    @abc.abstractmethod
    def put(self, scalars: Scalars) -> None:
        """Take new scalars."""


class CSVWriter(TrackingWriter):
    """A line for each iteration that was logged, a column for each scalar."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self._columns = ["iteration"]
        self._iterations: set[int] = set()

    def start(self, iteration: int) -> None:
        """Keep the lines from before this iteration: what came later is made again."""
        if iteration and os.path.isfile(self.path):
            self._replace([row for row in self._rows() if int(row["iteration"]) < iteration])

    def put(self, scalars: Scalars) -> None:
        rows = [{"iteration": i, **values} for i, values in sorted(scalars.items())]
        unknown = {name for row in rows for name in row} - {*self._columns}
        if unknown or self._iterations & scalars.keys():
            before = self._rows() if self._iterations else []
            merged: dict[int, dict[str, Any]] = {}
            for row in [*before, *rows]:
                merged.setdefault(int(row["iteration"]), {}).update(row)
            self._replace([merged[i] for i in sorted(merged)])
            return
        self._iterations |= scalars.keys()
        with naming(self.path), open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerows(rows)

    def _rows(self) -> list[dict[str, Any]]:
        with open(self.path, newline="") as file:
            # Without one that was cut off because the run was killed there.
            return list(csv.DictReader(line for line in file if line.endswith("\n")))

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        names = {name for row in rows for name in row} - {"iteration"}
        self._columns = ["iteration", *sorted(names)]
        self._iterations = {int(row["iteration"]) for row in rows}

        def write(file):
            with open(file.fileno(), "w", newline="", closefd=False) as text:
                writer = csv.DictWriter(text, self._columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)

        replace_file(self.path, write)


class ServiceWriter(TrackingWriter):
    """
    A run of a service. Its id is kept in the folder, so that a resumed run is the same one there.
    """

    name = ""

    def __init__(self, cfg: CfgNode):
        super().__init__()
        self.folder, self.config = cfg.OUTPUT_DIR, cfg.dump()
        self.id_file = Path(cfg.OUTPUT_DIR, f"{self.name}.id")
        self.service = importlib.import_module(self.name)
        self._begun = False

    def start(self, iteration: int) -> None:
        known = self.id_file.read_text() if iteration and self.id_file.is_file() else None
        try:
            identifier = self.begin(os.path.basename(os.path.abspath(self.folder)), known)
        except Exception as error:  # of many kinds: no account, no network, no such run
            raise ValueError(
                f"LOGGING.WRITERS has '{self.name}', which cannot begin a run ({error}): solve "
                "that, or take it out."
            ) from error
        self.id_file.write_text(identifier)
        self._begun = True

    def put(self, scalars: Scalars) -> None:
        for iteration, values in sorted(scalars.items()):
            try:
                self.send(values, iteration)
            except Exception as error:  # of many kinds; metrics.json has all that is lost there
                logger.warning(
                    f"The writer '{self.name}' could not take the scalars of iteration "
                    f"{iteration}, which it lacks from now on: {error}"
                )

    def close(self) -> None:
        if self._begun:
            self.end()

    @abc.abstractmethod
    def begin(self, label: str, known: str | None) -> str:
        """Begin a run of this label, or go on with that of a known id; return its id."""

    @abc.abstractmethod
    def send(self, values: dict[str, float], iteration: int) -> None:
        """Take the scalars of an iteration."""

    @abc.abstractmethod
    def end(self) -> None:
        """End the run."""


class WandbWriter(ServiceWriter):
    """Weights & Biases."""

    name = "wandb"

    def begin(self, label: str, known: str | None) -> str:
        config = yaml.safe_load(self.config)
        self.run = self.service.init(
            dir=self.folder, name=label, config=config, id=known, resume="allow"
        )
        return self.run.id

    def send(self, values: dict[str, float], iteration: int) -> None:
        self.run.log(values, step=iteration)

    def end(self) -> None:
        self.run.finish()


class MLflowWriter(ServiceWriter):
    """MLflow."""

    name = "mlflow"

    def begin(self, label: str, known: str | None) -> str:
        run = self.service.start_run(run_id=known, run_name=None if known else label)
        if known is None:
            self.service.log_text(self.config, "config.yaml")
        return run.info.run_id

    def send(self, values: dict[str, float], iteration: int) -> None:
        # It takes letters, digits and _-./: in names; those of classes may have others.
        named = {re.sub(r"[^\w\-. /:]", "_", name): value for name, value in values.items()}
        self.service.log_metrics(named, step=iteration)

    def end(self) -> None:
        self.service.end_run()


SERVICES = {cls.name: cls for cls in (WandbWriter, MLflowWriter)}
CSV = "metrics.csv"
FILES = (CSV, *(f"{name}.id" for name in SERVICES))
"""Of these writers, in OUTPUT_DIR."""


def _in_folder(write: Callable[[str], EventWriter], name: str, cfg: CfgNode) -> EventWriter:
    return write(os.path.join(cfg.OUTPUT_DIR, name))


# By their names in LOGGING.WRITERS.
WRITERS: dict[str, Callable[[CfgNode], EventWriter]] = {
    "json": functools.partial(_in_folder, MetricsWriter, "metrics.json"),
    "tensorboard": functools.partial(_in_folder, TensorBoardWriter, ""),
    "csv": functools.partial(_in_folder, CSVWriter, CSV),
    **SERVICES,
}


def build_writers(cfg: CfgNode) -> list[EventWriter]:
    """Return the writers of ``LOGGING.WRITERS``, each once; to be called by the main process."""
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    return [WRITERS[name](cfg) for name in dict.fromkeys(cfg.LOGGING.WRITERS)]


def start_writers(writers: Iterable[EventWriter], iteration: int) -> None:
    """Begin, or go on with the run before this iteration."""
    for writer in writers:
        if isinstance(writer, TrackingWriter):
            writer.start(iteration)


def check_installed(names: Iterable[str]) -> None:
    """Raise ImportError for writers whose packages are not there."""
    for name in names:
        if name in SERVICES and importlib.util.find_spec(name) is None:
            raise ImportError(
                f"LOGGING.WRITERS has '{name}', but the package {name} is not installed: pip "
                f"install {name}, or take it out."
            )
