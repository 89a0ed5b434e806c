# Copyright (c) The mokd_det authors.
"""What a deployed model needs to be told beside its weights."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import detectron2
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

import mokd_det

from ..data.paths import sha256_of

Json = dict[str, Any]  # what is written as JSON
METADATA_FILE = "metadata.json"  # inside a TorchScript or .pt2 archive, or an entry of ONNX's own


def common_metadata(
    cfg: CfgNode, pixel_mean: Sequence[float], pixel_std: Sequence[float], stock_cfg: CfgNode
) -> Json:
    """
    Return what the metadata of every model says. Its config's checksum is that of
    :func:`mokd_det.config.stock_config`; weights that torchvision names have none.
    """
    weights = cfg.MODEL.WEIGHTS
    return {
        "format": cfg.INPUT.FORMAT,
        "pixel_mean": list(pixel_mean),
        "pixel_std": list(pixel_std),
        "versions": {
            package.__name__: package.__version__
            for package in (mokd_det, detectron2, torch, torchvision)
        },
        "config_sha256": hashlib.sha256(stock_cfg.dump().encode()).hexdigest(),
        "weights_sha256": sha256_of(weights) if weights else None,
    }


def normalisation_of(model: Any) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of a model that keeps them as buffers."""
    return model.pixel_mean.flatten().tolist(), model.pixel_std.flatten().tolist()


def data_sets_of(cfg: CfgNode) -> list[str]:
    """Return the names of a config's data sets that are registered, those of TRAIN first."""
    return [n for n in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if n in DatasetCatalog.list()]


def class_names_of(cfg: CfgNode, count: int, names_of: Callable) -> list[str] | None:
    """
    Return the classes of the config's first data set that has as many as the model; None if no
    set is here to name them. ``names_of``: from a set's name and metadata to its classes.
    """
    for name in data_sets_of(cfg):
        try:
            names = list(names_of(name, MetadataCatalog.get(name)))
        except FileNotFoundError:  # a set that is registered, but not on this machine
            continue
        if len(names) == count:
            return names
    return None
