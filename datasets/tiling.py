# Copyright (c) The mokd_det authors.
"""Cutting large annotated photos into tiles."""

from collections.abc import Iterator, Sequence
from typing import Any
from voc import clip_box


def tile_windows(
    width: int, height: int, size: int, stride: int
) -> Iterator[tuple[int, int, int, int]]:
    """
    Args:
        width, height: of the photo in pixels.
        size, stride: of the tiles in pixels. ``stride == size`` gives tiles that share no
            pixel and cover the photo, those at the right and bottom borders being smaller.
            With a smaller stride (overlap), border tiles are moved inside to keep their size.

    Yields:
        x0, y0, x1, y1 of each tile.

    Raises:
        ValueError: unless ``0 < stride <= size``.
    """
    if not 0 < stride <= size:
        raise ValueError(f"Tiles need 0 < stride <= size, but size={size} and stride={stride}.")
    for y0, y1 in _spans(height, size, stride):
        for x0, x1 in _spans(width, size, stride):
            yield x0, y0, x1, y1


def _spans(length: int, size: int, stride: int) -> list[tuple[int, int]]:
    starts = [*range(0, length, stride)]
    if stride != size:
        last = max(length - size, 0)
        starts = [*range(0, last, stride), last]
    return [(start, min(start + size, length)) for start in starts]


def objects_in_window(
    objects: Sequence[dict[str, Any]], window: tuple[int, int, int, int], min_visible: float
) -> list[dict[str, Any]]:
    """
    Args:
        objects: with ``box`` (x0, y0, x1, y1) in the photo's pixels.
        window: x0, y0, x1, y1 of a tile.
        min_visible: keep an object if at least this share of its area is in the tile.

    Returns:
        The objects kept, boxes clipped and in the tile's pixels.
    """
    wx0, wy0, wx1, wy1 = window
    kept = []
    for item in objects:
        x0, y0, x1, y1 = item["box"]
        box = clip_box((x0 - wx0, y0 - wy0, x1 - wx0, y1 - wy0), wx1 - wx0, wy1 - wy0)
        if box is None:
            continue
        visible = (box[2] - box[0]) * (box[3] - box[1]) / ((x1 - x0) * (y1 - y0))
        if visible >= min_visible:
            kept.append({**item, "box": box})
    return kept
