# Copyright (c) The mokd_det authors.
"""Segmentations in COCO's format: what each is, and its area."""

import math
from typing import Any

from pycocotools import mask as coco_mask


def is_number(value: Any) -> bool:
    """Whether it is one for NumPy, too: JSON's may have any length."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 2**63


def kind_of(segmentation: Any, look_at_numbers: bool) -> str:
    """Of "none", "polygons", "flat", "rle", "odd"."""
    if segmentation is None or segmentation == []:
        return "none"
    if isinstance(segmentation, dict):
        return "rle" if _is_run_length_code(segmentation) else "odd"
    if not isinstance(segmentation, list):
        return "odd"
    flat = all(map(is_number, segmentation))
    for polygon in [segmentation] if flat else segmentation:
        if type(polygon) is not list or len(polygon) < 6 or len(polygon) % 2:
            return "odd"
        if look_at_numbers:
            try:
                if not math.isfinite(sum(polygon)):
                    return "odd"
            except (TypeError, OverflowError):
                return "odd"
    return "flat" if flat else "polygons"


def _is_run_length_code(code: dict[str, Any]) -> bool:
    size, counts = code.get("size"), code.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(s) is int for s in size)):
        return False
    if isinstance(counts, str):
        counts = _decoded(counts)
    if not isinstance(counts, list) or min(size) <= 0:
        return False
    whole = all(type(count) is int and count >= 0 for count in counts)
    # Of a code without any pixel Detectron2 makes a label all the same.
    return whole and sum(counts) == size[0] * size[1] and any(counts[1::2])


def _decoded(code: str) -> list[int]:
    """
    Return the counts of a compressed code, [-1] if it is none. pycocotools, whose ``rleFrString``
    says how they are written, takes any text for one, and decodes a short one to what happens to be
    in memory.
    """
    counts: list[int] = []
    value = shift = 0
    for char in code:
        bits = ord(char) - 48
        if not 0 <= bits < 64:
            return [-1]
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # the number goes on
            continue
        if bits & 16:  # it is negative
            value -= 1 << shift
        # From the fourth on they are differences to the one but last.
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return [-1] if shift else counts


def area_of(row: dict[str, Any], image: dict[str, Any]) -> float:
    code: Any = row.get("segmentation")
    area = 0.0
    if kind_of(code, True) in ("polygons", "rle"):
        if isinstance(code, list) or isinstance(code["counts"], list):
            code = coco_mask.frPyObjects(code, image["height"], image["width"])
        area = float(coco_mask.area(coco_mask.merge(code) if isinstance(code, list) else code))
    return area or float(row["bbox"][2] * row["bbox"][3])
