# Copyright (c) The mokd_det authors.
"""Reading configs: with our options, without unsafe YAML, and with errors that help."""

import difflib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.utils.file_io import PathManager

from ..untrusted import printable
from .defaults import add_mokd_config
from .paths import SHIPPED, LocatedConfig, config_path, shipped_config

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
    config_file: str,
    opts: Sequence[Any] = (),
    option: str = "--config-file",
    overrides: str = "override",
) -> CfgNode:
    """
    Args:
        config_file: a YAML file, with any prefix that Detectron2 resolves, or the name of one that
            comes with mokd_det, "COCO-Detection/..." or "mokd://COCO-Detection/...". What lies
            beside it is found from any folder. Empty: defaults.
        opts: overrides [KEY, VALUE, ...].
        option, overrides: where the file name and ``opts`` were given, for messages.

    Returns:
        Not frozen.

    FileNotFoundError: no such file. ValueError: a key that does not exist (with the closest that
    do), unsafe or broken YAML, or overrides that are no pairs.
    """
    cfg = get_cfg()
    if config_file:
        config_file = config_path(config_file)
        is_shipped = config_file.startswith(SHIPPED)  # and was not found
        if is_shipped or ("://" not in config_file and not PathManager.isfile(config_file)):
            raise FileNotFoundError(f"{option} '{config_file}' does not exist.")
        if config_file.endswith(".py"):
            raise ValueError(
                f"{option} '{config_file}' is a Python config (LazyConfig), and a YAML file is "
                "expected here: mokd train takes it; as a model alone it goes into "
                "MODEL.LAZY_CONFIG.FILE."
            )
        _merge_file(cfg, config_file, f"{option} '{config_file}'")
    merge_overrides(cfg, opts, overrides)
    return cfg


def _merge_file(cfg: CfgNode, config_file: str, source: str) -> None:
    loaded = _read_yaml(config_file, source)
    version = loaded.get("VERSION", cfg.VERSION)
    if version == cfg.VERSION:
        cfg.merge_from_other_cfg(CfgNode(_fitted(loaded, cfg, cfg, source)))
        return
    try:  # Detectron2 upgrades older ones
        cfg.merge_from_file(config_file, allow_unsafe=False)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: VERSION is {version!r}, and Detectron2 cannot read that as an older config "
            f"of its own ({error}): expected {cfg.VERSION}."
        ) from error


def _read_yaml(config_file: str, source: str) -> dict[str, Any]:
    """Return what a file and its bases hold."""
    try:
        loaded = LocatedConfig.load_yaml_with_base(config_file, allow_unsafe=False)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{source} (or its _BASE_) holds YAML that runs Python code, which is never loaded: "
            f"{error.problem}. Spell the values out; for Detectron2's RetinaNet base that is "
            "MODEL.ANCHOR_GENERATOR.SIZES, as in configs/Quick-Start/student_retinanet.yaml."
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(
            f"{source} (or its _BASE_) is not valid YAML: {error}{_hint_at_tuples(error)}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} (or its _BASE_) is no text in UTF-8: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{source}: its _BASE_ leads back to itself.") from error
    except (AssertionError, AttributeError, OSError, TypeError) as error:
        raise ValueError(
            f"{source} is empty or cannot be read, or its _BASE_ is missing or does not fit: "
            f"{error}"
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{source} holds no options.")
    if found := next(_cut_tuples(loaded), None):
        raise ValueError(f"{source} (or its _BASE_): {found!r} is half a tuple. {NO_TUPLES}")
    return loaded


# Python's (640, 672) is a string in YAML, which Detectron2 reads as a tuple; but not here.
NO_TUPLES = "In YAML's {...} and [...] a comma ends a value: write [1, 2] there, not (1, 2)."


def _cut_tuples(value: Any) -> Iterator[str]:
    """Yield the keys and values that a comma in "{KEY: (1, 2)}" or "[(1, 2)]" has made."""
    if isinstance(value, dict):
        yield from _cut_tuples([*value, *value.values()])
    elif isinstance(value, list):
        for part in value:
            yield from _cut_tuples(part)
    elif isinstance(value, str) and value.startswith("(") and value.count("(") > value.count(")"):
        yield value


def _hint_at_tuples(error: yaml.YAMLError) -> str:
    in_flow_style = "while parsing a flow" in str(error)
    return f"\n{NO_TUPLES}" if in_flow_style else ""


def merge_overrides(cfg: CfgNode, opts: Sequence[Any], source: str = "override") -> None:
    """
    Merge [KEY, VALUE, ...] into a config, in place. The value of a key that holds arguments of
    something else (MODEL.CLASSIFIER.OPTIONS) is a dict, or one as YAML: "{image_size: 32}".

    Args:
        source: where they were given, for messages.

    ValueError: a key that does not exist, or that of a group of options, overrides that are no
    pairs, or a value of another type.
    """
    opts = list(opts)
    if len(opts) % 2:
        raise ValueError(
            f"{source[0].upper()}{source[1:]}s must be pairs KEY VALUE, but there are {len(opts)}: "
            f"{opts}."
        )
    for i in range(0, len(opts), 2):
        key, value = opts[i : i + 2]
        if not isinstance(key, str):
            raise ValueError(f"{source}: {key!r} is no option: expected KEY VALUE, from {opts}.")
        node = _check_key(key, cfg, source)
        if isinstance(node, CfgNode) and node.is_new_allowed():
            opts[i + 1] = CfgNode(_arguments(key, value, cfg, source))
        elif isinstance(node, CfgNode):  # it would be replaced, and its other options lost
            raise ValueError(
                f"{source}: {key} holds several options ({', '.join(node)}): give each by "
                f"itself, such as {key}.{next(iter(node))}."
            )
        else:
            opts[i + 1] = _fitted(value, node, cfg, source, key)
    cfg.merge_from_list(opts)


def _arguments(key: str, value: Any, cfg: CfgNode, source: str) -> dict[str, Any]:
    """Return the dict of a node that takes any keys."""
    expected = "expected a dict, such as '{name: value}'"
    try:
        value = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise ValueError(
            f"{source}: {key} is {value!r}, which is not valid YAML: {expected} "
            f"({printable(str(error))})."
        ) from error
    if isinstance(value, dict) and not all(isinstance(x, str) and x.isidentifier() for x in value):
        raise ValueError(
            f"{source}: {key} is {value}: expected names as keys. (In YAML lists are [1, 2]; there "
            "are no tuples.)"
        )
    node: Any = cfg
    for part in key.split("."):
        node = node.get(part) if isinstance(node, CfgNode) else None
    if not isinstance(value, dict) or node is None:
        whole = key if node is not None else key.rsplit(".", 1)[0]
        raise ValueError(f"{source}: {key} is {value!r}: {expected}, for {whole}.")
    return _fitted(value, node, cfg, source, key)


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
    if (not name.startswith(SHIPPED) and "://" in name) or PathManager.isfile(name):
        return name, ""
    try:
        weights = model_zoo.get_checkpoint_url(name.removeprefix(SHIPPED))
    except RuntimeError:  # no such name, or one without weights
        weights = ""
    if name.startswith(SHIPPED):
        if (shipped := shipped_config(name)) is None:
            raise FileNotFoundError(f"{option} '{name}' is no config that comes with mokd_det.")
        return shipped, weights
    if shipped := shipped_config(name):  # with plain numbers, where upstream's base computes them
        return shipped, weights
    try:
        return model_zoo.get_config_file(name), weights
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{option} '{name}' does not exist"
            + (
                ": it is a name of Detectron2's model zoo, but the installed Detectron2 came "
                "without the zoo's config files. Use one of configs/, or upstream's "
                "(docs/install.md)."
                if weights
                else f" (looked in {os.getcwd()} and in Detectron2's model zoo)."
            )
        ) from error


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


