# Copyright (c) The mokd_det authors.
"""
Whose code may run. A Python config is a program, and a ``_target_`` in a config is a call: both run
if they come from an installed package, or if the user has said so (``--trust``). A TorchScript file
is a program, too (:func:`mokd_det.untrusted.check_torchscript`).
"""

import importlib.util
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig
from detectron2.utils.file_io import PathManager
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError, safe_load

from ..untrusted import printable

# Their classes are what models are built of. Their functions are no parts of a model: some load
# pickles, or compile what they are given.
BUILDS_MODELS = (
    "detectron2.layers",
    "detectron2.modeling",
    "detectron2.projects",
    "detectron2.structures",
    "fvcore.nn",
    "mokd_det.modeling",
    "torch.nn",
    "torchvision.models",
    "torchvision.ops",
)
# In these, but a door to another library, which resolves names itself.
NOT_THESE = ("detectron2.modeling.mmdet_wrapper",)
# The functions that Detectron2's own configs of models call.
BUILDERS = tuple(
    f"detectron2.modeling.backbone.resnet.ResNet.{name}"
    for name in ("make_stage", "make_default_stages")
)

_state = {"trusted": False}


def trust_files(trusted: bool = True) -> None:
    """Let the code in config files run, in this process, as ``--trust`` of every command does."""
    _state["trusted"] = trusted


def is_trusted() -> bool:
    return _state["trusted"]


def read_lazy_config(path: str, option: str) -> DictConfig:
    """
    Return Detectron2's LazyConfig of a .py or .yaml file. ValueError: it would run code of its own,
    and nobody trusts it; or it cannot be read. ``option``: where the file was named, for messages.
    """
    name = f"{option} '{path}'"
    if is_trusted() or (path.endswith(".py") and _is_installed(path)):
        try:
            return LazyConfig.load(path)
        except SyntaxError as error:  # Detectron2's says not where
            raise ValueError(f"{name} is no valid Python: {error.__cause__ or error}.") from error
    if path.endswith(".py"):
        raise ValueError(
            f"{name} is a Python config, and using it runs the code in it. Read it, and if you "
            "trust it add --trust (in Python: mokd_det.config.trust_files()). Configs of the "
            "installed Detectron2 need none."
        )
    try:
        with PathManager.open(path) as file:
            return OmegaConf.create(safe_load(file), flags={"allow_objects": True})
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{name} cannot be read without running code in it: {printable(str(error))[:300]}. "
            "Read it, and if you trust it add --trust."
        ) from error


def check_targets(config: Any, source: str) -> None:
    """
    Raise ValueError if building ``config`` would call what is no part of models: a ``_target_`` by
    name that is no class of ``BUILDS_MODELS``. Nothing is imported to find that out but these.

    Args:
        source: what the config is of, for messages.
    """
    if is_trusted():
        return
    for key, target in _targets(config):
        # An object is of a Python config, which is trusted already.
        if isinstance(target, (str, DictConfig, dict)) and not _builds_models(target):
            raise ValueError(
                f"{source}: {key}._target_ is {target!r:.200}, and building the model would call "
                f"it. Without --trust only classes of {', '.join(BUILDS_MODELS)} are called: if "
                "you trust the file, add --trust (in Python: mokd_det.config.trust_files())."
            )


def _targets(config: Any, key: str = "model") -> Iterator[tuple[str, Any]]:
    if isinstance(config, (DictConfig, dict)):
        if "_target_" in config:
            yield key, config["_target_"]
        for name in config:
            yield from _targets(config[name], f"{key}.{printable(str(name))}")
    elif isinstance(config, (ListConfig, list, tuple)):
        for index, item in enumerate(config):
            yield from _targets(item, f"{key}[{index}]")


def _builds_models(target: Any) -> bool:
    parts = BUILDS_MODELS
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", target):
        return False  # parts that begin with _ are no public names
    if not _is_in(target, [part.split(".")[0] for part in parts]):
        return False
    try:
        found = locate(target)
    except Exception:  # whatever importing it says, it is not there to be called
        return False
    module = str(getattr(found, "__module__", ""))
    if not inspect.isclass(found):
        return f"{module}.{getattr(found, '__qualname__', '')}" in BUILDERS
    return _is_in(module, parts) and not _is_in(module, NOT_THESE)


def _is_in(name, packages):
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def _is_installed(path: str) -> bool:
    """Whether a file is part of the installed Detectron2 or mokd_det."""
    specs = map(importlib.util.find_spec, ("detectron2", "mokd_det"))
    folders = [f for spec in specs if spec for f in spec.submodule_search_locations or ()]
    # An editable Detectron2 has its zoo behind a link of its own.
    files = Path(os.path.abspath(path)), Path(os.path.realpath(path))
    return any(file.is_relative_to(folder) for file in files for folder in folders)
