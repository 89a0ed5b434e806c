# Copyright (c) The mokd_det authors.
"""``mokd init``: the work."""

import argparse
import difflib
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from .. import compat  # noqa: F401  (first: patches Detectron2 where it needs it)
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..config import find_config, load_config
from ..data.classes import listed_names
from ..tasks import TASKS, task_of
from .new_classifier import SIZE, Classifiers
from .new_detector import Detectors
from .new_kind import Data, Kind, Model, local


class Trained(NamedTuple):
    """A teacher by its config (None: a Python file, which is not read) and weights."""

    file: str
    weights: str
    cfg: CfgNode | None


def create(args: argparse.Namespace) -> None:
    """
    Write the folder ``args.output``. ValueError, FileNotFoundError, ImportError: an unknown model,
    a file that is missing or wrong, or a folder that is there already. Nothing is written then.
    """
    kind = _kind(args)
    student = kind.student(args.student)
    folder = Path(args.output or f"mokd_{args.student}")
    if folder.exists() and not (args.overwrite and folder.is_dir()):
        raise ValueError(
            f"--output '{folder}' is there already: name a new folder, or replace the configs in "
            "it by --overwrite."
        )
    teacher = kind.teacher(args.teacher) or _trained(args, kind)
    data = kind.read(args.data, "--data")
    if args.val:
        _check_classes(args, kind.read(args.val, "--val"), data)
    schedule = _schedule(args, kind, data)
    common = _common(args, kind, data, folder.resolve().name)
    batch = common["SOLVER.IMS_PER_BATCH"]
    taught, tuned = _distilled(args, kind, teacher, data, batch, folder)
    files = {
        "common.yaml": common,
        **({"teacher.yaml": tuned} if tuned is not None else {}),
        "student_scratch.yaml": _config(kind, student, data, batch, _run(folder, "scratch"))
        | kind.baseline(),
        "student_mokd.yaml": {
            "_BASE_": "student_scratch.yaml",
            "OUTPUT_DIR": _run(folder, "mokd"),
            "MOKD.ENABLED": True,
            **taught,
        },
    }
    folder.mkdir(parents=True, exist_ok=args.overwrite)
    for name in {"common.yaml", *HEADS} - files.keys():  # of an earlier call
        (folder / name).unlink(missing_ok=True)
    for name, options in files.items():
        head = HEADS.get(name, f"Data, schedule and device of all runs: {schedule}.")
        (folder / name).write_text(f"# {head}\n{_as_yaml(options)}")
    _print_next(folder, data, files, schedule, kind.downloads(files.values()))


HEADS = {
    "teacher.yaml": "The teacher, which is trained on the data first.",
    "student_scratch.yaml": "The student without a teacher: the baseline.",
    "student_mokd.yaml": "The same student and schedule, with the help of the teacher.",
}


def _kind(args: argparse.Namespace) -> Kind:
    """Return what the data are for; ValueError: the other set or a model is of another kind."""
    kind: Kind = Detectors(args.no_download)
    other: Kind = Classifiers(args.no_download)
    if not _is_for(kind, other, args.data, "--data"):
        kind, other = other, kind
    for option, name in (("--student", args.student), ("--teacher", args.teacher)):
        if other.knows(name) and not kind.knows(name):
            raise ValueError(
                f"{option} '{name}' is a {other.noun}, but --data '{args.data[0]}' is for a "
                f"{kind.noun}: a {other.noun} takes {other.needs}."
            )
    if args.val and not _is_for(kind, other, args.val, "--val"):
        raise ValueError(
            f"--val '{args.val[0]}' is for a {other.noun}, but --data '{args.data[0]}' for a "
            f"{kind.noun}: expected {kind.needs}."
        )
    return kind


