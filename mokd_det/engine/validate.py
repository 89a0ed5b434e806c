# Copyright (c) The mokd_det authors.
"""
Every check that needs no data and no weights, in the order in which a user can fix them. Each
check itself lives where its option is read; this is the one place that calls them.
"""

from collections.abc import Iterable, Iterator

from detectron2.config import CfgNode

from ..balancing import RULES, TORCHJD_PREFIX
from ..config import get_cfg
from ..config.bounds import check_bounds
from ..modeling import check_acceleration, check_balancing
from ..objectives import OBJECTIVES
from ..tasks import TASKS, Task, task_of
from .bounds import BOUNDS
from .combinations import OF_DISTILLATION, OF_MODELS, OF_TRAINING, check_batch, check_combinations
from .tracking import check_installed

# Of a config what its model alone needs.
SECTIONS = ("MODEL", "INPUT", "DATASETS", "DATALOADER", "TEST", "SEED", "OUTPUT_DIR", "VIS_PERIOD")
OF_TEACHER = "MOKD.TEACHER.CONFIG_FILE, or OPTS: "

# Rules of version 0.1, and what is nearest to them.
GONE = {
    **dict.fromkeys(("aligned", "anchored", "constant_dominance", "look_ahead"), "'loss_ratio'"),
    "imtl_g": "'torchjd.IMTLG'",
    "protected_min_norm": "'min_norm', which lets a small gradient dominate, or 'loss_ratio'",
}


def validate(cfg: CfgNode, is_training: bool = True) -> Task:
    """
    Check a config before anything is read or built; return the task of its student. ValueError,
    FileNotFoundError, ImportError: an option that is out of its range, that nobody reads, or that
    does not go together with others; a file that does not exist.

    Args:
        is_training: False: the model alone is used, so only what is read then is checked.
    """
    usual = get_cfg()
    check_bounds(cfg, BOUNDS, usual, SECTIONS, "")
    check_combinations(cfg, [OF_MODELS])
    task = task_of(cfg)
    if not is_training:
        return task
    check_bounds(cfg, BOUNDS, usual, ["SOLVER", "LOGGING"], "")
    check_combinations(cfg, [OF_TRAINING])
    check_batch(cfg)
    check_installed(cfg.LOGGING.WRITERS)
    _check_kind(cfg, task)
    _check_precise_bn(cfg, task)
    check_acceleration(cfg)
    if cfg.MOKD.ENABLED:
        _check_distillation(cfg, task)
    task.check_config(cfg)
    if cfg.MOKD.ENABLED and not cfg.MOKD.TEACHER.TORCHSCRIPT.FILE:
        teacher_cfg = task.teacher_config(cfg)
        check_bounds(teacher_cfg, BOUNDS, usual, SECTIONS, OF_TEACHER)
        check_combinations(teacher_cfg, [OF_MODELS], OF_TEACHER)
    return task


def _check_distillation(cfg: CfgNode, task: Task) -> None:
    check_bounds(cfg, BOUNDS, get_cfg(), ["MOKD"], "")
    _check_objectives(cfg, task)
    _check_read(cfg, task)
    check_combinations(cfg, [OF_DISTILLATION])
    check_balancing(cfg, task)
    for name in task.objectives(cfg):
        OBJECTIVES.get(name).check_config(cfg)


def _check_kind(cfg: CfgNode, task: Task) -> None:
    """Options of the other kinds of models."""
    default = get_cfg()
    for other in map(TASKS.get, TASKS):
        for option in sorted(other.all_options() - task.all_options()):
            if not cfg.MOKD.ENABLED and option.startswith("MOKD."):
                continue
            for key, value, usual in _changed(option, cfg, default):
                raise ValueError(
                    f"{key} is {value!r}, but it is read for {other.name} only, and "
                    f"MODEL.META_ARCHITECTURE '{cfg.MODEL.META_ARCHITECTURE}' is a model for "
                    f"{task.name}: {_undo(usual)}."
                )


def _check_objectives(cfg: CfgNode, task: Task) -> None:
    names = list(task.objectives(cfg))
    if len(set(names)) < len(names):
        raise ValueError(f"MOKD.OBJECTIVES is {names}: expected each name once.")
    known = ", ".join(map(repr, OBJECTIVES))
    if not names:
        raise ValueError(
            "MOKD.ENABLED is True, but MOKD.OBJECTIVES is empty: name what is distilled, such as "
            f"['features'] (known are {known}), or set MOKD.ENABLED False."
        )
    for name in names:
        if name not in OBJECTIVES:
            raise ValueError(
                f"MOKD.OBJECTIVES is {names}, but there is no objective '{name}': known are "
                f"{known}."
            )
        kinds = OBJECTIVES.get(name).tasks
        if not task.is_one_of(kinds):
            fitting = [n for n in OBJECTIVES if task.is_one_of(OBJECTIVES.get(n).tasks)]
            raise ValueError(
                f"MOKD.OBJECTIVES has '{name}', which is for {' and '.join(kinds)}, and "
                f"MODEL.META_ARCHITECTURE '{cfg.MODEL.META_ARCHITECTURE}' is a model for "
                f"{task.name}: use one of {', '.join(map(repr, fitting))}."
            )


