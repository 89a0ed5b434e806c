# Copyright (c) The mokd_det authors.
"""Every step's balance as JSON lines; Detectron2's own writers keep one smoothed value in 20."""

import json

from detectron2.utils.events import EventWriter, get_event_storage
from detectron2.utils.file_io import PathManager


class BalanceWriter(EventWriter):
    """Appends one JSON object a step: ``iteration``, and every scalar ``balance/...`` as it was."""

    def __init__(self, json_file: str):
        self._file = PathManager.open(json_file, "a")
        self._last = -1

    def write(self) -> None:
        steps: dict[int, dict[str, float]] = {}
        for name, history in get_event_storage().histories().items():
            if not name.startswith("balance/"):
                continue
            for value, iteration in reversed(history.values()):
                if iteration <= self._last:
                    break
                steps.setdefault(iteration, {})[name] = value
        for iteration in sorted(steps):
            line = json.dumps({"iteration": int(iteration), **steps[iteration]}, sort_keys=True)
            self._file.write(line + "\n")
        self._file.flush()
        self._last = max(steps, default=self._last)

    def close(self) -> None:
        self._file.close()
