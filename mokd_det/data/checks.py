# Copyright (c) The mokd_det authors.
"""Before training and evaluation: are a config's sets in COCO's format what they should be?"""

import json
import logging
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ..files import replace_file
from .classes import listed_names
from .coco import check_coco, class_names, read_coco, with_classes
from .images import vanishes

logger = logging.getLogger(__name__)

# The sets that were checked in this process, and as what: one check is enough.
_checked: dict[str, tuple] = {}


def check_detection_sets(
    cfg: CfgNode,
    options: Sequence[str],
    head: tuple[str, int] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """
    Check the registered sets in these keys of ``cfg.DATASETS``. A set that had to be completed, or
    whose classes have other numbers, is registered anew, with a file in ``OUTPUT_DIR/datasets``
    that both loader and evaluator read.

    Args:
        head: the option with the number of classes of the model, and its value; None: unknown.
        names: the classes of the model; None: those of the first set.

    Raises:
        ValueError: a set with errors, with classes that are not the model's, or of which something
            had to be completed though a function of the user's loads it.
    """
    for option in options:
        for name in cfg.DATASETS[option]:
            metadata = MetadataCatalog.get(name)
            if metadata.get("evaluator_type") == "coco" and metadata.get("json_file"):
                _check_set(cfg, option, name, names)
            found = MetadataCatalog.get(name).get("thing_classes")
            if found is None:
                continue
            _check_names(option, name, found, names)
            names = names or found
            if head is not None:
                _check_count(option, name, found, *head)


def check_head(cfg: CfgNode, options: Sequence[str], what: str, count: int) -> None:
    """
    Raise ValueError for a checked set in these keys of ``cfg.DATASETS`` that has not ``count``
    classes. ``what`` has that number in the model, for the message.
    """
    for option in options:
        for name in cfg.DATASETS[option]:
            if (found := MetadataCatalog.get(name).get("thing_classes")) is not None:
                _check_count(option, name, found, what, count)


def _check_set(cfg: CfgNode, option: str, name: str, names: Sequence[str] | None) -> None:
    metadata = MetadataCatalog.get(name)
    source, root = metadata.get("completed_from") or metadata.json_file, metadata.get("image_root")
    what = f"DATASETS.{option}: '{name}' ({source})"
    needs: dict[str, Any] = {
        "training": option == "TRAIN",
        "masks": cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else None,
        "keypoints": cfg.MODEL.KEYPOINT_ON,
        "broken": cfg.DATASETS.BROKEN_IMAGES,
    }
    state = source, os.stat(source).st_mtime_ns, root, *needs.values(), names and tuple(names)
    if _checked.get(name) == state:
        return
    data, report = check_coco(given := read_coco(source), root, **needs)
    report.raise_for_errors(what)
    _check_shapes(cfg, option, data["images"], report)
    report.raise_for_errors(what)
    found = class_names(data)
    if names is not None and found != list(names) and set(found) <= set(names):
        data = with_classes(data, names)
        report.warn(f"its classes are {listed_names(found)}, which get the numbers of the model's")
    for warning in report.warnings:
        logger.warning(f"{what}: {warning}.")
    if data is not given:
        if not _is_loaded_by_detectron2(name):
            raise ValueError(
                f"{what} has to be completed: {'; '.join(report.warnings)}. A function of yours "
                "loads it, which would not read what is completed. Register it by "
                "register_coco_instances or in DATASETS.COCO, where that is done, or correct "
                "the file: mokd check-data --write"
            )
        _register_completed(cfg, name, data, source, root)
    MetadataCatalog.get(name).thing_classes = class_names(data)
    _checked[name] = state


def _check_shapes(cfg, option, images, report):
    """Thin images must not be resized to nothing."""
    if option == "TRAIN":
        if cfg.INPUT.LSJ.ENABLED:
            return
        short_edge, longest_edge = min(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
    else:
        short_edge, longest_edge = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    if not short_edge:  # images keep their size
        return
    thin = [
        f"{image['file_name']}, {image['width']} x {image['height']}"
        for image in images
        if vanishes(image["height"], image["width"], short_edge, longest_edge)
    ]
    if thin:
        add = report.warn if cfg.DATASETS.BROKEN_IMAGES == "skip" else report.error
        add(
            f"images that INPUT.MIN_SIZE_{option} {short_edge} and MAX_SIZE_{option} "
            f"{longest_edge} make less than a pixel wide or high",
            thin,
        )


def _is_loaded_by_detectron2(name: str) -> bool:
    """Whether the set is what ``register_coco_instances`` made: its file and nothing else."""
    loader = DatasetCatalog[name]
    made_by = f"{getattr(loader, '__module__', '')}.{getattr(loader, '__qualname__', '')}"
    ours = register_coco_instances
    return made_by.startswith(f"{ours.__module__}.{ours.__qualname__}.<locals>")


def _register_completed(cfg, name, data, source, root):
    path = os.path.join(cfg.OUTPUT_DIR, "datasets", f"{name}.json")
    write_json(data, path)
    logger.info(f"'{name}' is read from {path}, where this is corrected.")
    again = ("name", "json_file", "image_root", "evaluator_type", "completed_from")
    kept = {
        key: value
        for key, value in MetadataCatalog.get(name).as_dict().items()
        if key not in again and not key.startswith("thing_")  # classes, which may be others now
    }
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
    register_coco_instances(name, {**kept, "completed_from": source}, path, root)


def write_json(data: dict[str, Any], path: str) -> None:
    """Write a file that is there as a whole or not at all: several processes may write it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    content = json.dumps(data).encode()
    replace_file(path, lambda file: file.write(content))


def _check_count(option, name, found, what, count):
    if len(found) != count:
        raise ValueError(
            f"{what} is {count}, but '{name}' (DATASETS.{option}) has {listed_names(found)}: set "
            f"it to {len(found)}."
        )


def _check_names(option, name, found, names):
    if names is None or list(found) == list(names):
        return
    raise ValueError(
        f"DATASETS.{option}: '{name}' has the classes {listed_names(found)}, but the model has "
        f"{listed_names(names)}. Labels are compared by number: give both the same classes."
    )