# What a config can hold.
PLAIN = (tuple, list, str, int, float, bool, type(None))
IN_WORDS = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list, such as [1, 2] or ('name',)",
}
IN_WORDS[tuple] = IN_WORDS[list]


def _fitted(value: Any, usual: Any, cfg: CfgNode, source: str, key: str = "") -> Any:
    """
    Return a value, or all of a node, in the type of its default: an integer becomes a float.
    ValueError: a key that does not exist, or another type.
    """
    if isinstance(usual, CfgNode):
        if not isinstance(value, dict):
            several = f" ({', '.join(usual)})" if usual else ""
            raise ValueError(f"{source}: {key} is {value!r}: expected its options{several}.")
        return {
            name: _fitted(x, *_place(name, usual, cfg, source, key)) for name, x in value.items()
        }
    decoded = _decoded(value)
    if type(decoded) is int and isinstance(usual, float):
        return float(decoded)
    # Null is another matter: whether it may be one is not a question of type.
    fits = decoded is None or type(decoded) is type(usual) or (usual is None)
    if not fits and {type(decoded), type(usual)} != {list, tuple} or type(decoded) not in PLAIN:
        expected = IN_WORDS.get(type(usual), "a plain value")
        raise ValueError(f"{source}: {key} is {value!r}: expected {expected}.")
    return value


def _place(name: Any, usual: CfgNode, cfg: CfgNode, source: str, prefix: str) -> tuple:
    """The other arguments of :func:`_fitted` for what is called ``name`` in a node."""
    if not isinstance(name, str):
        raise ValueError(f"{source}: there is no option {prefix}.{name}: its name is no string.")
    key = f"{prefix}.{name}" if prefix else name
    if usual.is_new_allowed():
        return usual.get(name), cfg, source, key
    return _check_key(key, cfg, source), cfg, source, key


def _decoded(value: Any) -> Any:
    """What Detectron2 makes of a value: strings may be Python literals."""
    try:
        return CfgNode._decode_cfg_value(value) if isinstance(value, str) else value
    except (TypeError, MemoryError, RecursionError):  # of literals that cannot be
        return value


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
            if parts[0] == "MOKD" and (depth == 1 or parts[1] == "BALANCING"):
                hint += " An option of your own rule or objective: import its module (--import)."
            unknown = printable(".".join(parts[: depth + 1]))
            raise ValueError(f"{source}: there is no option {unknown}.{hint}")
        node = node[part]
    return node


def _all_keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, CfgNode):
            yield from _all_keys(value, f"{prefix}{key}.")
