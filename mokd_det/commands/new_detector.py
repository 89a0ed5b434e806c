# Copyright (c) The mokd_det authors.
"""``mokd init`` for detectors: their names, and data in COCO's format."""

import difflib
import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode

from ..config import load_config
from ..data import check_coco, read_coco
from ..data.coco import class_names
from ..modeling import detector_names
from ..tasks.detection import NUM_CLASSES
from .new_kind import Data, Kind, Model, local

SIZE_ON_CPU = 320  # of the shorter side
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


class Detectors(Kind):
    """Of Detectron2 and torchvision, from weights of ImageNet (students) or COCO (teachers)."""

    task, noun = "detection", "detector"
    needs = "a JSON file in COCO's format and the folder of its images"
    least_steps, images = 1500, 4
    has_python_configs = True

    def knows(self, name: str) -> bool:
        return name in STUDENTS or name in self.teacher_names()

    def student(self, name: str) -> Model:
        if name not in STUDENTS:
            close = difflib.get_close_matches(name, STUDENTS, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(close)}?" if close else f"expected {LISTED}."
            raise ValueError(f"--student '{name}' is unknown: {hint}")
        return STUDENTS[name]

    def teacher(self, name: str) -> Model | None:
        if name not in detector_names():
            return TEACHERS.get(name)
        node = "MODEL.TORCHVISION_DETECTOR"
        options = {f"{node}.NAME": name, f"{node}.WEIGHTS": "DEFAULT"}
        return Model("Base-TorchvisionDetector.yaml", options)

    def teacher_names(self) -> list[str]:
        return [*TEACHERS, *detector_names()]

    def ready(self, name: str, weights: str, data: Data) -> None:
        if weights:
            raise ValueError(f"--teacher-weights is for a config file: '{name}' has its own.")

    def read(self, files: Sequence[str], option: str) -> Data:
        json_file, images = map(local, files)
        if not os.path.isfile(json_file):
            raise FileNotFoundError(f"{option} '{json_file}' does not exist.")
        if not os.path.isdir(images):
            raise FileNotFoundError(f"{option}: the folder of images '{images}' does not exist.")
        data, report = check_coco(read_coco(json_file), images)
        report.raise_for_errors(f"{option} '{json_file}'")
        for warning in report.warnings:
            print(f"warning: {option} '{json_file}': {warning}")
        return Data(class_names(data), len(data["images"]))

    def epochs(self, data: Data) -> int:
        return 12

    def common(self, sets: dict[str, list[str]], steps: int) -> dict[str, Any]:
        return {
            "DATASETS.COCO": [[name, *files] for name, files in sets.items()],
            "SOLVER.STEPS": [steps * 2 // 3, steps * 8 // 9],
        }

    def options(self, model: Model, data: Data, batch: int) -> dict[str, Any]:
        cfg = load_config(f"mokd://{model.config}")
        options = {
            NUM_CLASSES[cfg.MODEL.META_ARCHITECTURE]: len(data.classes),
            **model.options,
            "SOLVER.BASE_LR": round(cfg.SOLVER.BASE_LR * batch / cfg.SOLVER.IMS_PER_BATCH, 6),
        }
        return options if torch.cuda.is_available() else options | _small_images(cfg, model)

    def baseline(self) -> dict[str, Any]:
        return {"DATALOADER.RESUMABLE": True}


LISTED = ", ".join(STUDENTS)


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
