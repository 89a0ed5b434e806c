# Copyright (c) The mokd_det authors.
"""Detectors that Detectron2 describes by Python configs only (FCOS, ViTDet), in a YAML config."""

from collections.abc import Sequence

from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ..config import check_targets, find_config, read_lazy_config


@META_ARCH_REGISTRY.register()
def LazyConfigDetector(cfg: CfgNode) -> nn.Module:
    """
    Build ``model`` of the Python config ``MODEL.LAZY_CONFIG.FILE`` with the ``OVERRIDES`` beside it
    ("model.num_classes=3"). Everything else (solver, input, data sets) is the YAML config's.
    """
    option, file = "MODEL.LAZY_CONFIG.FILE", cfg.MODEL.LAZY_CONFIG.FILE
    if not file:
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is 'LazyConfigDetector', but {option} is empty: name a "
            "Python config of Detectron2 that defines 'model'."
        )
    model = load_lazy_config(file, cfg.MODEL.LAZY_CONFIG.OVERRIDES, option).model
    input_format = model.get("input_format", cfg.INPUT.FORMAT)
    if input_format != cfg.INPUT.FORMAT:
        raise ValueError(
            f"INPUT.FORMAT is '{cfg.INPUT.FORMAT}', but the model of {option} '{file}' takes "
            f"'{input_format}': set INPUT.FORMAT to that."
        )
    return instantiate(model)


def load_lazy_config(name: str, overrides: Sequence[str], option: str) -> DictConfig:
    """
    Return a config with ``model``; ``name`` is a Python config, or its name in Detectron2's model
    zoo, and ``option`` where it was given, for messages. ValueError or FileNotFoundError: no such
    file, it holds no ``model``, an override that is none, or code that nobody trusts.
    """
    path, _ = find_config(name, option)
    lazy = read_lazy_config(path, option)
    try:
        lazy = LazyConfig.apply_overrides(lazy, list(overrides))
        if "model" not in lazy or not isinstance(lazy.model, DictConfig):
            raise ValueError(f"{option} '{path}' defines no 'model'.")
        check_targets(lazy.model, f"{option} '{path}'")
    except (
        *(HydraException, OmegaConfBaseException, KeyError),
        *(NotImplementedError, RecursionError),
    ) as error:
        raise ValueError(
            f"{option} '{path}' with the overrides {list(overrides)} is no config: {error}"
        ) from error
    return lazy
