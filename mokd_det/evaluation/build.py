# Copyright (c) The mokd_det authors.
"""The evaluator of a data set, as in Detectron2's own tools/train_net.py."""

import os

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator

__all__ = ["build_evaluator"]


def build_evaluator(cfg, dataset_name):
    """
    Args:
        cfg (CfgNode): for ``OUTPUT_DIR``.
        dataset_name (str): a registered data set.

    Returns:
        DatasetEvaluator: for its ``evaluator_type``.

    Raises:
        ValueError: there is no evaluator for this type here.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type == "coco":
        # One folder for each data set: the evaluator's files have fixed names.
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        return COCOEvaluator(dataset_name, output_dir=folder)
    if evaluator_type == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    raise ValueError(
        f"DATASETS.TEST: '{dataset_name}' has the evaluator type '{evaluator_type}'; expected "
        "'coco' or 'pascal_voc'. Sets in COCO format registered by DATASETS.COCO are of type coco."
    )
