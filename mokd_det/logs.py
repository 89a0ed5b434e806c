# Copyright (c) The mokd_det authors.
"""The logs of a run, read as it wrote them. It imports nothing but Python's own."""

import contextlib
import json
import os
from typing import Any

Series = dict[str, tuple[list[int], list[float]]]
"""From a scalar's name to its iterations, in order, and values."""


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Return the lines of a run's ``metrics.json`` or ``balance.json``, without one that was cut off
    because the run was killed there (and resumed).
    """
    records = []
    with open(path) as f:
        for line in f:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def read_series(path: str | os.PathLike) -> Series:
    """
    Return the scalars of such a file. Of an iteration that is there twice, because the run was
    resumed, the later one counts.
    """
    found: dict[str, dict[int, float]] = {}
    for record in read_json_lines(path):
        iteration = record.pop("iteration")
        for name, value in record.items():
            found.setdefault(name, {})[iteration] = value
    return {
        name: (sorted(values), [values[i] for i in sorted(values)])
        for name, values in found.items()
    }
