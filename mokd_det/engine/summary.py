# Copyright (c) The mokd_det authors.
"""What a run is about to do, as a person can check it, and what one does with its student."""

import datetime
import json
import logging
import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.common import MapDataset
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.utils import comm
from torch import nn

from ..config import is_trusted
from ..data import ResumableLoader, known_class_names, trained_class_names
from ..evaluation import count_parameters
from ..files import replace_file
from ..tasks import task_of

logger = logging.getLogger(__name__)

FILE = "summary.json"
STEPS = 10  # after which the time that is left is known


def summary_of(
    cfg: CfgNode, step: SimpleTrainer, first: int, evaluated_on: Sequence[str] = ()
) -> dict[str, Any]:
    """
    Return what a run is going to do from iteration ``first`` on: ``student`` and ``teacher``
    (None: there is none), each with ``model``, ``parameters``, ``classes`` and ``weights``;
    ``objectives`` with their matched ``levels``, ``rule``, ``data``, ``iterations``, ``device``.
    ``evaluated_on``: default DATASETS.TEST.
    """
    model: Any = step.model
    model = getattr(model, "module", model)
    student = getattr(model, "student", model)  # Detectron2's own step has the model itself
    images = _count_images(step.data_loader)
    batch, iterations = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER
    return {
        "student": {
            **_side(cfg, student),
            "trained": sum(p.numel() for p in student.parameters() if p.requires_grad),
            "weights": _initial_weights(cfg),
        },
        "teacher": _teacher(cfg, model) if cfg.MOKD.ENABLED else None,
        "objectives": {
            name: [[level.student, level.teacher] for level in objective.levels]
            for name, objective in (model.objectives.items() if cfg.MOKD.ENABLED else ())
        },
        "rule": cfg.MOKD.BALANCING.RULE if cfg.MOKD.ENABLED else None,
        "measured_at": cfg.MOKD.BALANCING.MEASURE_AT if cfg.MOKD.ENABLED else None,
        "data": list(cfg.DATASETS.TRAIN),
        "images": images,
        "images_per_step": batch,
        "first_iteration": first,
        "iterations": iterations,
        "epochs": images and iterations * batch / images,
        "evaluated_on": list(evaluated_on or cfg.DATASETS.TEST),
        "evaluated_every": cfg.TEST.EVAL_PERIOD,
        "device": cfg.MODEL.DEVICE,
        "processes": comm.get_world_size(),
    }


def say_summary(
    cfg: CfgNode, step: SimpleTrainer, first: int, evaluated_on: Sequence[str] = ()
) -> None:
    """
    Log the summary of a run, see :func:`summary_of`, and write it to its folder; to be called by
    the main process.
    """
    summary = summary_of(cfg, step, first, evaluated_on)
    text = json.dumps(summary, indent=2).encode()
    replace_file(os.path.join(cfg.OUTPUT_DIR, FILE), lambda f: f.write(text))
    logger.info(f"The run:\n{format_summary(summary, cfg.OUTPUT_DIR)}")


def format_summary(summary: dict[str, Any], output_dir: str) -> str:
    """Return the summary as lines of text."""
    teacher, levels = summary["teacher"], summary["objectives"]
    lines = {"student" if teacher else "model": _described(summary["student"])}
    if teacher:
        lines["teacher"] = _described(teacher)
        lines["objectives"] = ", ".join(
            name + (f" ({', '.join(' -> '.join(pair) for pair in pairs)})" if pairs else "")
            for name, pairs in levels.items()
        )
        lines["rule"] = f"{summary['rule']}, gradients measured at {summary['measured_at']}"
    images = f", {summary['images']} images" if summary["images"] else ""
    names = ", ".join(summary["data"]) or "of its own loader"
    lines["data"] = f"{names}{images}; {summary['images_per_step']} a step"
    epochs = f" ({summary['epochs']:.3g} epochs)" if summary["epochs"] else ""
    first = summary["first_iteration"]
    lines["length"] = f"{summary['iterations']} iterations{epochs}"
    lines["length"] += f", from iteration {first} on" if first else ""
    every = summary["evaluated_every"]
    when = f"every {every} iterations and at the end" if every else "at the end"
    sets = ", ".join(summary["evaluated_on"])
    lines["evaluation"] = f"{sets}, {when}" if sets else "none (DATASETS.TEST is empty)"
    count = summary["processes"]
    lines["device"] = f"{summary['device']}, {count} process{'es' if count > 1 else ''}"
    lines["output"] = f"{output_dir} (log.txt, config.yaml, {FILE})"
    return "\n".join(f"  {name:11}{text}" for name, text in lines.items())


