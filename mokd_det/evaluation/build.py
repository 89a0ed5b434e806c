# Copyright (c) The mokd_det authors.
"""The evaluators of a data set, as in Detectron2's own tools/train_net.py."""

import os
from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator, DatasetEvaluator
from detectron2.evaluation import DatasetEvaluators, LVISEvaluator, PascalVOCDetectionEvaluator
from detectron2.evaluation import SemSegEvaluator

from .classification import ClassificationEvaluator

# By evaluator_type: from config, name of the data set and folder to evaluators.
EVALUATORS: dict[str, Callable[[CfgNode, str, str], list[DatasetEvaluator]]] = {
    "classification": lambda cfg, name, folder: [
        ClassificationEvaluator(name, folder, cfg.TEST.PER_CLASS)
    ],
    "coco": lambda cfg, name, folder: [
        COCOEvaluator(name, output_dir=folder, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS)
    ],
    "coco_panoptic_seg": lambda cfg, name, folder: [
        *EVALUATORS["coco"](cfg, name, folder),
        *EVALUATORS["sem_seg"](cfg, name, folder),
        COCOPanopticEvaluator(name, folder),
    ],
    "lvis": lambda cfg, name, folder: [LVISEvaluator(name, output_dir=folder)],
    "pascal_voc": lambda cfg, name, folder: [PascalVOCDetectionEvaluator(name)],
    "sem_seg": lambda cfg, name, folder: [SemSegEvaluator(name, output_dir=folder)],
}


def check_evaluators(dataset_names: Sequence[str]) -> None:
    """Raise ValueError for a registered set of an ``evaluator_type`` without evaluator here."""
    for name in dataset_names:
        evaluator_type = MetadataCatalog.get(name).get("evaluator_type")
        if evaluator_type not in EVALUATORS:
            raise ValueError(
                f"DATASETS.TEST: '{name}' has the evaluator type '{evaluator_type}'; expected one "
                f"of {', '.join(map(repr, EVALUATORS))}. Set MetadataCatalog.get('{name}')"
                ".evaluator_type where you register it (sets of DATASETS.COCO have 'coco'), or "
                "give your trainer a build_evaluator of its own."
            )


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """Return the evaluator of a registered data set; ValueError: see :func:`check_evaluators`."""
    check_evaluators([dataset_name])
    # One folder for each data set: the evaluators' files have fixed names.
    folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    make = EVALUATORS[MetadataCatalog.get(dataset_name).evaluator_type]
    evaluators = make(cfg, dataset_name, folder)
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
