# Copyright (c) The mokd_det authors.
"""What a Python config (LazyConfig) may have. Whatever nothing reads is an error."""

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..config import get_cfg, merge_overrides
from ..registry import did_you_mean

REQUIRED = ("model", "train", "optimizer", "lr_multiplier", "dataloader")
DATALOADER = ("train", "test", "evaluator")
# Of ``train``: as in Detectron2's configs/common/train.py, and what our step and hooks have.
TRAIN: dict[str, Any] = {
    "output_dir": "./output",
    "init_checkpoint": "",
    "max_iter": 90000,
    "amp": {"enabled": False, "precision": "float16"},
    "checkpointer": {"period": 5000, "max_to_keep": 0},
    "eval_period": 5000,
    "log_period": 20,
    "device": "cuda",
    "seed": -1,
    "micro_batches": 1,
    "clip_gradients": {"clip_type": "", "clip_value": 1.0, "norm_type": 2.0},
    "ema_decay": 0.0,
    "non_finite_gradients": "raise",
    "max_skipped_steps": 10,
    "backbone": {"checkpointing": False, "compile": ""},
    "writers": ["json", "tensorboard"],
    "best_metric": "",
    "patience": 0,
}
# What of it has the meaning and the bounds of a YAML config's option.
IN_YAML = {
    "output_dir": "OUTPUT_DIR",
    "init_checkpoint": "MODEL.WEIGHTS",
    "max_iter": "SOLVER.MAX_ITER",
    "amp.enabled": "SOLVER.AMP.ENABLED",
    "amp.precision": "SOLVER.AMP.PRECISION",
    "checkpointer.period": "SOLVER.CHECKPOINT_PERIOD",
    "checkpointer.max_to_keep": "SOLVER.KEEP_CHECKPOINTS",
    "eval_period": "TEST.EVAL_PERIOD",
    "device": "MODEL.DEVICE",
    "seed": "SEED",
    "micro_batches": "SOLVER.MICRO_BATCHES",
    "clip_gradients.clip_type": "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
    "clip_gradients.clip_value": "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
    "clip_gradients.norm_type": "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
    "ema_decay": "SOLVER.EMA_DECAY",
    "non_finite_gradients": "SOLVER.NON_FINITE_GRADIENTS",
    "max_skipped_steps": "SOLVER.MAX_SKIPPED_STEPS",
    "backbone.checkpointing": "MODEL.BACKBONE.CHECKPOINTING",
    "backbone.compile": "MODEL.BACKBONE.COMPILE",
    "writers": "LOGGING.WRITERS",
    "best_metric": "TEST.BEST_METRIC",
    "patience": "TEST.PATIENCE",
}
# They are checked with the data sets, which ``model`` does not know.
OF_EVALUATION = ("best_metric", "patience")
# Without them, what else a node has would not be read.
SWITCHES = {"amp": "enabled", "clip_gradients": "clip_type"}
# The model is always a DistillationModel.
NOT_OF_MODEL = ("enabled", "meta_architecture")
# The value of this option is a dict.
ARGUMENTS = "MOKD.BALANCING.TORCHJD"


def filled(train: Any) -> dict[str, Any]:
    """Return ``train`` with defaults; ValueError for what nothing reads."""
    return _filled(plain(train), TRAIN, "train")


def _filled(given: Any, usual: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} is {given!r}: expected its options ({', '.join(usual)}).")
    for key in given:
        if key not in usual:
            raise ValueError(f"There is no option {name}.{key}. {did_you_mean(key, usual)}")
    switch = SWITCHES.get(name.removeprefix("train."))
    if switch and given and switch not in given:
        raise ValueError(
            f"{name}.{next(iter(given))} is given, but {name}.{switch} is not, and nothing reads "
            f"it then: add {switch}, or leave {name} out."
        )
    return {
        key: _filled(given.get(key, {}), value, f"{name}.{key}")
        if isinstance(value, dict)
        else given.get(key, value)
        for key, value in usual.items()
    }


def described(train: Mapping[str, Any], input_format: str, mokd: Mapping[str, Any]) -> CfgNode:
    """Return the options of ``model`` as those of a YAML config; ValueError: there is no such."""
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "LazyConfigDetector"
    cfg.INPUT.FORMAT = input_format
    cfg.SOLVER.STEPS = ()
    for key, value in _flat(filled(train)):
        if key in IN_YAML and key not in OF_EVALUATION:
            _set(cfg, IN_YAML[key], value)
    # The batch is the loader's, which is built later: here one that suits.
    if isinstance(cfg.SOLVER.MICRO_BATCHES, int) and cfg.SOLVER.MICRO_BATCHES > 0:
        cfg.SOLVER.IMS_PER_BATCH = comm.get_world_size() * cfg.SOLVER.MICRO_BATCHES
    if cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE:
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    else:  # no type of a YAML config
        cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = get_cfg().SOLVER.CLIP_GRADIENTS.CLIP_TYPE
    for key in NOT_OF_MODEL:
        if key in mokd:
            raise ValueError(
                f"model.{key} is {mokd[key]!r}, but MOKD.{key.upper()} is for YAML configs only: "
                "leave it out, or use a YAML config."
            )
    opts: list[Any] = ["MOKD.ENABLED", True]
    for key, value in _flat(plain(mokd), "MOKD"):
        opts += [key.upper(), value]
    merge_overrides(cfg, opts, "model")
    return cfg


