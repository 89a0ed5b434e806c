# Copyright (c) The mokd_det authors.
"""Ids in COCO's format: whole numbers of 32 bit, or what can be made so exactly."""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from .report import Report

# COCO's evaluators take larger ones for others, some as numbers in floating point.
LARGEST = 2**31 - 1


def canonical(value: Any) -> Hashable:
    """Return an id as an int if it is one: 3, 3.0, "3"; else itself (what has no hash: as text)."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, Hashable) else repr(value)


def column(rows: list[dict[str, Any]], key: str, kinds: str, shape: tuple[int, ...] = ()) -> Any:
    """Return the values of all rows, (N, *shape), if all are of these kinds of NumPy; else None."""
    try:
        values = np.array([row[key] for row in rows])
    except (KeyError, ValueError):  # missing in some, or of several lengths
        return None
    return values if values.dtype.kind in kinds and values.shape[1:] == shape else None


def check_ids(
    rows: list[dict[str, Any]], what: str, report: Report, name_of: Callable[[dict], Any]
) -> tuple[list[dict[str, Any]], dict[Hashable, int] | None]:
    """
    Return rows with usable ids, the same list if they were, and from canonical ids in the file to
    those. Errors, and then None: ids that are missing or not unique.
    """
    values = column(rows, "id", "iu")
    if values is not None and values.min() >= 0 and values.max() <= LARGEST:
        if len(np.unique(values)) == len(values):
            return rows, {value: value for value in values.tolist()}
    if missing := [name_of(row) for row in rows if row.get("id") is None]:
        report.error(f"{what} without an id", missing)
        return rows, None
    ids = [canonical(row["id"]) for row in rows]
    if twice := [id for id, count in Counter(ids).items() if count > 1]:
        report.error(f"ids of several {what}", twice)
        return rows, None
    whole = [id for id in ids if isinstance(id, int) and 0 <= id <= LARGEST]
    usable = len(whole) == len(ids)
    new = dict(zip(ids, whole if usable else range(1, len(ids) + 1)))
    changed = [f"{row['id']!r} is {new[id]}" for row, id in zip(rows, ids)]
    kind = "no whole numbers" if usable else "not all whole numbers from 0 to 2^31 - 1"
    report.warn(f"ids of {what} are {kind}: they are replaced, in predictions, too", changed)
    return [{**row, "id": new[id]} for row, id in zip(rows, ids)], new
