# Copyright (c) The mokd_det authors.
"""Annotations in COCO's format: each is usable, is completed, is left out and counted, or wrong."""

import math
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from .coco_ids import LARGEST, canonical, column
from .coco_segmentations import area_of, is_number, kind_of
from .report import Report

Row = dict[str, Any]


def check_annotations(
    rows: list[Row],
    images: list[Row],
    image_ids: dict[Hashable, int] | None,
    categories: list[Row],
    category_ids: dict[Hashable, int] | None,
    report: Report,
    *,
    training: bool = True,
    masks: str | None = None,
    keypoints: bool = False,
) -> list[Row]:
    """
    Args:
        rows: the annotations of a file.
        images: its images, checked.
        image_ids: from the file's ids to those of ``images``.
        categories: its classes, checked.
        category_ids: from the file's ids to those of ``categories``.
        training: every class must have a box.
        masks: "polygon" or "bitmask" for a model that learns masks.
        keypoints: for a model that learns keypoints.

    Returns:
        the completed annotations: ``rows`` itself if nothing had to be completed.
    """
    where = _Where(images)
    for key, ids, what in (
        ("image_id", image_ids, "image"),
        ("category_id", category_ids, "category"),
    ):
        rows = _check_reference(rows, key, ids, what, where, report)
    if report.errors or not rows:
        return rows
    all_rows = rows
    rows = _check_boxes(rows, where, report)
    if report.errors:
        return rows
    _check_every_class_occurs(all_rows, rows, categories, training, report)
    rows = _check_crowds(rows, where, report)
    rows = _check_segmentations(rows, masks, where, report)
    rows = _check_keypoints(rows, categories, keypoints, where, report)
    if report.errors:
        return rows
    rows = _check_areas(rows, where, report)
    return _check_numbers(rows, where, report)


class _Where:
    """Where an annotation is, for messages, and how large its image is."""

    def __init__(self, images: list[Row]):
        self.images = {image["id"]: image for image in images}

    def __call__(self, row: Row) -> str:
        image = self.images.get(row.get("image_id"), {})
        place = image.get("file_name", f"image_id {row.get('image_id')!r}")
        return f"id {row.get('id')!r} in {place}"

    def sizes(self, rows: list[Row]) -> np.ndarray:
        """Return the widths and heights of the images of these rows, (N, 2)."""
        values = [(id, image["width"], image["height"]) for id, image in self.images.items()]
        ids, *sizes = np.array(sorted(values)).T
        at = np.searchsorted(ids, [row["image_id"] for row in rows])
        return np.stack([size[at] for size in sizes], axis=1)


def _check_reference(rows, key, ids, what, where, report):
    """Annotations of an image that the file has not are left out, as by Detectron2, but told."""
    if ids is None:
        return rows
    if all(old == new for old, new in ids.items()):
        values = column(rows, key, "iu")
        if values is not None and np.isin(values, list(ids.values())).all():
            return rows
    if missing := [where(row) for row in rows if row.get(key) is None]:
        report.error(f"annotations without {key}", missing)
        return rows
    found = [ids.get(canonical(row[key])) for row in rows]
    unknown = [where(row) for row, id in zip(rows, found) if id is None]
    if unknown and (key == "category_id" or len(unknown) == len(rows)):
        report.error(f"annotations of {key}s that no {what} has", unknown)
    elif unknown:
        report.warn(f"annotations of {key}s that no {what} has, which are left out", unknown)
    return [{**row, key: id} for row, id in zip(rows, found) if id is not None]


