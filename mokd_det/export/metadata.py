# Copyright (c) The mokd_det authors.
"""What a deployed model needs to be told beside its weights."""

import hashlib
from collections.abc import Callable
from typing import Any

import detectron2
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

import mokd_det

from ..data.paths import sha256_of

METADATA_FILE = "metadata.json"
"""Name of the extra file inside a TorchScript archive, and of the entry in an ONNX or .pt2 file."""


def common_metadata(cfg: CfgNode, model: Any, stock_cfg: CfgNode) -> dict[str, Any]:
    """
    Args:
        cfg: of the model.
        model: with ``pixel_mean`` and ``pixel_std``.
        stock_cfg: see :func:`mokd_det.config.stock_config`.

    Returns:
        To be written as JSON: ``format``, ``pixel_mean``, ``pixel_std``, ``versions``,
        ``config_sha256``, ``weights_sha256`` (None for weights that torchvision names).
    """
    weights = cfg.MODEL.WEIGHTS
    return {
        "format": cfg.INPUT.FORMAT,
        "pixel_mean": model.pixel_mean.flatten().tolist(),
        "pixel_std": model.pixel_std.flatten().tolist(),
        "versions": {
            "mokd_det": mokd_det.__version__,
            "detectron2": detectron2.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "config_sha256": hashlib.sha256(stock_cfg.dump().encode()).hexdigest(),
        "weights_sha256": sha256_of(weights) if weights else None,
    }


def data_sets_of(cfg: CfgNode) -> list[str]:
    """Return the names of a config's data sets that are registered, those of TEST first."""
    return [n for n in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN) if n in DatasetCatalog.list()]


def class_names_of(cfg: CfgNode, count: int, names_of: Callable) -> list[str] | None:
    """
    Args:
        cfg: of the model, its data sets registered.
        count: of the model's classes.
        names_of: from a data set's name and metadata to the names of its classes.

    Returns:
        Of the first set that has as many; None if no data set of the config is here to name them.
    """
    for name in data_sets_of(cfg):
        try:
            names = list(names_of(name, MetadataCatalog.get(name)))
        except FileNotFoundError:  # a set that is registered, but not on this machine
            continue
        if len(names) == count:
            return names
    return None
