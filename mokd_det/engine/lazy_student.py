# Copyright (c) The mokd_det authors.
"""What a Python config says, as YAML: its student for other commands, its options for a report."""

import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from ..files import replace_file
from .folder import OPTIONS
from .lazy_options import IN_YAML, plain

logger = logging.getLogger(__name__)

MODEL, CONFIG = "student_model.yaml", "student.yaml"
# What a Python config sets of a YAML config, besides IN_YAML.
ALSO_SET = (
    *("MODEL.META_ARCHITECTURE", "INPUT.FORMAT", "DATASETS.TRAIN", "DATASETS.TEST"),
    *("SOLVER.IMS_PER_BATCH", "SOLVER.OPTIMIZER", "MOKD"),
)


def write_options(cfg: CfgNode) -> None:
    """Write, beside the Python config of a run, what it sets under the names of a YAML config."""
    values = yaml.safe_load(cfg.dump())
    options = {
        key: functools.reduce(dict.__getitem__, key.split("."), values)
        for key in sorted({*IN_YAML.values(), *ALSO_SET})
    }
    _write(os.path.join(cfg.OUTPUT_DIR, OPTIONS), yaml.safe_dump(options))


def write_student(lazy: DictConfig, cfg: CfgNode) -> str:
    """
    Write a LazyConfig with the student as ``model``, and beside it the YAML config of the
    ``LazyConfigDetector`` that it is; return the latter's path, "" if the student cannot be written
    as YAML.

    Args:
        lazy: the Python config.
        cfg: its options as those of a YAML config.
    """
    model, config = (os.path.join(cfg.OUTPUT_DIR, name) for name in (MODEL, CONFIG))
    student = OmegaConf.to_object(lazy.model.student)
    if local := [name for name in map(_name_of, _calls(student)) if not _is_found(name)]:
        logger.warning(
            f"{config} is not written, so mokd export and predict cannot be used: the student "
            f"calls {local[0]}, which no module has. Define it in one, and import it."
        )
        return ""
    # As LazyConfig.save, which would turn the ShapeSpec of upstream's Detectron2 into a dict.
    text = yaml.dump({"model": _named(student)}, default_flow_style=None, width=9999)
    _write(model, text)
    sizes = _test_sizes(lazy)
    if sizes is None:
        logger.warning(
            f"{config} has no sizes of images, since dataloader.test.mapper.augmentations is not "
            "one ResizeShortestEdge: set INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST there before you "
            "predict."
        )
    content = {
        "MODEL": {
            "META_ARCHITECTURE": "LazyConfigDetector",
            "LAZY_CONFIG": {"FILE": MODEL},
            "DEVICE": cfg.MODEL.DEVICE,
        },
        "INPUT": {"FORMAT": cfg.INPUT.FORMAT, **(sizes or {})},
    }
    _write(config, yaml.safe_dump(content))
    return config


def _write(path: str, text: str) -> None:
    replace_file(path, lambda f: f.write(text.encode()))


def _calls(value: Any) -> Iterator[Any]:
    """Yield what a config calls, and classes and functions among its values."""
    if isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _calls(part)
    elif callable(value):
        yield value


def _named(value: Any) -> Any:
    """Return a config with the names of what it calls."""
    if isinstance(value, dict):
        return {
            key: _name_of(x) if key == "_target_" and callable(x) else _named(x)
            for key, x in value.items()
        }
    return [_named(x) for x in value] if type(value) is list else value


def _name_of(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _is_found(name: str) -> bool:
    try:
        return locate(name) is not None
    except ImportError:
        return False


def _test_sizes(lazy: DictConfig) -> dict[str, int] | None:
    """Return how evaluation resizes images; None: not as a YAML config can."""
    steps: Any = OmegaConf.select(lazy, "dataloader.test.mapper.augmentations")
    step = steps[0] if steps and len(steps) == 1 else None
    target = step.get("_target_") if isinstance(step, DictConfig) else None
    if (locate(target) if isinstance(target, str) else target) is not ResizeShortestEdge:
        return None
    given = plain(step)
    short = given.get("short_edge_length")
    short = short[0] if isinstance(short, list) and len(set(short)) == 1 else short
    longest = given.get("max_size")
    if not (isinstance(short, int) and isinstance(longest, int)):
        return None
    return {"MIN_SIZE_TEST": short, "MAX_SIZE_TEST": longest}
