# Copyright (c) The mokd_det authors.
"""Models, teachers and data sets have to number their classes alike: labels are only numbers."""

import os
import zipfile
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..untrusted import check_class_names, kind_of, read_torch
from .classification.sources import class_names as names_of_folders
from .coco import read_class_names
from .paths import local_path
from .report import listed


def check_classes(
    cfg: CfgNode, options: Sequence[str] = ("TRAIN", "TEST"), names: list[str] | None = None
) -> None:
    """
    Check the data sets of a classifier, in these keys of ``cfg.DATASETS``, against it, and against
    the names of its classes if they are known. ValueError:
    a set for detection, sets of different classes, or another number of classes than the
    classifier's. FileNotFoundError: a folder without class folders.
    """
    first = names and ("MODEL.WEIGHTS", names)
    for option in options:
        for name in cfg.DATASETS[option]:
            if MetadataCatalog.get(name).get("evaluator_type") != "classification":
                raise ValueError(
                    f"DATASETS.{option} names '{name}', which is no set for classification, but "
                    "MODEL.META_ARCHITECTURE is 'Classifier': name one of DATASETS.CLASSIFICATION."
                )
            classes = names_of_folders(MetadataCatalog.get(name).image_path)
            first = first or (name, classes)
            if classes != first[1]:
                raise ValueError(
                    f"DATASETS.{option}: '{name}' has other classes ({listed_names(classes)}) than "
                    f"'{first[0]}' ({listed_names(first[1])}): their labels mean different things."
                )
            if len(classes) != cfg.MODEL.CLASSIFIER.NUM_CLASSES:
                raise ValueError(
                    f"MODEL.CLASSIFIER.NUM_CLASSES is {cfg.MODEL.CLASSIFIER.NUM_CLASSES}, but "
                    f"'{name}' has {len(classes)} classes ({listed_names(classes)}): set it to "
                    f"{len(classes)}."
                )


def check_teacher_classes(cfg: CfgNode, teacher_cfg: CfgNode, reader: str) -> None:
    """
    Raise ValueError if student and teacher name their classes differently or in another order, as
    far as the names are known: of the first training set of each config, or of the run that the
    teacher's weights are of. ``reader``: what compares them by number, for the message.
    """
    names = known_class_names(cfg)
    teacher_names = known_class_names(teacher_cfg)
    if teacher_cfg.DATASETS.TRAIN:
        weights = teacher_cfg.MODEL.WEIGHTS
        teacher_names = trained_class_names(weights, "MOKD.TEACHER.WEIGHTS") or teacher_names
    if not names or not teacher_names or names == teacher_names:
        return
    if len(names) != len(teacher_names):
        return  # the model's to refuse, which knows how many classes each side has
    order = ", the same in another order" if sorted(names) == sorted(teacher_names) else ""
    ours, theirs = (next(iter(c.DATASETS.TRAIN), "by its weights") for c in (cfg, teacher_cfg))
    raise ValueError(
        f"{reader} compares classes by number, but the student's classes are "
        f"{listed_names(names)} (DATASETS.TRAIN {ours}), the teacher's "
        f"{listed_names(teacher_names)} ({theirs}){order}. Bring the "
        "student's data set into the teacher's order; or distil features only "
        "(MOKD.OBJECTIVES ['teacher_head']); or, if they mean the same, let the teacher name none "
        "(MOKD.TEACHER.OPTS ['DATASETS.TRAIN', '()'])."
    )


def trained_class_names(weights: str, option: str = "MODEL.WEIGHTS") -> list[str] | None:
    """
    Return the classes of the run that a file of weights is of, in the order of their numbers; None
    if it does not say them. ValueError: a damaged file, or an archive that is no checkpoint.
    ``option``: where the file was named, for messages.
    """
    path = os.path.expanduser(weights)
    if not path.endswith(".pth") or not os.path.isfile(path) or not zipfile.is_zipfile(path):
        return None
    name = f"{option} '{weights}'"
    kind_of(path, name)
    checkpoint = read_torch(path, name, mmap=True)
    run = checkpoint.get("run") if isinstance(checkpoint, dict) else None
    names = run.get("class_names") if isinstance(run, dict) else None
    if names is not None:
        check_class_names(names, name)
    return names


def known_class_names(cfg: CfgNode) -> list[str] | None:
    """
    Return the classes of a config: of its first training set, or COCO's for heads with COCO's ids;
    None if nothing says them.
    """
    is_torchvision = cfg.MODEL.META_ARCHITECTURE == "TorchvisionDetector"
    if is_torchvision and cfg.MODEL.TORCHVISION_DETECTOR.COCO_IDS:
        return list(MetadataCatalog.get("coco_2017_train").thing_classes)
    for name in cfg.DATASETS.TRAIN[:1]:
        for known, json_file, _ in cfg.DATASETS.COCO:
            if known == name:
                return _names_of_set(name, local_path(json_file))
        for known, path in cfg.DATASETS.CLASSIFICATION:
            if known == name:
                path = local_path(path)
                return names_of_folders(path) if os.path.exists(path) else None
        if name in DatasetCatalog.list():
            metadata = MetadataCatalog.get(name)
            return metadata.get("thing_classes") or _names_in(metadata.get("json_file"))
    return None


def _names_of_set(name, json_file):
    if name in DatasetCatalog.list():
        metadata = MetadataCatalog.get(name)
        source = metadata.get("completed_from") or metadata.get("json_file")
        if source == json_file and metadata.get("thing_classes"):
            return list(metadata.thing_classes)  # it was read already
    return _names_in(json_file)


def _names_in(json_file):
    if json_file is None or not PathManager.isfile(json_file):
        return None
    return read_class_names(json_file)


def listed_names(names: Sequence[str]) -> str:
    """Return the number of classes and the first of them."""
    return listed(names, most=5)