def _check_read(cfg: CfgNode, task: Task) -> None:
    """Options of rules and objectives that are not chosen: nobody reads them."""
    default = get_cfg()
    rule = cfg.MOKD.BALANCING.RULE
    if rule in GONE:
        raise ValueError(
            f"MOKD.BALANCING.RULE '{rule}' of version 0.1 is gone: use {GONE[rule]}. There are "
            f"{', '.join(map(repr, RULES))} and 'torchjd.X'."
        )
    nodes = {f"MOKD.BALANCING.{n.upper()}": n for n in RULES if n != rule}
    if not rule.startswith(TORCHJD_PREFIX):
        nodes["MOKD.BALANCING.TORCHJD"] = "torchjd.X"
    for node, other in nodes.items():
        for key, value, usual in _changed(node, cfg, default):
            raise ValueError(
                f"{key} is {value!r}, but it is read by rule '{other}' only, and "
                f"MOKD.BALANCING.RULE is '{rule}': {_undo(usual)}; or choose that rule."
            )
    names = list(task.objectives(cfg))
    for other in [n for n in OBJECTIVES if n not in names]:
        fits = task.is_one_of(OBJECTIVES.get(other).tasks)
        for key, value, usual in _changed(f"MOKD.{other.upper()}", cfg, default):
            remedy = f"; or add '{other}' there" if fits else _instead(key, other, task)
            raise ValueError(
                f"{key} is {value!r}, but it is read by the objective '{other}' only, and "
                f"MOKD.OBJECTIVES is {names}: {_undo(usual)}{remedy}."
            )


def _undo(usual: object) -> str:
    """A command line cannot remove what its config file has."""
    return "remove it" if usual is None else f"remove it, or set it to {usual!r} (the default)"


def _instead(key: str, other: str, task: Task) -> str:
    """Say which objectives for this task, comparing what the other one does, have the option."""
    option, compared = key.split(".")[2], OBJECTIVES.get(other).compares_classes
    fitting = [n for n in OBJECTIVES if task.is_one_of(OBJECTIVES.get(n).tasks)]
    names = [n for n in fitting if OBJECTIVES.get(n).compares_classes == compared]
    same = [f"MOKD.{n.upper()}.{option}" for n in names if option in get_cfg().MOKD[n.upper()]]
    return f"; for {task.name} there is {', '.join(same)}" if same else ""


def _check_precise_bn(cfg: CfgNode, task: Task) -> None:
    if not cfg.TEST.PRECISE_BN.ENABLED or not needs_own_step(cfg):
        return
    if not task.is_one_of(["classification"]):
        raise ValueError(
            "TEST.PRECISE_BN.ENABLED True is for classifiers in the distillation trainer: heads of "
            "detectors use one BatchNorm for several levels. Set it to False, or compute the "
            "statistics of the finished student (its checkpoint is stock)."
        )
    others = {
        "SOLVER.EMA_DECAY": cfg.SOLVER.EMA_DECAY,
        "MODEL.BACKBONE.COMPILE": cfg.MODEL.BACKBONE.COMPILE,
    }
    if used := [f"{key} {value}" for key, value in others.items() if value]:
        raise ValueError(
            f"TEST.PRECISE_BN.ENABLED True and {used[0]} exclude each other: the statistics would "
            "be those of other weights, or of a compiled graph. Leave one of them out."
        )


def needs_own_step(cfg: CfgNode) -> bool:
    """Return whether a config needs the distillation trainer: Detectron2's does not know it."""
    amp = cfg.SOLVER.AMP
    return bool(
        cfg.MOKD.ENABLED
        or not task_of(cfg).has_stock_step
        or cfg.DATALOADER.RESUMABLE
        or cfg.SOLVER.MICRO_BATCHES != 1
        or cfg.SOLVER.EMA_DECAY
        or cfg.SOLVER.NON_FINITE_GRADIENTS != "raise"
        or (amp.ENABLED and amp.PRECISION != "float16")
        or cfg.MODEL.BACKBONE.CHECKPOINTING
        or cfg.MODEL.BACKBONE.COMPILE
    )


def _changed(option: str, cfg: CfgNode, default: CfgNode) -> Iterator[tuple[str, object, object]]:
    """Yield what is at or below an option and not as by default: (full key, value, default)."""
    value, usual = cfg, default
    for part in option.split("."):
        value, usual = value[part], usual.get(part)
    if isinstance(value, CfgNode):
        for key in value:
            yield from _changed(f"{option}.{key}", cfg, default)
    elif not _equal(value, usual):
        yield option, value, usual


def _equal(value, default) -> bool:
    # YAML has lists where a default is a tuple.
    is_row = isinstance(value, Iterable) and not isinstance(value, str)
    return list(value) == list(default) if is_row and default is not None else value == default
