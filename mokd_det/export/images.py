# Copyright (c) The mokd_det authors.
"""Images on which an exported model is compared with its source."""

import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from PIL import Image
from torch import Tensor

from ..data import read_rgb

SCALES = (1.0, 0.75, 0.5)  # of the test size: those of the comparison


def read_images(
    cfg: CfgNode, files: Sequence[str] = (), count: int = 3
) -> tuple[list[np.ndarray], str]:
    """
    Return images, (H, W, 3) uint8 RGB, and where they come from: files (FileNotFoundError: one is
    missing), else the first ``count`` of ``DATASETS.TEST``, if registered. Without both they are
    drawn at random, and the second says that.
    """
    for file in files:
        if not os.path.isfile(file):
            raise FileNotFoundError(f"--images '{file}' does not exist.")
    if files:
        return [np.asarray(read_rgb(str(file))) for file in files], ", ".join(map(str, files))
    for name in cfg.DATASETS.TEST:
        if name not in DatasetCatalog.list():
            continue
        try:
            elements = list(itertools.islice(DatasetCatalog.get(name), count))
            images = [_image_of(element) for element in elements]
        except FileNotFoundError:  # a set that is registered, but not on this machine
            continue
        if images:
            return images, f"the first {len(images)} of DATASETS.TEST '{name}'"
    return [_random_image(seed) for seed in range(count)], (
        f"{count} RANDOM images, as neither --images nor a set of DATASETS.TEST "
        f"{tuple(cfg.DATASETS.TEST)} is here: give real ones by --images"
    )


def _image_of(element: dict[str, Any]) -> np.ndarray:
    if "file_name" in element:
        return np.asarray(read_rgb(element["file_name"]))
    image = np.asarray(element["image"])  # packed, grey or RGB
    return np.stack([image] * 3, axis=2) if image.ndim == 2 else image


def _random_image(seed: int, height: int = 480, width: int = 640) -> np.ndarray:
    """Coloured blotches: low frequencies, as photos have, so that features differ over places."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def sized(image: Tensor, scale: float) -> Tensor:
    """
    Return a (3, H, W) uint8 image at a scale. For any but 1 a side is cut besides, so that the
    two are no multiples of each other or of a stride.
    """
    if scale == 1:
        return image
    height, width = (max(round(side * scale), 32) for side in image.shape[1:])
    array = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    small = np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR))
    small = small[: height - height // 5 + 1]
    return torch.from_numpy(np.ascontiguousarray(small.transpose(2, 0, 1)))