def _is_for(kind: Kind, other: Kind, files: list[str], option: str) -> bool:
    """Return whether a set is for this kind; ValueError, FileNotFoundError: it is for neither."""
    first = local(files[0])
    is_source = os.path.isdir(first) or first.endswith(".npz")
    if len(files) == 1 and not os.path.exists(first):
        raise FileNotFoundError(f"{option} '{first}' does not exist.")
    if len(files) != (1 if is_source else 2):
        raise ValueError(
            f"{option} {' '.join(map(repr, files))}: a {kind.noun} takes {kind.needs}, a "
            f"{other.noun} {other.needs}. A set to evaluate on goes to --val; Pascal-VOC folders "
            "are converted by datasets/prepare_voc.py."
        )
    return is_source == isinstance(kind, Classifiers)


def _trained(args: argparse.Namespace, kind: Kind) -> Trained:
    """Return a teacher that is no name: a config file, or a checkpoint with the config beside."""
    name, weights = args.teacher, args.teacher_weights
    if name.endswith(".pth"):
        return _of_run(args, kind)
    if not name.endswith((".yaml", ".yml", ".py")):
        known = kind.teacher_names()
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:4]
        raise ValueError(
            f"--teacher '{name}' is no config file, no checkpoint (.pth) and no known name: did "
            f"you mean {' or '.join(close)}?"
        )
    file, of_zoo = find_config(name, "--teacher")
    cfg, weights = None, weights or of_zoo
    if not (file.endswith(".py") and kind.has_python_configs):
        cfg = _config_of_kind(file, name, kind)
        weights = weights or os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    if "://" not in weights and not PathManager.isfile(weights):
        raise FileNotFoundError(
            f"--teacher '{name}': its weights '{weights}' do not exist. Name them by "
            "--teacher-weights, or train it first: mokd train --config-file " + name
        )
    return Trained(_absolute(file), _absolute(weights), cfg)


def _of_run(args: argparse.Namespace, kind: Kind) -> Trained:
    """Return a teacher by its checkpoint, beside which training has written the config."""
    name = args.teacher
    if args.teacher_weights:
        raise ValueError(f"--teacher-weights is for a config file: '{name}' has weights itself.")
    if not os.path.isfile(name):
        raise FileNotFoundError(f"--teacher '{name}' does not exist.")
    file = os.path.join(os.path.dirname(name), "config.yaml")
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"--teacher '{name}' is a checkpoint, but '{file}' is not there, which mokd train "
            "writes beside it: name its config by --teacher, and this file by --teacher-weights."
        )
    return Trained(_absolute(file), _absolute(name), _config_of_kind(file, name, kind))