def _check_boxes(rows, where, report):
    boxes = column(rows, "bbox", "iuf", (4,))
    if boxes is None:
        odd = [f"{where(row)}: {row.get('bbox')!r}" for row in rows if not _is_box(row.get("bbox"))]
        report.error("annotations whose bbox is not four numbers, [x, y, width, height]", odd)
        return rows
    boxes = boxes.astype(float)

    def named(which):
        return [f"{where(rows[i])}: {rows[i]['bbox']}" for i in np.flatnonzero(which)]

    if not np.isfinite(boxes).all():
        report.error("annotations whose bbox is not finite", named(~np.isfinite(boxes).all(1)))
        return rows
    size = where.sizes(rows)
    corner, side = boxes[:, :2], boxes[:, 2:]
    end = corner + side
    flat = (side <= 0).any(1)
    away = ~flat & ((corner >= size).any(1) | (end <= 0).any(1))
    # A box in the first pixel of an image is what is left of one in units of the image.
    relative = ~flat & (end <= 1).all(1) & (corner >= 0).all(1) & (size > 2).all(1)
    beyond = ~flat & ~away & ((end > size + 1).any(1) | (corner < -1).any(1))
    if relative.sum() > 0.5 * (~flat).sum():
        report.error(
            "boxes look normalised to [0, 1], and COCO's format has pixels: multiply them by the "
            "width and height of their image",
            named(relative),
        )
    elif beyond.sum() > 0.5 * (~flat).sum() and (side[~flat] > corner[~flat]).all():
        report.error(
            "boxes look like [x1, y1, x2, y2], and COCO's format has [x, y, width, height]",
            named(beyond),
        )
    for kind, which in (
        ("without width or height", flat),
        ("outside their image", away),
        ("in the first pixel of their image", relative),
    ):
        if which.any():
            report.warn(f"boxes {kind}, which are left out", named(which))
    if beyond.any():
        report.warn("boxes that reach beyond their image, and are cut in training", named(beyond))
    left = ~(flat | away | relative)
    if not left.any() and not report.errors:
        report.error("it has no box that can be used")
    return rows if left.all() else [row for row, keep in zip(rows, left) if keep]


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(is_number, box))


def _check_every_class_occurs(before, rows, categories, training, report):
    given, left = (Counter(row["category_id"] for row in some) for some in (before, rows))
    names = {category["id"]: category["name"] for category in categories}
    if lost := [name for id, name in names.items() if given[id] and not left[id]]:
        report.error("classes of which no box can be used", lost)
    elif training and (absent := [name for id, name in names.items() if not left[id]]):
        report.warn("classes without a box", absent)


def _check_crowds(rows, where, report):
    values = column(rows, "iscrowd", "iu")
    if values is None or not np.isin(values, (0, 1)).all():
        completed = [{**row, "iscrowd": _crowd(row.get("iscrowd"))} for row in rows]
        odd = [row for row, done in zip(rows, completed) if done["iscrowd"] is None]
        if odd:
            cases = [f"{where(row)}: {row['iscrowd']!r}" for row in odd]
            report.error("annotations whose iscrowd is not 0 or 1", cases)
            return rows
        if absent := [where(row) for row in rows if row.get("iscrowd") is None]:
            report.warn("annotations without iscrowd, which is 0 then", absent)
        rows = completed
    if ignored := [where(row) for row in rows if row.get("ignore")]:
        report.error(
            "annotations with 'ignore', which Detectron2 does not know: remove them, or set "
            "iscrowd to 1 instead",
            ignored,
        )
    return rows


def _crowd(value: Any) -> int | None:
    value = 0 if value is None else int(value) if isinstance(value, bool) else canonical(value)
    return value if value in (0, 1) else None


def _check_segmentations(rows, masks, where, report):
    """Without ``masks`` what cannot be read is removed: Detectron2 would drop its box."""
    kinds = [kind_of(row.get("segmentation"), masks is not None) for row in rows]
    size = {id: [image["height"], image["width"]] for id, image in where.images.items()}

    def named(which: Callable[[str, Row], bool]) -> list[str]:
        return [where(row) for kind, row in zip(kinds, rows) if which(kind, row)]

    if masks is None:
        if all(kind in ("none", "polygons", "rle") for kind in kinds):
            return rows
        return [
            row if kind in ("none", "polygons", "rle") else {**row, "segmentation": []}
            for kind, row in zip(kinds, rows)
        ]
    if odd := named(lambda kind, row: kind in ("none", "odd")):
        report.error(
            "annotations without a segmentation that can be read, which MODEL.MASK_ON True needs: "
            "polygons [[x1, y1, x2, y2, x3, y3, ...], ...] or a run-length code with a pixel",
            odd,
        )
    other = named(
        lambda k, row: k == "rle" and row["segmentation"]["size"] != size[row["image_id"]]
    )
    if other:
        report.error("run-length codes of another size than their image", other)
    coded = named(lambda kind, row: kind == "rle" and not row.get("iscrowd"))
    if coded and masks == "polygon":
        report.error(
            "run-length codes, while INPUT.MASK_FORMAT is 'polygon': set it to 'bitmask'", coded
        )
    if flat := named(lambda kind, row: kind == "flat"):
        report.warn("segmentations that are one polygon without a list around it", flat)
        rows = [
            {**row, "segmentation": [row["segmentation"]]} if kind == "flat" else row
            for kind, row in zip(kinds, rows)
        ]
    return rows


