# Copyright (c) The mokd_det authors.
"""Reading configs: with our options, without unsafe YAML, and with errors that help."""

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.utils.file_io import PathManager

from ..untrusted import printable
from .defaults import add_mokd_config

# Options of version 0.1 and what became of them.
MOVED = {
    "MOKD.FEATURES.ENABLED": "name 'features' in MOKD.OBJECTIVES, or leave it out",
    "MOKD.OUTPUTS.ENABLED": "name 'outputs' (classifiers: 'logits') in MOKD.OBJECTIVES",
    "MOKD.OUTPUTS.PROPOSALS": "it is MOKD.TEACHER.PROPOSALS now",
    "MOKD.FEATURES.ALIGNMENT": "the alignment term is gone",
    "MOKD.BALANCING.PLACE": "it is MOKD.BALANCING.MEASURE_AT now",
    "MOKD.BALANCING.WEIGHTS": "it is MOKD.BALANCING.FIXED.WEIGHTS now (or COSINE_GATE.WEIGHTS)",
    "MOKD.BALANCING.AGREEMENT": "it is MOKD.BALANCING.LOSS_RATIO.AGREEMENT now",
    "MOKD.BALANCING.CLIP": "it is MOKD.BALANCING.MIN_NORM.CLIP now",
    "MOKD.BALANCING.LOG_LOSSES": "it is MOKD.BALANCING.MIN_NORM.LOG_LOSSES now",
    "MOKD.BALANCING.CAP": "its rules are gone; rule 'loss_ratio' has LOSS_RATIO.CAP",
    "MOKD.BALANCING.DOMINANCE": "rule 'constant_dominance' is gone",
    "MOKD.BALANCING.GRAM": "the signal Gram matrix is gone",
    "MOKD.BALANCING.LOOK_AHEAD": "rule 'look_ahead' is gone",
}


def get_cfg() -> CfgNode:
    """Return Detectron2's default config with the options of mokd_det added."""
    cfg = get_detectron2_cfg()
    add_mokd_config(cfg)
    return cfg


def load_config(
    config_file: str, opts: Sequence[Any] = (), option: str = "--config-file"
) -> CfgNode:
    """
    Args:
        config_file: a YAML file, with any prefix that Detectron2 resolves, or the name of one that
            comes with mokd_det, "COCO-Detection/...". Empty: defaults.
        opts: overrides [KEY, VALUE, ...].
        option: where the file name was given, for messages.

    Returns:
        Not frozen.

    FileNotFoundError: no such file. ValueError: a key that does not exist (with the closest that
    do), unsafe or broken YAML, or overrides that are no pairs.
    """
    cfg = get_cfg()
    if config_file:
        if "://" not in config_file and not PathManager.isfile(config_file):
            shipped = _shipped_config(config_file)
            if shipped is None:
                raise FileNotFoundError(f"{option} '{config_file}' does not exist.")
            config_file = shipped
        try:
            loaded = CfgNode.load_yaml_with_base(config_file, allow_unsafe=False)
        except yaml.constructor.ConstructorError as error:
            raise ValueError(
                f"{option} '{config_file}' (or its _BASE_) holds YAML that runs Python code, "
                f"which is never loaded: {error.problem}. Spell the values out; for Detectron2's "
                "RetinaNet base that is MODEL.ANCHOR_GENERATOR.SIZES, as in "
                "configs/Quick-Start/student_retinanet.yaml."
            ) from error
        except yaml.YAMLError as error:
            raise ValueError(f"{option} '{config_file}' is not valid YAML: {error}") from error
        except (TypeError, AssertionError, OSError) as error:
            raise ValueError(
                f"{option} '{config_file}' is empty, or its _BASE_ is missing or does not fit: "
                f"{error}"
            ) from error
        if not isinstance(loaded, dict):
            raise ValueError(f"{option} '{config_file}' holds no options.")
        if loaded.get("VERSION", cfg.VERSION) == cfg.VERSION:  # Detectron2 upgrades older ones
            _check_keys(loaded, cfg, f"{option} '{config_file}'")
        cfg.merge_from_file(config_file, allow_unsafe=False)
    merge_overrides(cfg, opts)
    return cfg


def merge_overrides(cfg: CfgNode, opts: Sequence[Any], source: str = "override") -> None:
    """
    Merge [KEY, VALUE, ...] into a config, in place. The value of a key that holds arguments of
    something else (MODEL.CLASSIFIER.OPTIONS) is a dict, or one as YAML: "{image_size: 32}".

    Args:
        source: where they were given, for messages.

    ValueError: a key that does not exist, or that of a group of options, overrides that are no
    pairs, or no dict.
    """
    opts = list(opts)
    if len(opts) % 2:
        raise ValueError(
            f"{source[0].upper()}{source[1:]}s must be pairs KEY VALUE, but there are {len(opts)}: "
            f"{opts}."
        )
    for i in range(0, len(opts), 2):
        node = _check_key(opts[i], cfg, source)
        if isinstance(node, CfgNode) and node.is_new_allowed():
            value = _parsed(opts[i + 1], f"{source}: {opts[i]}")
            if not isinstance(value, dict):
                raise ValueError(
                    f"{source}: {opts[i]} is {opts[i + 1]!r}: expected a dict, such as "
                    "'{name: value}'."
                )
            opts[i + 1] = CfgNode(value)
        elif isinstance(node, CfgNode):  # it would be replaced, and its other options lost
            raise ValueError(
                f"{source}: {opts[i]} holds several options ({', '.join(node)}): give each by "
                f"itself, such as {opts[i]}.{next(iter(node))}."
            )
    cfg.merge_from_list(opts)


