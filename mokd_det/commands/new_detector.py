# Copyright (c) The mokd_det authors.
"""``mokd init`` for detectors: their names, and data in COCO's format."""

import difflib
import functools
import os
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode

from ..config import load_config
from ..data import check_coco, read_coco
from ..data.coco import class_names
from ..modeling import detector_names
from ..tasks.detection import NUM_CLASSES
from .new_kind import Data, Kind, Model, check_number, local

# What a CPU can train on: pixels of the shorter side, and regions an image of an R-CNN's head.
MOST_ON_CPU, REGIONS_ON_CPU = 320, 128
BACKBONE_WEIGHTS = {"MODEL.TORCHVISION_DETECTOR.BACKBONE_WEIGHTS": "DEFAULT"}
STUDENTS = {
    "r18-retinanet": Model("COCO-Detection/retinanet_R_18_FPN_1x.yaml"),
    "r50-retinanet": Model("COCO-Detection/retinanet_R_50_FPN_1x.yaml"),
    "mobilenet-retinanet": Model("COCO-Detection/retinanet_MobileNetV2_FPN_1x.yaml"),
    "r18-faster-rcnn": Model("COCO-Detection/faster_rcnn_R_18_FPN_1x.yaml"),
    "r50-faster-rcnn": Model("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"),
    "mobilenet-faster-rcnn": Model("COCO-Detection/faster_rcnn_MobileNetV2_FPN_1x.yaml"),
    "small-faster-rcnn": Model("COCO-Detection/faster_rcnn_MobileNetV2_small_FPN_1x.yaml"),
    "ssdlite": Model("COCO-Detection/tv_ssdlite320.yaml", BACKBONE_WEIGHTS),
    "tv-mobilenet-faster-rcnn": Model("COCO-Detection/tv_faster_rcnn_mobilenet_v3.yaml"),
}
TEACHERS = {
    "r50-retinanet": Model("COCO-Detection/retinanet_R_50_FPN_3x.yaml"),
    "r101-retinanet": Model("COCO-Detection/retinanet_R_101_FPN_3x.yaml"),
    "r50-faster-rcnn": Model("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml"),
    "r101-faster-rcnn": Model("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"),
}


# datasets/prepare_pretrained.py
MOBILENET = "datasets://pretrained/mobilenet_v2-b0353104.pth"


class Detectors(Kind):
    """Of Detectron2 and torchvision, from weights of ImageNet (students) or COCO (teachers)."""

    task, noun = "detection", "detector"
    needs = "a JSON file in COCO's format and the folder of its images"
    least_steps, images = 1500, 4
    has_python_configs = True

    def __init__(self, is_offline: bool = False):
        """``is_offline``: from ImageNet's weights that a package has."""
        self.is_offline = is_offline

    def knows(self, name: str) -> bool:
        return name in self.teacher_names()

    def student(self, name: str) -> Model:
        if name not in STUDENTS:
            close = difflib.get_close_matches(name, STUDENTS, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(close)}?" if close else f"expected {LISTED}."
            raise ValueError(f"--student '{name}' is unknown: {hint}")
        return self._offline("--student", name) if self.is_offline else STUDENTS[name]

    def teacher(self, name: str) -> Model | None:
        if not self.knows(name):
            return None
        if self.is_offline:
            return self._offline("--teacher", name)
        if name in detector_names():
            node = "MODEL.TORCHVISION_DETECTOR"
            options = {f"{node}.NAME": name, f"{node}.WEIGHTS": "DEFAULT"}
            return Model("Base-TorchvisionDetector.yaml", options)
        return TEACHERS.get(name) or STUDENTS[name]

    def teacher_names(self) -> list[str]:
        return [*TEACHERS, *(name for name in STUDENTS if name not in TEACHERS), *detector_names()]

    def _offline(self, option: str, name: str) -> Model:
        packaged = [name for name, model in STUDENTS.items() if "MobileNetV2" in model.config]
        if name not in packaged:
            raise ValueError(
                f"{option} '{name}' with --no-download: no package has its weights. Expected "
                f"{', '.join(packaged)}; or leave --no-download out: mokd train names each file to "
                "copy, and where to put it."
            )
        weights = local(MOBILENET)
        if not os.path.isfile(weights):
            raise FileNotFoundError(
                f"--no-download: the weights of {option} '{name}', '{weights}', do not exist: "
                "python datasets/prepare_pretrained.py of the checkout fetches them from a package."
            )
        return Model(STUDENTS[name].config, {"MODEL.TORCHVISION.WEIGHTS": os.path.abspath(weights)})

    def ready(self, name: str, weights: str, data: Data) -> None:
        if weights:
            raise ValueError(f"--teacher-weights is for a config file: '{name}' has its own.")

    def check_teacher(self, cfg: CfgNode, weights: str, data: Data) -> None:
        if key := NUM_CLASSES.get(cfg.MODEL.META_ARCHITECTURE):
            check_number(functools.reduce(getattr, key.split("."), cfg), data.classes)

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
        side = statistics.median_low(min(row["width"], row["height"]) for row in data["images"])
        # As Detectron2's loader, which leaves out images that have nothing but crowds.
        trained = {row["image_id"] for row in data["annotations"] if not row.get("iscrowd")}
        if not trained and option == "--data":
            raise ValueError(
                f"{option} '{json_file}' has no object to learn from: expected annotations that "
                "are no crowds, of some of its images."
            )
        return Data(class_names(data), len(trained), side)

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
        if torch.cuda.is_available():
            return options
        return options | _on_cpu(cfg, model, min(data.side, MOST_ON_CPU))

    def baseline(self) -> dict[str, Any]:
        return {"DATALOADER.RESUMABLE": True}

    def distilled(self, size: int) -> dict[str, Any]:
        return {} if torch.cuda.is_available() else {"MOKD.TEACHER.PROPOSALS": REGIONS_ON_CPU}

    def downloads(self, files: Iterable[dict[str, Any]]) -> str:
        if self.is_offline:
            return ""
        return (
            "Weights of ImageNet or COCO will be downloaded; without internet: mokd init "
            "--no-download, with a MobileNetV2 (mokd init --help)."
        )


LISTED = ", ".join(STUDENTS)


def _on_cpu(cfg: CfgNode, model: Model, size: int) -> dict[str, Any]:
    longest = size * 5 // 3
    if cfg.MODEL.META_ARCHITECTURE == "TorchvisionDetector":
        node = "MODEL.TORCHVISION_DETECTOR"
        name = model.options.get(f"{node}.NAME", cfg.MODEL.TORCHVISION_DETECTOR.NAME)
        if name.startswith("ssd"):  # its size is fixed
            return {}
        regions = {"box_batch_size_per_image": REGIONS_ON_CPU} if "rcnn" in name else {}
        return {f"{node}.OPTIONS": {"min_size": size, "max_size": longest, **regions}}
    options = {
        "INPUT.MIN_SIZE_TRAIN": [size],
        "INPUT.MAX_SIZE_TRAIN": longest,
        "INPUT.MIN_SIZE_TEST": size,
        "INPUT.MAX_SIZE_TEST": longest,
    }
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        options["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"] = REGIONS_ON_CPU
    return options