def describe_evaluation(cfg: CfgNode, lazy: DictConfig, train: Mapping[str, Any]) -> None:
    """Set the data sets of a Python config in ``cfg``, and the options that need them."""
    is_evaluated = lazy.dataloader.get("evaluator") is not None
    for split in ("train", "test") if is_evaluated else ("train",):
        names = OmegaConf.select(lazy, f"dataloader.{split}.dataset.names") or ()
        cfg.DATASETS[split.upper()] = (names,) if isinstance(names, str) else tuple(names)
    for key in OF_EVALUATION:
        _set(cfg, IN_YAML[key], train[key])


def evaluated_tasks(lazy: DictConfig, student: nn.Module) -> list[str]:
    """
    Return the tasks that a COCOEvaluator on one data set gives results of ("bbox", ...), by its
    arguments or the student's heads; empty: another evaluator, or a detector of one's own.
    """
    names = OmegaConf.select(lazy, "dataloader.test.dataset.names")
    evaluator = lazy.dataloader.get("evaluator") or {}
    target = evaluator.get("_target_")
    is_coco = (locate(target) if isinstance(target, str) else target) is COCOEvaluator
    if not is_coco or not (isinstance(names, str) or names and len(names) == 1):
        return []
    if tasks := evaluator.get("tasks"):
        return list(tasks)
    if not isinstance(student, (GeneralizedRCNN, DenseDetector)):
        return []
    heads = getattr(student, "roi_heads", None)
    flags = {"segm": "mask_on", "keypoints": "keypoint_on"}
    return ["bbox", *(task for task, flag in flags.items() if getattr(heads, flag, False))]


def check_keys(lazy: DictConfig, source: str) -> None:
    """Raise ValueError for a config that lacks something, or has what nothing reads."""
    loaders: Any = lazy.get("dataloader")
    for key in REQUIRED:
        if not isinstance(lazy.get(key), DictConfig):
            raise ValueError(
                f"{source} has no '{key}': expected {', '.join(REQUIRED)}, each a dict or a call."
            )
    for key in map(str, lazy):
        if key not in REQUIRED:
            raise ValueError(
                f"{source} has '{key}', which nothing reads: expected {', '.join(REQUIRED)}. "
                + _instead(key, lazy[key])
            )
    for key in loaders:
        if key not in DATALOADER:
            raise ValueError(
                f"{source} has 'dataloader.{key}', which nothing reads: expected "
                f"{', '.join(DATALOADER)}. {did_you_mean(key, DATALOADER)}"
            )
    is_evaluated = loaders.get("evaluator") is not None
    for key in DATALOADER[: 2 if is_evaluated else 1]:
        if loaders.get(key) is None:
            raise ValueError(f"{source} has no 'dataloader.{key}': add it.")
    if lazy.train.best_metric and not is_evaluated:
        raise ValueError(
            f"{source} has train.best_metric '{lazy.train.best_metric}', but no "
            "'dataloader.evaluator' that measures it: add one, or leave best_metric out."
        )
    if not isinstance(lazy.optimizer.get("params"), DictConfig):
        raise ValueError(
            f"{source} has no 'optimizer.params': expected "
            "L(detectron2.solver.build.get_default_optimizer_params)(...), which gets the model."
        )
    period = lazy.train.log_period
    if not isinstance(period, int) or isinstance(period, bool) or period < 1:
        raise ValueError(f"train.log_period is {period!r}: expected an integer, 1 or more.")
    for key in REQUIRED:
        _check_arguments(lazy[key], key)


def _instead(key: str, value: Any) -> str:
    """Return what to write instead of a key that stands beside ``model``."""
    name = key.upper()
    if name not in get_cfg():
        own = f"A dict of yours that these are made of gets a name that begins with '_': _{key}."
        return f"{did_you_mean(key, REQUIRED)} {own}"
    leaf = next((k.upper() for k, _ in _flat({name: plain(value)})), name)
    places = {option: f"train.{place}" for place, option in IN_YAML.items()}
    if leaf in places or leaf.startswith("MOKD."):
        return f"{leaf} is {places.get(leaf, leaf.lower().replace('mokd', 'model', 1))} here."
    return (
        f"Model, optimizer, schedule and data are calls here; to set {leaf}, use a YAML config "
        "(--config-file X.yaml)."
    )


def _check_arguments(config: Any, name: str) -> None:
    """Raise ValueError for a call with an argument that its target does not have."""
    if isinstance(config, ListConfig):
        for index, part in enumerate(config):
            _check_arguments(part, f"{name}[{index}]")
    if not isinstance(config, DictConfig):
        return
    given = [str(key) for key in config if key != "_target_"]
    target = config.get("_target_")
    known = _parameters(target)
    for key in given:
        if known is not None and key not in known:
            raise ValueError(
                f"{name} has '{key}', which {getattr(target, '__name__', target)} does not take. "
                f"{did_you_mean(key, known)}"
            )
        _check_arguments(config[key], f"{name}.{key}")


def _parameters(target: Any) -> Iterable[str] | None:
    """Return the names of what a callable, or its name, takes; None: any, or it does not say."""
    with contextlib.suppress(ValueError, TypeError, ImportError):
        found = inspect.signature(locate(target) if isinstance(target, str) else target).parameters
        if all(p.kind is not p.VAR_KEYWORD for p in found.values()):
            return list(found)
    return None


def plain(value: Any) -> Any:
    """Return a config, or what a dict has of configs, as Python's own dicts and lists."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (full key, value)."""
    for key, value in node.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict) and value and name.upper() != ARGUMENTS:
            yield from _flat(value, name)
        else:
            yield name, value


def _set(cfg: CfgNode, key: str, value: Any) -> None:
    *nodes, last = key.split(".")
    functools.reduce(getattr, nodes, cfg)[last] = value
