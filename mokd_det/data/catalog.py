# Copyright (c) The mokd_det authors.
"""Registering data sets from the config, and checking them before anything is read."""

import difflib
import json
import logging
import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from .classification.sources import class_names, open_source
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
        name, json_file, image_root = entry[0], local_path(entry[1]), local_path(entry[2])
        if name not in DatasetCatalog.list():
            register_coco_instances(name, {}, json_file, image_root)
        known = MetadataCatalog.get(name)
        if known.get("json_file") != json_file or known.get("image_root") != image_root:
            raise ValueError(
                f"DATASETS.COCO: the name '{name}' is taken by another data set "
                f"({known.get('json_file', 'not in COCO format')}). Choose another name."
            )
        if cfg.MODEL.KEYPOINT_ON:
            _set_keypoint_metadata(name, json_file)


def _check_entry(option, entry, parts):
    if len(entry) != len(parts) or not all(isinstance(part, str) and part for part in entry):
        raise ValueError(
            f"DATASETS.{option} has the entry {entry!r}: expected [{', '.join(parts)}]."
        )


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


def check_classes(cfg: CfgNode, options: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """
    Check the data sets of a classifier, in these keys of ``cfg.DATASETS``, against it. ValueError:
    a set for detection, sets of different classes, or another number of classes than the
    classifier's. FileNotFoundError: a folder without class folders.
    """
    first = None
    for option in options:
        for name in cfg.DATASETS[option]:
            if MetadataCatalog.get(name).get("evaluator_type") != "classification":
                raise ValueError(
                    f"DATASETS.{option} names '{name}', which is no set for classification, but "
                    "MODEL.META_ARCHITECTURE is 'Classifier': name one of DATASETS.CLASSIFICATION."
                )
            classes = class_names(MetadataCatalog.get(name).image_path)
            first = first or (name, classes)
            if classes != first[1]:
                raise ValueError(
                    f"DATASETS.{option}: '{name}' has other classes ({_listed(classes)}) than "
                    f"'{first[0]}' ({_listed(first[1])}), so their labels mean different things."
                )
            if len(classes) != cfg.MODEL.CLASSIFIER.NUM_CLASSES:
                raise ValueError(
                    f"MODEL.CLASSIFIER.NUM_CLASSES is {cfg.MODEL.CLASSIFIER.NUM_CLASSES}, but "
                    f"'{name}' has {len(classes)} classes ({_listed(classes)}): set it to "
                    f"{len(classes)}."
                )


def check_teacher_classes(cfg: CfgNode, teacher_cfg: CfgNode) -> None:
    """
    Outputs are compared class by class, so both sides must number the classes alike. Checked by
    the names in the training sets of both configs, where these are known without reading images;
    ValueError: the same names in another order.
    """
    names, teacher_names = _class_names(cfg), _class_names(teacher_cfg)
    if not names or not teacher_names or names == teacher_names:
        return
    both = (
        f"the student's classes are {_listed(names)} (DATASETS.TRAIN {cfg.DATASETS.TRAIN[0]}), the "
        f"teacher's {_listed(teacher_names)} ({teacher_cfg.DATASETS.TRAIN[0]})"
    )
    if sorted(names) == sorted(teacher_names):
        raise ValueError(
            f"MOKD.OBJECTIVES compares classes by number, but {both}, the same in another order. "
            "Bring the student's data set into the teacher's order, or distil features only "
            "(MOKD.OBJECTIVES ['features'])."
        )
    if len(names) == len(teacher_names):  # another number is the model's to refuse
        logger.warning(f"Classes are compared by their numbers, but {both}.")


def _class_names(cfg):
    """Of the first training set of a config; None if they are not known."""
    for name in cfg.DATASETS.TRAIN[:1]:
        for known, json_file, _ in cfg.DATASETS.COCO:
            if known == name:
                return _coco_class_names(local_path(json_file))
        for known, path in cfg.DATASETS.CLASSIFICATION:
            if known == name:
                path = local_path(path)
                return class_names(path) if os.path.exists(path) else None
        if name in DatasetCatalog.list():
            metadata = MetadataCatalog.get(name)
            return metadata.get("thing_classes") or _coco_class_names(metadata.get("json_file"))
    return None


def _coco_class_names(json_file):
    """In the order in which Detectron2 numbers the classes: that of the categories' ids."""
    if json_file is None or not PathManager.isfile(json_file):
        return None
    with PathManager.open(json_file) as f:
        categories = json.load(f).get("categories", [])
    return [category["name"] for category in sorted(categories, key=lambda c: c["id"])]


def _listed(names, most=5):
    rest = ", ..." if len(names) > most else ""
    return f"{len(names)}: {', '.join(map(str, names[:most]))}{rest}"


def _set_keypoint_metadata(name, json_file):
    """From the JSON: names, and which ("left_x", "right_x") change places in a mirrored image."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("keypoint_names") or not PathManager.isfile(json_file):
        return  # a missing file is :func:`check_datasets`' to explain
    with PathManager.open(json_file) as f:
        categories = json.load(f).get("categories", [])
    names = [category["keypoints"] for category in categories if "keypoints" in category]
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
