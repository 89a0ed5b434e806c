# Copyright (c) The mokd_det authors.
"""Registering data sets from the config, and checking them before anything is read."""

import difflib
import logging
import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from ..untrusted import check_file_name
from .classification.sources import open_source
from .coco import read_coco
from .coco_annotations import are_names
from .paths import datasets_root, local_path

logger = logging.getLogger(__name__)

IMAGENET = [[f"imagenet_{split}", f"datasets://imagenet/{split}"] for split in ("train", "val")]


def register_datasets(cfg: CfgNode) -> None:
    """
    Register every set of ``cfg.DATASETS.COCO`` and ``cfg.DATASETS.CLASSIFICATION`` under its name,
    and ImageNet, unless the user has sets of these names. The same name may be registered again
    with the same files (a second run in one process), not with others. ValueError: a malformed
    entry, or a name that stands for other files already.
    """
    for entry in [*IMAGENET, *cfg.DATASETS.CLASSIFICATION]:
        _register_classification(entry)
    for entry in cfg.DATASETS.COCO:
        _check_entry("COCO", entry, ["name", "JSON file", "image folder"])
        register_coco(*entry)
        if cfg.MODEL.KEYPOINT_ON:
            _set_keypoint_metadata(entry[0], local_path(entry[1]))


def register_coco(name: str, json_file: str, image_root: str) -> None:
    """
    Register one set in COCO's format; paths may begin with "datasets://". ValueError: the name
    stands for other files already.
    """
    json_file, image_root = local_path(json_file), local_path(image_root)
    if name not in DatasetCatalog.list():
        register_coco_instances(name, {}, json_file, image_root)
    known = MetadataCatalog.get(name)
    source = known.get("completed_from") or known.get("json_file")
    if source != json_file or known.get("image_root") != image_root:
        raise ValueError(
            f"DATASETS.COCO: the name '{name}' is taken by another data set "
            f"({known.get('json_file', 'not in COCO format')}). Choose another name."
        )


def _check_entry(option, entry, parts):
    if len(entry) != len(parts) or not all(isinstance(part, str) and part for part in entry):
        raise ValueError(
            f"DATASETS.{option} has the entry {entry!r}: expected [{', '.join(parts)}]."
        )
    check_file_name(entry[0], f"DATASETS.{option}: the name of a data set")


def _register_classification(entry):
    parts = ["name", "path of a folder of class folders or of a packed .npz"]
    _check_entry("CLASSIFICATION", entry, parts)
    name, path = entry[0], local_path(entry[1])
    if name in DatasetCatalog.list():
        known = MetadataCatalog.get(name)
        if entry in IMAGENET and known.get("image_path") is None:
            return  # the user's own, from before
        # Only ImageNet's path may move, with DETECTRON2_DATASETS.
        if known.get("image_path") != path and entry not in IMAGENET:
            raise ValueError(
                f"DATASETS.CLASSIFICATION: the name '{name}' is taken by another data set "
                f"({known.get('image_path', 'not for classification')}). Choose another name."
            )
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: open_source(path))
    MetadataCatalog.get(name).set(evaluator_type="classification", image_path=path)


def _set_keypoint_metadata(name, json_file):
    """From the JSON: names, and which ("left_x", "right_x") change places in a mirrored image."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("keypoint_names") or not PathManager.isfile(json_file):
        return  # a missing file is :func:`check_datasets`' to explain
    categories = read_coco(json_file)["categories"]
    names = [category["keypoints"] for category in categories if category.get("keypoints")]
    if odd := [value for value in names if not are_names(value)]:
        raise ValueError(
            f"DATASETS.COCO: '{name}' ({json_file}) has categories whose keypoints are no list of "
            f"names: {odd[0]!r}."
        )
    if not names or any(other != names[0] for other in names):
        raise ValueError(
            f"DATASETS.COCO: MODEL.KEYPOINT_ON is True, but '{name}' ({json_file}) has "
            + ("categories with different keypoints." if names else "no category with 'keypoints'.")
        )
    mirrored = [(n, n.replace("left", "right")) for n in names[0] if "left" in n]
    metadata.keypoint_names = names[0]
    metadata.keypoint_flip_map = [pair for pair in mirrored if pair[1] in names[0]]


def check_datasets(names: Sequence[str], option: str) -> None:
    """
    Check that the data sets of a config key are registered and their files exist, without reading
    any of them. ValueError: no name at all, or one that is not registered. FileNotFoundError: the
    JSON file or the image folder is missing.
    """
    if not names:
        raise ValueError(f"{option} is empty: name at least one data set.")
    for name in names:
        if name not in DatasetCatalog.list():
            close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
            hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(
                f"{option} names '{name}', which is not registered.{hint} Add an entry "
                f"['{name}', JSON file, image folder] to DATASETS.COCO (classification: "
                f"['{name}', path] to DATASETS.CLASSIFICATION), or register it in Python."
            )
        for key, what, kind, exists in (
            ("json_file", "annotations", "the file ", PathManager.isfile),
            ("image_root", "images", "the folder ", PathManager.isdir),
            ("image_path", "images", "", os.path.exists),
        ):
            path = MetadataCatalog.get(name).get(key)
            if path is not None and not exists(path):
                raise FileNotFoundError(
                    f"{option}: the {what} of '{name}' are missing: expected {kind}"
                    f"{os.path.abspath(path)}. {_remedy(name)}"
                )


def _remedy(name):
    remedy = (
        f"Data sets are looked for in '{datasets_root()}' (set DETECTRON2_DATASETS to move "
        "that); datasets/README.md says how to prepare each."
    )
    if name.startswith(("coco_2017_", "keypoints_coco_2017_")):
        remedy += (
            " COCO: download train2017.zip, val2017.zip and annotations_trainval2017.zip from "
            f"https://cocodataset.org/#download and unpack them in '{datasets_root() / 'coco'}', "
            "which then has annotations/, train2017/ and val2017/. Or name a data set of yours in "
            "DATASETS.COCO, DATASETS.TRAIN and DATASETS.TEST."
        )
    if name.startswith("imagenet_"):
        remedy += (
            " ImageNet (ILSVRC 2012): download its training and validation images from "
            f"https://image-net.org and sort both into a folder for each class in "
            f"'{datasets_root() / 'imagenet'}', which then has train/n01440764/ ... and "
            "val/n01440764/ ..."
        )
    return remedy
