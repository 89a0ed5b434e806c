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
import torchvision
import yaml

from .. import compat  # noqa: F401  (first: patches Detectron2 where it needs it)
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..config import find_config, load_config
from ..data import check_coco, local_path, read_coco
from ..data.coco import class_names
from ..modeling import detector_names
from ..tasks import TASKS, task_of
from ..tasks.detection import NUM_CLASSES

EPOCHS, LEAST_STEPS = 12, 1500
IMAGES = 4  # a step, on each device
SIZE_ON_CPU = 320  # of the shorter side


class Model(NamedTuple):
    """A config that comes with mokd_det, and what is added to it."""

    config: str
    options: dict[str, Any] = {}


BACKBONE_WEIGHTS = {"MODEL.TORCHVISION_DETECTOR.BACKBONE_WEIGHTS": "DEFAULT"}
STUDENTS = {
    "r18-retinanet": Model("COCO-Detection/retinanet_R_18_FPN_1x.yaml"),
    "r50-retinanet": Model("COCO-Detection/retinanet_R_50_FPN_1x.yaml"),
    "mobilenet-retinanet": Model("COCO-Detection/retinanet_MobileNetV2_FPN_1x.yaml"),
    "r18-faster-rcnn": Model("COCO-Detection/faster_rcnn_R_18_FPN_1x.yaml"),
    "r50-faster-rcnn": Model("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"),
    "mobilenet-faster-rcnn": Model("COCO-Detection/faster_rcnn_MobileNetV2_FPN_1x.yaml"),
    "ssdlite": Model("COCO-Detection/tv_ssdlite320.yaml", BACKBONE_WEIGHTS),
    "tv-mobilenet-faster-rcnn": Model("COCO-Detection/tv_faster_rcnn_mobilenet_v3.yaml"),
}
TEACHERS = {
    "r50-retinanet": Model("COCO-Detection/retinanet_R_50_FPN_3x.yaml"),
    "r101-retinanet": Model("COCO-Detection/retinanet_R_101_FPN_3x.yaml"),
    "r50-faster-rcnn": Model("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml"),
    "r101-faster-rcnn": Model("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"),
}


def create(args: argparse.Namespace) -> None:
    """
    Write the folder ``args.output``. ValueError, FileNotFoundError: an unknown model, a file that
    is missing or wrong, or a folder that is there already. Nothing is written then.
    """
    for option, name in (("--student", args.student), ("--teacher", args.teacher)):
        if name in torchvision.models.list_models(module=torchvision.models):
            raise ValueError(
                f"{option} '{name}' is a classifier, but mokd init writes detectors' configs: "
                "docs/tutorials/classifier.md has those of classifiers."
            )
    student = _known(args.student, STUDENTS, "--student")
    folder = Path(args.output or f"mokd_{args.student}")
    if folder.exists():
        raise ValueError(f"--output '{folder}' is there already: name a new folder.")
    named, teacher_file, weights = _teacher(args, folder)
    classes, images = _read(args.data, "--data")
    if args.val:
        _check_classes(args.val, classes)
    common, factor = _common(args, folder.resolve().name, images)
    files = {"common.yaml": common}
    if named is not None:
        files[teacher_file] = _config(named, len(classes), factor, folder, "teacher")
    files["student_scratch.yaml"] = _config(student, len(classes), factor, folder, "scratch")
    files["student_mokd.yaml"] = {
        "_BASE_": "student_scratch.yaml",
        "OUTPUT_DIR": _run(folder, "mokd"),
        "MOKD.ENABLED": True,
        "MOKD.TEACHER.CONFIG_FILE": teacher_file,
        "MOKD.TEACHER.WEIGHTS": weights,
    }
    folder.mkdir(parents=True)
    for name, options in files.items():
        (folder / name).write_text(f"# {HEADS.get(name, HEADS['*'])}\n{_as_yaml(options)}")
    _print_next(folder, classes, images, common, named is not None)