def _check_keypoints(rows, categories, wanted, where, report):
    if not wanted:
        odd = [not _are_keypoints(row.get("keypoints"), None) for row in rows]
        if not any(odd):
            return rows
        return [
            {k: v for k, v in row.items() if k != "keypoints"} if is_odd else row
            for row, is_odd in zip(rows, odd)
        ]
    names = categories[0].get("keypoints") or []
    if not are_names(names):
        report.error(f"categories whose keypoints are no list of names: {names!r}")
        return rows
    length = 3 * len(names)
    if odd := [where(row) for row in rows if not _are_keypoints(row.get("keypoints"), length)]:
        report.error(
            f"annotations whose keypoints are not {length} numbers, (x, y, visibility) for each of "
            f"the {length // 3} names in 'categories'",
            odd,
        )
        return rows
    completed = []
    for row in rows:
        keypoints = row.get("keypoints") or [0] * length
        seen = sum(v > 0 for v in keypoints[2::3])
        same = row.get("keypoints") and row.get("num_keypoints") == seen
        completed.append(row if same else {**row, "keypoints": keypoints, "num_keypoints": seen})
    if none := [where(row) for row in rows if not row.get("keypoints")]:
        report.warn("annotations without keypoints, of which none is visible then", none)
    other = [
        where(r) for r, c in zip(rows, completed) if r.get("num_keypoints") != c["num_keypoints"]
    ]
    if other:
        report.warn("annotations without the right num_keypoints, which are counted", other)
    return completed if none or other else rows


def are_names(keypoints: Any) -> bool:
    """Whether this is what a category may have as ``keypoints``."""
    return isinstance(keypoints, list) and all(isinstance(name, str) for name in keypoints)


def _are_keypoints(keypoints: Any, length: int | None) -> bool:
    """Absent ones are none that is visible."""
    if not keypoints:
        return keypoints is None or keypoints == []
    return (
        isinstance(keypoints, list)
        and len(keypoints) == (len(keypoints) // 3 * 3 if length is None else length)
        and all(is_number(value) and math.isfinite(value) for value in keypoints)
    )


def _check_areas(rows, where, report):
    values = column(rows, "area", "iuf")
    if values is not None and np.isfinite(values).all() and (values > 0).all():
        return rows
    odd = [not (is_number(a := row.get("area")) and 0 < a < math.inf) for row in rows]
    cases = [where(row) for row, is_odd in zip(rows, odd) if is_odd]
    report.warn("annotations without an area, which is computed of mask or box", cases)
    return [
        {**row, "area": area_of(row, where.images[row["image_id"]])} if is_odd else row
        for row, is_odd in zip(rows, odd)
    ]


def _check_numbers(rows, where, report):
    """Nothing refers to the ids of annotations, but evaluators take 0 for none."""
    values = column(rows, "id", "iu")
    if values is not None and values.min() > 0 and values.max() <= LARGEST:
        if len(np.unique(values)) == len(values):
            return rows
    counts = Counter(canonical(row.get("id")) for row in rows)
    odd = [where(row) for row in rows if not _is_number_of_its_own(row.get("id"), counts)]
    report.warn("annotations without a positive number of their own as id, numbered anew", odd)
    return [{**row, "id": number} for number, row in enumerate(rows, 1)]


def _is_number_of_its_own(id: Any, counts: Counter) -> bool:
    return type(id) is int and 0 < id <= LARGEST and counts[id] == 1