def _parsed(value, source):
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is {value!r}: not YAML, {printable(str(error))}") from error


def check_device(cfg: CfgNode) -> None:
    """Raise ValueError if MODEL.DEVICE is a GPU, and there is none."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is '{cfg.MODEL.DEVICE}', but torch sees no GPU. Add the override: "
            "MODEL.DEVICE cpu"
        )


def split_overrides(values: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    Split what a command's option of many values has taken, which by argparse is all that follows
    it: (its own values, overrides), as ["a.jpg", "b.jpg"] and ["MODEL.DEVICE", "cpu"].
    """
    known = get_cfg()
    for i, value in enumerate(values):
        if value.split(".")[0] in known and not os.path.isfile(value):
            return list(values[:i]), list(values[i:])
    return list(values), []


def find_config(name: str, option: str) -> tuple[str, str]:
    """
    Return a config's file and, for a name of the model zoo, the address of its trained weights,
    if it has any; else "".

    Args:
        name: a config file, or the name of one that comes with mokd_det or with Detectron2's model
            zoo, such as "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml".
        option: where it was given, for messages.

    FileNotFoundError: neither.
    """
    if "://" in name or PathManager.isfile(name):
        return name, ""
    try:
        weights = model_zoo.get_checkpoint_url(name)
    except RuntimeError:  # no such name, or one without weights
        weights = ""
    try:
        return model_zoo.get_config_file(name), weights
    except RuntimeError as error:
        if shipped := _shipped_config(name):
            return shipped, weights
        raise FileNotFoundError(
            f"{option} '{name}' does not exist"
            + (
                ": it is a name of Detectron2's model zoo, but the installed Detectron2 came "
                "without the zoo's config files. Use one of configs/, or upstream's (INSTALL.md)."
                if weights
                else f" (looked in {os.getcwd()} and in Detectron2's model zoo)."
            )
        ) from error


def _shipped_config(name: str) -> str | None:
    """Return the file of a config that comes with mokd_det, by its name, also after "configs/"."""
    package = Path(__file__).parent.parent
    for folder in (package / "configs", package.parent / "configs"):  # a wheel's; a checkout's
        file = folder / name.removeprefix("configs/")
        if file.is_file():
            return str(file)
    return None


def stock_config(cfg: CfgNode, keep: Sequence[str] = ()) -> CfgNode:
    """
    Return the student's config as Detectron2 alone reads it: without the keys of mokd_det.

    Args:
        keep: keys of mokd_det that describe the student, which needs mokd_det all the same
            (:attr:`mokd_det.tasks.Task.stock_options`; a torchvision backbone and a Python config
            keep theirs anyhow).
    """
    stock = cfg.clone()
    stock.defrost()
    keep = [*keep]
    if cfg.MODEL.META_ARCHITECTURE == "LazyConfigDetector":
        keep.append("MODEL.LAZY_CONFIG")
    if "torchvision" in cfg.MODEL.BACKBONE.NAME:
        keep.append("MODEL.TORCHVISION")
    _remove_added(stock, get_cfg(), get_detectron2_cfg(), keep)
    return stock


def _remove_added(node, ours, theirs, keep, prefix="") -> None:
    """Remove what is in ``ours`` and not in ``theirs``; a user's own options are in neither."""
    for key in [key for key in node if key in ours and f"{prefix}{key}" not in keep]:
        if key not in theirs:
            del node[key]
        elif isinstance(node[key], CfgNode):
            _remove_added(node[key], ours[key], theirs[key], keep, f"{prefix}{key}.")


def _check_keys(loaded, cfg, source, prefix=""):
    for key, value in loaded.items():
        if key == "_BASE_":
            continue
        full = f"{prefix}{key}"
        node = _check_key(full, cfg, source)
        if isinstance(value, dict) and isinstance(node, CfgNode) and not node.is_new_allowed():
            _check_keys(value, cfg, source, f"{full}.")


def _check_key(key, cfg, source):
    node = cfg
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, CfgNode) or part not in node:
            if isinstance(node, CfgNode) and node.is_new_allowed():
                return node
            if cfg.key_is_deprecated(key) or cfg.key_is_renamed(key):
                return node  # Detectron2 has its own message for these
            if moved := next((MOVED[k] for k in MOVED if f"{key}.".startswith(f"{k}.")), ""):
                raise ValueError(f"{source}: there is no option {key} any more: {moved}.")
            close = difflib.get_close_matches(key, _all_keys(cfg), n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"{source}: there is no option {'.'.join(parts[: depth + 1])}.{hint}")
        node = node[part]
    return node


def _all_keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, CfgNode):
            yield from _all_keys(value, f"{prefix}{key}.")