HEADS = {
    "common.yaml": "Data, schedule and device of all runs: 12 epochs, at least 1,500 steps.",
    "student_scratch.yaml": "The student without a teacher: the baseline.",
    "student_mokd.yaml": "The same student and schedule, with the help of the teacher.",
    "*": "The teacher, fine-tuned from COCO's weights.",
}


def _known(name: str, models: dict[str, Model], option: str) -> Model:
    if name not in models:
        close = difflib.get_close_matches(name, models, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"expected {', '.join(models)}."
        raise ValueError(f"{option} '{name}' is unknown: {hint}")
    return models[name]


def _teacher(args: argparse.Namespace, folder: Path) -> tuple[Model | None, str, str]:
    """Return the model to fine-tune (None: it is trained), its config file, and its weights."""
    name = args.teacher
    if name in TEACHERS or name in detector_names():
        if args.teacher_weights:
            raise ValueError(f"--teacher-weights is for a config file: '{name}' has its own.")
        of_torchvision = Model(
            "Base-TorchvisionDetector.yaml",
            {
                "MODEL.TORCHVISION_DETECTOR.NAME": name,
                "MODEL.TORCHVISION_DETECTOR.WEIGHTS": "DEFAULT",
            },
        )
        weights = f"{_run(folder, 'teacher')}/model_final.pth"
        return TEACHERS.get(name, of_torchvision), "teacher.yaml", weights
    if not name.endswith((".yaml", ".yml", ".py")):
        names = [*TEACHERS, *detector_names()]
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or [*TEACHERS]
        raise ValueError(
            f"--teacher '{name}' is no config file and no known name: did you mean "
            f"{' or '.join(close)}?"
        )
    file, of_zoo = find_config(name, "--teacher")
    weights = args.teacher_weights or of_zoo
    if not file.endswith(".py"):
        cfg = load_config(file, option="--teacher")
        if not task_of(cfg).is_one_of([TASKS.get("detection").name]):
            raise ValueError(f"--teacher '{name}' is no detector's config, but the student is one.")
        weights = weights or os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    if "://" not in weights and not PathManager.isfile(weights):
        raise FileNotFoundError(
            f"--teacher '{name}': its weights '{weights}' do not exist. Name them by "
            "--teacher-weights, or train it first: mokd train --config-file " + name
        )
    if "://" not in weights:
        weights = os.path.abspath(weights)
    return None, file if "://" in file else os.path.abspath(file), weights


def _read(files: list[str], option: str) -> tuple[list[str], int]:
    """Return the classes of a set, and the number of images; its warnings are printed."""
    json_file, images = map(_local, files)
    if os.path.isdir(json_file):
        raise ValueError(
            f"{option} '{json_file}' is a folder: expected a JSON file in COCO's format, and the "
            "folder of its images. Pascal-VOC folders are converted by datasets/prepare_voc.py."
        )
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"{option} '{json_file}' does not exist.")
    if not os.path.isdir(images):
        raise FileNotFoundError(f"{option}: the folder of images '{images}' does not exist.")
    data, report = check_coco(read_coco(json_file), images)
    report.raise_for_errors(f"{option} '{json_file}'")
    for warning in report.warnings:
        print(f"warning: {option} '{json_file}': {warning}")
    return class_names(data), len(data["images"])


def _local(path: str) -> str:
    """Return the file of "datasets://x", as datasets/prepare_voc.py prints them, and of others."""
    return local_path(path) if path.startswith("datasets://") else path


def _check_classes(files: list[str], classes: list[str]) -> None:
    names, _ = _read(files, "--val")
    if sorted(names) != sorted(classes):
        raise ValueError(
            f"--val '{files[0]}' has the classes {names}, but --data {classes}: expected the same."
        )


