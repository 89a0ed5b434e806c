# Copyright (c) The mokd_det authors.
"""Detectors that Detectron2 describes by Python configs only (FCOS, ViTDet), in a YAML config."""

from collections.abc import Sequence

from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from omegaconf import DictConfig
from torch import nn

from ..config import find_config


@META_ARCH_REGISTRY.register()
def LazyConfigDetector(cfg: CfgNode) -> nn.Module:
    """
    Build ``model`` of the Python config ``cfg.MODEL.LAZY_CONFIG.FILE``, with the overrides of
    ``cfg.MODEL.LAZY_CONFIG.OVERRIDES`` ("model.num_classes=3"). Everything else (solver, input,
    data sets) is the YAML config's.

    Returns:
        The stock detector.

    Raises:
        ValueError, FileNotFoundError: no such file, or it holds no ``model``.
    """
    option = "MODEL.LAZY_CONFIG.FILE"
    if not cfg.MODEL.LAZY_CONFIG.FILE:
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is 'LazyConfigDetector', but {option} is empty: name a "
            "Python config of Detectron2 that defines 'model'."
        )
    lazy = load_lazy_config(cfg.MODEL.LAZY_CONFIG.FILE, cfg.MODEL.LAZY_CONFIG.OVERRIDES, option)
    input_format = lazy.model.get("input_format", cfg.INPUT.FORMAT)
    if input_format != cfg.INPUT.FORMAT:
        raise ValueError(
            f"INPUT.FORMAT is '{cfg.INPUT.FORMAT}', but the model of {option} "
            f"'{cfg.MODEL.LAZY_CONFIG.FILE}' takes '{input_format}': set INPUT.FORMAT to that."
        )
    return instantiate(lazy.model)


def load_lazy_config(name: str, overrides: Sequence[str], option: str) -> DictConfig:
    """
    Args:
        name: a Python config, or its name in Detectron2's model zoo.
        overrides: "model.num_classes=3", ...
        option: where it was given, for messages.

    Returns:
        With ``model``.

    Raises:
        ValueError, FileNotFoundError: no such file, or it holds no ``model``.
    """
    path, _ = find_config(name, option)
    lazy = LazyConfig.apply_overrides(LazyConfig.load(path), list(overrides))
    if "model" not in lazy:
        raise ValueError(f"{option} '{path}' defines no 'model'.")
    return lazy
