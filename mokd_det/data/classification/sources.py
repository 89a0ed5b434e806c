# Copyright (c) The mokd_det authors.
"""
Where images with labels come from: folders of classes (ImageNet's layout), or one packed file.

A source is a sequence of dicts with ``label`` (int), ``name`` (str, for messages and predictions)
and either ``file_name`` or ``image``, an (H, W) or (H, W, 3) uint8 array; and it has ``classes``.
"""

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetFromList
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

logger = logging.getLogger(__name__)


class ClassFolders:
    """
    A folder with a folder of images for each class, as torchvision's ``ImageFolder`` reads it:
    labels count the classes in the order of their names. A class without images counts as well,
    with a warning; FileNotFoundError: no folder, or no image in them.
    """

    def __init__(self, path: str):
        self.path = path
        self.classes = class_names(path)
        labels = {name: label for label, name in enumerate(self.classes)}
        samples = make_dataset(path, labels, extensions=IMG_EXTENSIONS, allow_empty=True)
        if not samples:
            raise FileNotFoundError(
                f"'{os.path.abspath(path)}' has {len(labels)} folders of classes, but no image "
                f"({', '.join(IMG_EXTENSIONS)}) in them."
            )
        if empty := sorted(set(range(len(labels))) - {label for _, label in samples}):
            names = ", ".join(self.classes[label] for label in empty[:5])
            logger.warning(f"{path}: {len(empty)} classes have no image: {names} ...")
        # One serialised block: a million Python objects would be copied into every worker.
        self._samples = DatasetFromList(samples, copy=False)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file_name, label = self._samples[index]
        name = os.path.relpath(file_name, self.path)
        return {"file_name": file_name, "label": label, "name": name}


class PackedImages:
    """
    An .npz file of :func:`write_packed`, held in memory: for small sets of small images;
    ValueError: the file holds something else.
    """

    def __init__(self, path: str):
        self.path = path
        with _open_packed(path) as arrays:
            self.images, self.labels = arrays["images"], arrays["labels"]
            self.classes = arrays["classes"].tolist()
        if (
            self.images.dtype != np.uint8
            or self.images.ndim not in (3, 4)
            or self.images.shape[3:] not in ((), (3,))
            or self.labels.shape != self.images.shape[:1]
            or not np.issubdtype(self.labels.dtype, np.integer)
        ):
            raise ValueError(
                f"{path}: expected images (N, H, W) or (N, H, W, 3) uint8 and labels (N,) integer, "
                f"but it has {self.images.shape} {self.images.dtype} and {self.labels.shape} "
                f"{self.labels.dtype}."
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(
                f"{path}: labels from {self.labels.min()} to {self.labels.max()} do not fit its "
                f"{len(self.classes)} classes."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = f"{os.path.basename(self.path)}#{index}"
        return {"image": self.images[index], "label": int(self.labels[index]), "name": name}


def _open_packed(path):
    try:
        arrays = np.load(path, allow_pickle=False)
        missing = {"images", "labels", "classes"} - set(getattr(arrays, "files", ()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not an .npz file: {error}") from error
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}: write it with write_packed().")
    return arrays


def write_packed(path: str, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
    """
    Write a packed data set as .npz: images (N, H, W) grey or (N, H, W, 3) RGB, uint8; labels (N,)
    integers, indices of ``classes``.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    # Within one folder, so the file is either absent or whole.
    part = f"{path}.part.npz"
    np.savez_compressed(part, images=images, labels=labels, classes=np.array(classes, dtype=str))
    os.replace(part, path)


def class_names(path: str) -> list[str]:
    """
    Return the classes at a path of :func:`open_source` in the order of their labels, without
    reading images; FileNotFoundError: a folder without folders, ValueError: no packed file.
    """
    if path.endswith(".npz"):
        with _open_packed(path) as arrays:
            return arrays["classes"].tolist()
    try:
        return find_classes(path)[0]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"'{os.path.abspath(path)}' has no folders: expected one for each class, with its "
            "images inside. (ImageNet's validation images come in one flat folder; "
            "datasets/README.md says how to sort them.)"
        ) from error


@functools.lru_cache(maxsize=8)  # looking through a million files takes seconds
def open_source(path: str) -> ClassFolders | PackedImages:
    """Return the source at a path: a folder of class folders, or a packed ``.npz``."""
    return PackedImages(path) if path.endswith(".npz") else ClassFolders(path)