def _common(args: argparse.Namespace, name: str, images: int) -> tuple[dict[str, Any], int]:
    """Return what all configs share, and the number of images a step."""
    gpus = torch.cuda.device_count()
    batch = IMAGES * max(gpus, 1)
    steps = max(math.ceil(EPOCHS * images / batch), LEAST_STEPS)
    name = re.sub(r"\W+", "_", name)
    sets = {f"{name}_train": args.data} | ({f"{name}_val": args.val} if args.val else {})
    return {
        "DATASETS.COCO": [
            [n, *(os.path.abspath(_local(file)) for file in files)] for n, files in sets.items()
        ],
        "DATASETS.TRAIN": [f"{name}_train"],
        "DATASETS.TEST": [f"{name}_val"] if args.val else [],
        "DATALOADER.NUM_WORKERS": 4 if gpus else 0,
        "MODEL.DEVICE": "cuda" if gpus else "cpu",
        "SOLVER.UNIT": "iteration",
        "SOLVER.IMS_PER_BATCH": batch,
        "SOLVER.MAX_ITER": steps,
        "SOLVER.STEPS": [steps * 2 // 3, steps * 8 // 9],
        "SOLVER.WARMUP_ITERS": min(1000, steps // 10),
        "SOLVER.CHECKPOINT_PERIOD": max(steps // 5, 1),
        "SOLVER.KEEP_CHECKPOINTS": 2,
        "SEED": 1,
    }, batch


def _config(model: Model, classes: int, batch: int, folder: Path, run: str) -> dict[str, Any]:
    """Return the options of a model that is trained without a teacher."""
    base = f"mokd://{model.config}"
    cfg = load_config(base)
    options = {
        "_BASE_": [base, "common.yaml"],
        "OUTPUT_DIR": _run(folder, run),
        NUM_CLASSES[cfg.MODEL.META_ARCHITECTURE]: classes,
        **model.options,
        "SOLVER.BASE_LR": round(cfg.SOLVER.BASE_LR * batch / cfg.SOLVER.IMS_PER_BATCH, 6),
    }
    if run == "scratch":  # the same images and augmentations as with a teacher
        options["DATALOADER.RESUMABLE"] = True
    return options | _small_images(cfg, model) if not torch.cuda.is_available() else options


def _small_images(cfg: CfgNode, model: Model) -> dict[str, Any]:
    """Of a size that a CPU can train on."""
    longest = SIZE_ON_CPU * 5 // 3
    if cfg.MODEL.META_ARCHITECTURE != "TorchvisionDetector":
        return {
            "INPUT.MIN_SIZE_TRAIN": [SIZE_ON_CPU],
            "INPUT.MAX_SIZE_TRAIN": longest,
            "INPUT.MIN_SIZE_TEST": SIZE_ON_CPU,
            "INPUT.MAX_SIZE_TEST": longest,
        }
    node = "MODEL.TORCHVISION_DETECTOR"
    name = model.options.get(f"{node}.NAME", cfg.MODEL.TORCHVISION_DETECTOR.NAME)
    if name.startswith("ssd"):  # its size is fixed
        return {}
    return {f"{node}.OPTIONS": {"min_size": SIZE_ON_CPU, "max_size": longest}}


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
    folder: Path, classes: list[str], images: int, common: dict[str, Any], tunes: bool
) -> None:
    gpus = torch.cuda.device_count()
    processes = f" --num-gpus {gpus}" if gpus > 1 else ""
    steps, batch = common["SOLVER.MAX_ITER"], common["SOLVER.IMS_PER_BATCH"]
    print(
        f"{folder}: {images} images, {len(classes)} classes; {steps} steps of {batch} images "
        f"({steps * batch / images:.0f} epochs) on {max(gpus, 1)} {'GPU' if gpus else 'CPU'}\n"
        f"Schedule: {EPOCHS} epochs, but at least {LEAST_STEPS} steps; change it in common.yaml."
    )
    if not common["DATASETS.TEST"]:
        print("Without --val nothing is evaluated: add a set to DATASETS.TEST in common.yaml.")
    print("Next:")
    runs = [*(["teacher"] if tunes else []), "student_scratch", "student_mokd"]
    print(f"  mokd doctor --config-file {folder / runs[0]}.yaml")
    for name in runs:
        print(f"  mokd train --config-file {folder / name}.yaml{processes}")