def _config_of_kind(file: str, name: str, kind: Kind) -> CfgNode:
    cfg = load_config(file, option="--teacher")
    if not task_of(cfg).is_one_of([TASKS.get(kind.task).name]):
        raise ValueError(
            f"--teacher '{name}' is no {kind.noun}'s config, but --data is for a {kind.noun}."
        )
    return cfg


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def _distilled(
    args: argparse.Namespace,
    kind: Kind,
    teacher: Model | Trained,
    data: Data,
    batch: int,
    folder: Path,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the student's options of its teacher, and the config to train that with if any."""
    tuned = None
    if isinstance(teacher, Trained):
        options, size = {"CONFIG_FILE": teacher.file, "WEIGHTS": teacher.weights}, 0
        if teacher.cfg is not None:
            kind.check_teacher(teacher.cfg, teacher.weights, data)
            size = teacher.cfg.INPUT.CLASSIFICATION.SIZE_TEST
    elif (ready := kind.ready(args.teacher, args.teacher_weights, data)) is not None:
        options, size = ready
    else:
        output = _run(folder, "teacher")
        tuned = _config(kind, teacher, data, batch, output)
        options = {"CONFIG_FILE": "teacher.yaml", "WEIGHTS": f"{output}/model_final.pth"}
        size = tuned.get(SIZE, 0)
    return {f"MOKD.TEACHER.{k}": v for k, v in options.items()} | kind.distilled(size), tuned


def _check_classes(args: argparse.Namespace, val: Data, data: Data) -> None:
    if sorted(val.classes) != sorted(data.classes):
        raise ValueError(
            f"--val '{args.val[0]}' has the classes {listed_names(val.classes)}, but --data "
            f"{listed_names(data.classes)}: expected the same."
        )


def _schedule(args: argparse.Namespace, kind: Kind, data: Data) -> str:
    if args.epochs:
        return f"{args.epochs} epoch{'s' * (args.epochs > 1)}"
    return f"{kind.epochs(data)} epochs, but at least {kind.least_steps} steps"


def _common(args: argparse.Namespace, kind: Kind, data: Data, name: str) -> dict[str, Any]:
    """Return what all configs share."""
    gpus = torch.cuda.device_count()
    batch = kind.images * max(gpus, 1)
    epochs, least = (args.epochs, 1) if args.epochs else (kind.epochs(data), kind.least_steps)
    steps = max(math.ceil(epochs * data.images / batch), least)
    name = re.sub(r"\W+", "_", name)
    sets = {f"{name}_train": args.data} | ({f"{name}_val": args.val} if args.val else {})
    paths = {key: [os.path.abspath(local(file)) for file in files] for key, files in sets.items()}
    return {
        "DATASETS.TRAIN": [f"{name}_train"],
        "DATASETS.TEST": [f"{name}_val"] if args.val else [],
        "DATALOADER.NUM_WORKERS": 4 if gpus else 0,
        "MODEL.DEVICE": "cuda" if gpus else "cpu",
        "SOLVER.UNIT": "iteration",
        "SOLVER.IMS_PER_BATCH": batch,
        "SOLVER.MAX_ITER": steps,
        "SOLVER.WARMUP_ITERS": min(1000, steps // 10),
        "SOLVER.CHECKPOINT_PERIOD": max(steps // 5, 1),
        "SOLVER.KEEP_CHECKPOINTS": 2,
        "SEED": 1,
        **kind.common(paths, steps),
    }


def _config(kind: Kind, model: Model, data: Data, batch: int, output: str) -> dict[str, Any]:
    """Return the options of a model that is trained without a teacher."""
    return {
        "_BASE_": [f"mokd://{model.config}", "common.yaml"],
        "OUTPUT_DIR": output,
        **kind.options(model, data, batch),
    }


def _run(folder: Path, name: str) -> str:
    return str(folder.absolute() / "runs" / name)


def _as_yaml(options: dict[str, Any]) -> str:
    """Return options by full key as YAML."""
    tree: dict[str, Any] = {}
    for key, value in options.items():
        *nodes, last = key.split(".")
        node = tree
        for name in nodes:
            node = node.setdefault(name, {})
        node[last] = value
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=100)


def _print_next(
    folder: Path, data: Data, files: dict[str, dict[str, Any]], schedule: str, downloads: str
) -> None:
    common, *_ = files.values()
    _, *runs = files
    gpus = torch.cuda.device_count()
    processes = f" --num-gpus {gpus}" if gpus > 1 else ""
    steps, batch = common["SOLVER.MAX_ITER"], common["SOLVER.IMS_PER_BATCH"]
    epochs = round(steps * batch / data.images)
    classes = f"{len(data.classes)} class{'es' * (len(data.classes) > 1)}"
    counted = "images with objects" if "DATASETS.COCO" in common else "images"
    print(
        f"{folder}: {data.images} {counted}, {classes}; {steps} steps of {batch} "
        f"images ({epochs} epoch{'s' * (epochs > 1)}) on "
        f"{f'{gpus} GPUs' if gpus > 1 else 'the GPU' if gpus else 'the CPU'}\n"
        f"Schedule: {schedule}; another one by --epochs, or SOLVER in common.yaml."
    )
    if not common["DATASETS.TEST"]:
        print("Without --val nothing is evaluated: add a set to DATASETS.TEST in common.yaml.")
    if downloads:
        print(downloads)
    print("Next:")
    distilled = runs[-1]
    first = "teacher.yaml" if "teacher.yaml" in runs else distilled
    print(f"  mokd doctor --config-file {folder / first}")
    for file in runs:
        if file == distilled != first:  # only now its teacher is there
            print(f"  mokd doctor --config-file {folder / file}")
        print(f"  mokd train --config-file {folder / file}{processes}")