def next_steps(
    config_file: str,
    opts: Sequence[str],
    output_dir: str,
    weights: str,
    imports: Sequence[str] = (),
    student: str = "",
) -> str:
    """
    Return lines on what one does with a trained model: ``opts`` and ``imports`` are those of its
    training. ``student``: of a Python config, which only training takes, the YAML config for the
    other commands; they are not named if it has none.
    """
    flags = ["--trust"] * is_trusted()
    flags += [flag for name in imports for flag in ("--import", name)]
    config = [*flags, "--config-file", config_file]
    if is_python := config_file.endswith(".py"):
        evaluated = [opt for opt in opts if not opt.startswith("train.init_checkpoint=")]
        value = weights if re.fullmatch(r"[\w/.-]+", weights) else repr(weights)  # Hydra's syntax
        evaluated.append(f"train.init_checkpoint={value}")
        used, given = [*flags, "--config-file", student], []
    else:
        pairs = [pair for pair in zip(opts[::2], opts[1::2]) if pair[0] != "MODEL.WEIGHTS"]
        used, given = config, [str(part) for pair in pairs for part in pair]
        evaluated = [*given, "MODEL.WEIGHTS", weights]
    export = ["--format", "torchscript", "--output", os.path.join(output_dir, "export")]
    steps = {"evaluate": ["train", *config, "--eval-only", *evaluated]}
    if student or not is_python:
        steps["export"] = ["export", *used, *export, *given, "MODEL.WEIGHTS", weights]
        steps["predict"] = ["predict", *used, "--weights", weights, "PHOTO...", *given]
    steps["report"] = ["report", output_dir]
    return f"Trained: {weights}. What now:\n" + "\n".join(
        f"  {name:9} {shlex.join(['mokd', *words])}" for name, words in steps.items()
    )


class ExpectedTime(HookBase):
    """Says after some steps how long the run takes: Detectron2's own lines are of each moment."""

    def after_step(self) -> None:
        trainer = self.trainer
        left = trainer.max_iter - trainer.iter - 1
        if trainer.iter != trainer.start_iter + STEPS or left <= 0:
            return
        seconds = trainer.storage.history("time").median(STEPS)
        rest = datetime.timedelta(seconds=round(left * seconds))
        end = datetime.datetime.now() + rest
        logger.info(
            f"A step takes {seconds:.3g} s: {left} more take {rest}, until {end:%b %d, %H:%M}, and "
            "evaluations besides."
        )


def _side(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    return {
        "model": _model_name(cfg, model),
        "parameters": count_parameters(model),
        "classes": known_class_names(cfg),
    }


def _teacher(cfg: CfgNode, model: Any) -> dict[str, Any]:
    if script := cfg.MOKD.TEACHER.TORCHSCRIPT.FILE:
        count = count_parameters(model.teacher.model)
        return {"model": "TorchScript", "parameters": count, "classes": None, "weights": script}
    teacher_cfg = task_of(cfg).teacher_config(cfg)
    weights = teacher_cfg.MODEL.WEIGHTS or cfg.MOKD.TEACHER.WEIGHTS
    side = _side(teacher_cfg, model.teacher.model)
    side["classes"] = trained_class_names(weights, "MOKD.TEACHER.WEIGHTS") or side["classes"]
    return {**side, "weights": weights}


def _model_name(cfg: CfgNode, model: nn.Module) -> str:
    name = cfg.MODEL.META_ARCHITECTURE
    if name == "LazyConfigDetector" and not cfg.MODEL.LAZY_CONFIG.FILE:  # of a Python config
        return f"{type(model).__name__}, {type(model.backbone).__name__}"
    inner = {
        "Classifier": cfg.MODEL.CLASSIFIER.NAME,
        "TorchvisionDetector": cfg.MODEL.TORCHVISION_DETECTOR.NAME,
        "LazyConfigDetector": cfg.MODEL.LAZY_CONFIG.FILE,
    }
    return f"{name}, {inner.get(name, cfg.MODEL.BACKBONE.NAME)}"


def _initial_weights(cfg: CfgNode) -> str:
    """Return what names the student's first weights; "" if it starts from random ones."""
    detector = cfg.MODEL.TORCHVISION_DETECTOR
    names = (
        cfg.MODEL.WEIGHTS,
        cfg.MODEL.CLASSIFIER.WEIGHTS,
        detector.WEIGHTS,
        detector.BACKBONE_WEIGHTS,
        cfg.MODEL.TORCHVISION.WEIGHTS,
    )
    return next(filter(None, names), "")


def _described(side: dict[str, Any]) -> str:
    parts = [f"{side['model']}: {side['parameters'] / 1e6:.2f} M parameters"]
    if "trained" in side and side["trained"] != side["parameters"]:
        parts[0] += f" ({side['trained'] / 1e6:.2f} M trained)"
    if names := side["classes"]:
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        parts.append(f"{len(names)} class{'es' if len(names) > 1 else ''} ({listed})")
    parts.append(side["weights"] or "random weights")
    return ", ".join(parts)


def _count_images(loader: Any) -> int | None:
    """Return how many images a training loader, Detectron2's or ours, draws from."""
    while loader is not None:
        if isinstance(loader, ResumableLoader):
            return len(loader.elements)
        if isinstance(loader, MapDataset):
            return len(loader)
        loader = getattr(loader, "dataset", None)
    return None  # a loader of one's own
