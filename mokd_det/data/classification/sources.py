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

from ...files import replace_file
from ...untrusted import check_class_names
from ..images import check_header, check_images, read_rgb
from ..report import Report
from .folders import IMAGE_EXTENSIONS, LeftOut, class_folders, images_beside, list_images
from .folders import names_alike

logger = logging.getLogger(__name__)

SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev")


class ClassFolders:
    """
    A folder with a folder of images for each class, as torchvision's ``ImageFolder`` reads it, but
    for hidden files and folders: labels count the classes in the order of their names. What looks
    wrong is warned of and in ``report``; a class without images counts as well.
    FileNotFoundError: no folder, or no image in them; ValueError: see :func:`class_names`.
    """

    def __init__(self, path: str):
        self.path = path
        self.classes = class_names(path)
        left_out = LeftOut()
        images = [list_images(os.path.join(path, name), left_out) for name in self.classes]
        samples = [(file_name, label) for label, files in enumerate(images) for file_name in files]
        if not samples:
            raise FileNotFoundError(
                f"'{os.path.abspath(path)}' has {len(self.classes)} folders of classes, but no "
                f"image ({', '.join(IMAGE_EXTENSIONS)}) in them."
            )
        empty = [name for name, files in zip(self.classes, images) if not files]
        self.report = self._report(empty, left_out)
        for warning in self.report.warnings:
            logger.warning(f"{path}: {warning}.")
        # One serialised block: a million Python objects would be copied into every worker.
        self._samples = DatasetFromList(samples, copy=False)

    def _report(self, empty: list[str], left_out: LeftOut) -> Report:
        report = Report()
        for message, cases in (
            ("classes have no image", empty),
            ("classes differ in capitals or spaces only", names_alike(self.classes)),
            ("images lie beside the folders of classes and are left out", images_beside(self.path)),
            ("files are no images, or links to nowhere, and are left out", left_out.special),
            ("links to a folder above them are left out", left_out.loops),
            (f"{left_out.extensions()}: files that are no images are left out", left_out.others),
        ):
            if cases:
                report.warn(message, cases)
        return report

    def file_names(self) -> list[str]:
        """Return the paths of all images."""
        return [file_name for file_name, _ in self._samples]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file_name, label = self._samples[index]
        name = os.path.relpath(file_name, self.path)
        return {"file_name": file_name, "label": label, "name": name}


class PackedImages:
    """
    An .npz file of :func:`write_packed`, held in memory: for small sets of small images;
    ValueError: the file holds something else, or no image.
    """

    def __init__(self, path: str):
        self.path = path
        arrays = _read_packed(path, ("images", "labels", "classes"))
        self.images, self.labels = arrays["images"], arrays["labels"]
        self.classes = _class_list(path, arrays["classes"])
        if (
            self.images.dtype != np.uint8
            or self.images.ndim not in (3, 4)
            or self.images.shape[3:] not in ((), (3,))
            or self.labels.shape != self.images.shape[:1]
            or not np.issubdtype(self.labels.dtype, np.integer)
            or not self.images.size
        ):
            raise ValueError(
                f"{path}: expected images (N, H, W) or (N, H, W, 3) uint8 and labels (N,) integer, "
                f"but it has {self.images.shape} {self.images.dtype} and {self.labels.shape} "
                f"{self.labels.dtype}."
            )
        if not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(
                f"{path}: labels from {self.labels.min()} to {self.labels.max()} do not fit its "
                f"{len(self.classes)} classes."
            )
        self.report = Report()
        if empty := sorted(set(range(len(self.classes))) - set(self.labels.tolist())):
            self.report.warn("classes have no image", [self.classes[label] for label in empty])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = f"{os.path.basename(self.path)}#{index}"
        return {"image": self.images[index], "label": int(self.labels[index]), "name": name}


def _read_packed(path: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return these arrays; pickled ones, which may run code, are never read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = set(names) - set(arrays.files)
            if not missing:
                return {name: arrays[name] for name in names}
    except FileNotFoundError:
        raise
    except Exception as error:  # of numpy, zipfile and zlib
        raise ValueError(
            f"{path} is not an .npz file of plain arrays: {error}. Write it with write_packed()."
        ) from error
    raise ValueError(f"{path} lacks {sorted(missing)}: write it with write_packed().")


def _class_list(path: str, classes: np.ndarray) -> list[str]:
    if classes.ndim != 1 or classes.dtype.kind != "U" or len(set(classes.tolist())) < len(classes):
        raise ValueError(
            f"{path}: expected classes (C,), different strings, but it has {classes.shape} "
            f"{classes.dtype} {classes.ravel()[:5].tolist()}."
        )
    check_class_names(names := classes.tolist(), path)
    return names


def write_packed(path: str, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
    """
    Write a packed data set as .npz: images (N, H, W) grey or (N, H, W, 3) RGB, uint8; labels (N,)
    integers, indices of ``classes``.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    names = np.array(classes, dtype=str)
    replace_file(
        path, lambda f: np.savez_compressed(f, images=images, labels=labels, classes=names)
    )


def class_names(path: str) -> list[str]:
    """
    Return the classes at a path of :func:`open_source` in the order of their labels, without
    reading images; FileNotFoundError: a folder without folders, ValueError: no packed file, or a
    folder of splits.
    """
    if path.endswith(".npz"):
        return _class_list(path, _read_packed(path, ["classes"])["classes"])
    names = class_folders(path)
    if not names:
        raise FileNotFoundError(
            f"'{os.path.abspath(path)}' has no folders: expected one for each class, with its "
            "images inside. (ImageNet's validation images come in one flat folder; "
            "datasets/README.md says how to sort them.)"
        )
    if all(n.lower() in SPLITS and class_folders(os.path.join(path, n)) for n in names):
        raise ValueError(
            f"'{os.path.abspath(path)}' has the folders {', '.join(names)}, which are splits, no "
            f"classes: name one of them, as '{os.path.join(path, names[0])}'."
        )
    check_class_names(names, path)
    return names


@functools.lru_cache(maxsize=8)  # looking through a million files takes seconds
def open_source(path: str) -> ClassFolders | PackedImages:
    """Return the source at a path: a folder of class folders, or a packed ``.npz``."""
    return PackedImages(path) if path.endswith(".npz") else ClassFolders(path)


def check_source(path: str, read_images: bool = False, broken: str = "error") -> Report:
    """
    Check what is at a path of :func:`open_source`.

    Args:
        read_images: decode every image file, for some ms each; else the headers of 100 of them.
        broken: ``DATASETS.BROKEN_IMAGES``; with "skip", unreadable images are warnings.
    """
    try:
        source = open_source(path)
    except (FileNotFoundError, ValueError) as error:
        return Report(errors=[str(error)])
    report = Report(warnings=[*source.report.warnings])
    if isinstance(source, ClassFolders):
        files = source.file_names()
        empty = [name for name in files if not os.path.getsize(name)]
        if empty:
            (report.warn if broken == "skip" else report.error)("images are empty files", empty)
        empty_names = set(empty)
        files = [name for name in files if name not in empty_names]
        sample = files if read_images else files[:: max(len(files) // 100, 1)]
        check_images(sample, report, read_rgb if read_images else check_header, broken)
    return report
