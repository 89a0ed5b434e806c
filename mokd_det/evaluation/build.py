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

__all__ = ["build_evaluator"]


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
    if evaluator_type not in build:
        raise ValueError(
            f"DATASETS.TEST: '{dataset_name}' has the evaluator type '{evaluator_type}'; expected "
            f"one of {', '.join(map(repr, sorted(build)))}. Sets in COCO format registered by "
            "DATASETS.COCO are of type coco."
        )
    evaluators = [make() for make in build[evaluator_type]]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
