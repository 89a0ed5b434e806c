# Copyright (c) The mokd_det authors.
"""Schedules in epochs, which depend on the size of the training set."""

import logging
import math

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from .loader import training_elements

logger = logging.getLogger(__name__)

UNITS = ("iteration", "epoch")


def schedule_in_iterations(cfg: CfgNode) -> CfgNode:
    """
    Return a config, its data sets registered, as it is if ``SOLVER.UNIT`` is an iteration. Else a
    new one in iterations: of E epochs of N images in batches of B, ``ceil(E N / B)``.
    """
    if cfg.SOLVER.UNIT == "iteration":
        return cfg
    images, batch = _training_images(cfg), cfg.SOLVER.IMS_PER_BATCH

    def iterations(epochs):
        return math.ceil(epochs * images / batch)

    cfg = cfg.clone()
    cfg.defrost()
    solver = cfg.SOLVER
    solver.UNIT = "iteration"
    for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
        solver[key] = iterations(solver[key])
    solver.STEPS = tuple(map(iterations, solver.STEPS))
    cfg.TEST.EVAL_PERIOD = iterations(cfg.TEST.EVAL_PERIOD)
    logger.info(
        f"An epoch of {images} images is {images / batch:.1f} iterations of {batch}; training "
        f"takes {solver.MAX_ITER}."
    )
    cfg.freeze()
    return cfg


def _training_images(cfg):
    types = {MetadataCatalog.get(name).get("evaluator_type") for name in cfg.DATASETS.TRAIN}
    if types == {"classification"}:
        return sum(len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TRAIN)
    return len(training_elements(cfg))
