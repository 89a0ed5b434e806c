# Copyright (c) The mokd_det authors.
"""The balance as JSON lines and on the console, and how much of the logs is kept in memory."""

import functools
import json
import logging
from collections.abc import Mapping
from typing import Any

from detectron2.utils.events import CommonMetricPrinter, EventStorage, EventWriter
from detectron2.utils.events import get_event_storage
from detectron2.utils.file_io import PathManager
from fvcore.common.history_buffer import HistoryBuffer

from ..files import naming
from .diagnostics import COUNTS

HISTORY = 1000  # the most that Detectron2's own writers look back (for the time that is left)


def bound_history(storage: EventStorage) -> None:
    """
    Let a new storage keep the latest ``HISTORY`` values of each scalar. Detectron2 keeps a million,
    and reads no more of them than these; means over the whole training stay.
    """
    new = functools.partial(HistoryBuffer, max_length=HISTORY)
    storage.histories().default_factory = new


class BalanceWriter(EventWriter):
    """
    Appends a JSON object at each call (every 20 steps): ``iteration``, the latest, and the mean of
    every scalar ``balance/...`` over the steps since the call before; of counts the latest value.
    """

    def __init__(self, json_file: str):
        self.path = json_file
        self._file = PathManager.open(json_file, "a")
        self._last = -1

    def write(self) -> None:
        line: dict[str, float] = {}
        latest = self._last
        for name, history in get_event_storage().histories().items():
            if not name.startswith("balance/"):
                continue
            new = [pair for pair in history.values() if pair[1] > self._last]
            if not new:
                continue
            latest = max(latest, new[-1][1])
            is_count = name.split("/")[-1] in COUNTS
            line[name] = new[-1][0] if is_count else sum(v for v, _ in new) / len(new)
        if line:
            text = json.dumps({"iteration": int(latest), **line}, sort_keys=True)
            with naming(self.path):
                self._file.write(f"{text}\n")
                self._file.flush()
        self._last = latest

    def close(self) -> None:
        with naming(self.path):
            self._file.close()


class ProgressPrinter(CommonMetricPrinter):
    """Detectron2's line of a moment, with :func:`balance_of_the_moment` at its end."""

    logger: Any

    def __init__(self, max_iter: int, window_size: int = 20):
        super().__init__(max_iter, window_size)
        self.logger = _WithBalance(self.logger, {})
        self._printed = -1

    def write(self) -> None:
        """Print the line once: a run that ends by an error asks twice, and 0.6 divides by zero."""
        iteration = get_event_storage().iter
        if iteration != self._printed:
            self._printed = iteration
            super().write()


class _WithBalance(logging.LoggerAdapter):
    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        histories = get_event_storage().histories()
        return f"{msg}{balance_of_the_moment(histories)}", kwargs


def balance_of_the_moment(histories: Mapping[str, HistoryBuffer], window_size: int = 20) -> str:
    """
    Return the weight of each objective, and behind it the cosine with the task's gradient that the
    rule goes by, as means of the last steps; "" without a teacher.
    """
    means = {
        name.split("/")[-1]: _recent_mean(history, window_size)
        for name, history in histories.items()
        if name.startswith("balance/")
    }
    parts = []
    for name in (n[len("weight_") :] for n in means if n.startswith("weight_")):
        cosine = means.get(f"seen_cosine_{name}", means.get(f"cosine_{name}"))
        shown = "" if cosine is None else f" (cos {cosine:.2g})"
        parts.append(f"{name} {means[f'weight_{name}']:.3g}{shown}")
    return f"weights: {', '.join(parts)}" if parts else ""


def _recent_mean(history: HistoryBuffer, steps: int) -> float:
    """Return the mean over the last steps; of what is measured in some only, at least the last."""
    values = history.values()[-steps:]
    since = get_event_storage().iter - steps
    recent = [value for value, step in values if step > since] or [values[-1][0]]
    return sum(recent) / len(recent)
