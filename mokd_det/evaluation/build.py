# Copyright (c) The mokd_det authors.
"""The evaluators of a data set, as in Detectron2's own tools/train_net.py."""

import os

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from .classification import ClassificationEvaluator

__all__ = ["build_evaluator", "check_evaluators"]


TYPES = ("classification", "coco", "coco_panoptic_seg", "lvis", "pascal_voc", "sem_seg")


def check_evaluators(dataset_names):
    """
    Raises:
        ValueError: one of these data sets has an ``evaluator_type`` that there is none for here.
    """
    for name in dataset_names:
        evaluator_type = MetadataCatalog.get(name).get("evaluator_type")
        if evaluator_type not in TYPES:
            raise ValueError(
                f"DATASETS.TEST: '{name}' has the evaluator type '{evaluator_type}'; expected one "
                f"of {', '.join(map(repr, TYPES))}. Set MetadataCatalog.get('{name}')"
                ".evaluator_type where you register it (sets of DATASETS.COCO have 'coco'), or "
                "give your trainer a build_evaluator of its own."
            )


def build_evaluator(cfg, dataset_name):
    """
    Args:
        cfg (CfgNode): for ``OUTPUT_DIR`` and ``TEST.KEYPOINT_OKS_SIGMAS``.
        dataset_name (str): a registered data set.

    Returns:
        DatasetEvaluator: for its ``evaluator_type``; its files go to a folder of its own.

    Raises:
        ValueError: there is no evaluator for this type here.
    """
    check_evaluators([dataset_name])
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    # One folder for each data set: the evaluators' files have fixed names.
    folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
    build = {
        "coco": [lambda: COCOEvaluator(dataset_name, output_dir=folder, kpt_oks_sigmas=sigmas)],
        "lvis": [lambda: LVISEvaluator(dataset_name, output_dir=folder)],
        "pascal_voc": [lambda: PascalVOCDetectionEvaluator(dataset_name)],
        "sem_seg": [lambda: SemSegEvaluator(dataset_name, output_dir=folder)],
        "classification": [
            lambda: ClassificationEvaluator(dataset_name, folder, cfg.TEST.PER_CLASS)
        ],
    }
    build["coco_panoptic_seg"] = [
        *build["coco"],
        *build["sem_seg"],
        lambda: COCOPanopticEvaluator(dataset_name, folder),
    ]
    evaluators = [make() for make in build[evaluator_type]]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
