# Copyright (c) The mokd_det authors.
"""``mokd init`` for classifiers: networks by name, and folders of classes."""

import math
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torchvision
from detectron2.config import CfgNode

from ..config import get_cfg
from ..data import known_class_names, trained_class_names
from ..data.classes import listed_names
from ..data.classification import check_source, open_source
from ..data.classification.sources import ClassFolders
from ..data.images import opened
from ..modeling import CLASSIFIERS, NetworkFacts, check_name, classes_of_weights
from ..modeling import has_layer_norm, is_classifier_name, network_facts
from ..modeling.networks import IMAGENET_MEAN, IMAGENET_STD
from .new_kind import REMEDY, Data, Kind, Model, check_number, local

NODE = "MODEL.CLASSIFIER"
NAME = f"{NODE}.NAME"
WEIGHTS = "--teacher-weights"
SIZE = "INPUT.CLASSIFICATION.SIZE_TRAIN"
MOST_PIXELS, MOST_ON_CPU = 224, 128  # of a side, unless a network wants more
SMALL = 64  # images up to this are padded, not cut
# Learning rates for 64 images: tuned from ImageNet's weights, and from random ones.
SGD, ADAMW = (0.01, 0.025), (1e-4, 2.5e-4)
TUNED_EPOCHS, RANDOM_EPOCHS = 20, 100


class Classifiers(Kind):
    """Of torchvision, timm and the user, from ImageNet's weights where there are any."""

    task, noun = "classification", "classifier"
    needs = "one folder that has a folder of images for each class"
    least_steps = 500

    def __init__(self, is_random: bool = False):
        """``is_random``: from random weights."""
        self.is_random = is_random
        self.images = 64 if torch.cuda.is_available() else 32

    def knows(self, name: str) -> bool:
        return is_classifier_name(name)

    def student(self, name: str) -> Model:
        check_name(name, "--student")
        return Model("Base-Classifier.yaml", {NAME: name})

    def teacher(self, name: str) -> Model | None:
        if not self.knows(name):
            return None
        check_name(name, "--teacher")
        return Model("Base-Classifier.yaml", {NAME: name})

    def teacher_names(self) -> list[str]:
        return [*torchvision.models.list_models(module=torchvision.models), *CLASSIFIERS]

    def ready(self, name: str, weights: str, data: Data) -> tuple[dict[str, Any], int] | None:
        facts = network_facts(name, "--teacher", self.is_random)
        if weights:
            _check_weights(name, weights, data.classes)
            weights = os.path.abspath(weights)
        elif (
            facts.weights
            and _is_imagenet(data)
            and _number(name, facts.weights, data.classes) == 1000
        ):
            weights = facts.weights
        else:
            return None
        return {"CLASSIFIER": name, "WEIGHTS": weights}, _size(facts, data)

    def check_teacher(self, cfg: CfgNode, weights: str, data: Data) -> None:
        _check_names(trained_class_names(weights) or known_class_names(cfg), data.classes)
        check_number(cfg.MODEL.CLASSIFIER.NUM_CLASSES, data.classes)

    def read(self, files: Sequence[str], option: str) -> Data:
        path = local(files[0])
        check_source(path).raise_for_errors(f"{option} '{path}'")
        source = open_source(path)  # its warnings are logged
        if isinstance(source, ClassFolders):
            names = source.file_names()
            side = statistics.median_low(map(_side, names[:: max(len(names) // 100, 1)]))
        else:
            side = min(source.images.shape[1:3])
        return Data(source.classes, len(source), side)

    def epochs(self, data: Data) -> int:
        return RANDOM_EPOCHS if self.is_random or _is_imagenet(data) else TUNED_EPOCHS

    def common(self, sets: dict[str, list[str]], steps: int) -> dict[str, Any]:
        return {
            "DATASETS.CLASSIFICATION": [[name, *files] for name, files in sets.items()],
            "INPUT.RANDOM_FLIP": "horizontal",
            "SOLVER.WEIGHT_DECAY_BIAS": 0.0,
            "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
            # Of short schedules the moving statistics are those of earlier weights.
            "TEST.PRECISE_BN": {"ENABLED": True, "NUM_ITER": 50},
        }

    def options(self, model: Model, data: Data, batch: int) -> dict[str, Any]:
        name = model.options[NAME]
        # Weights of ImageNet would know the answers.
        is_random = self.is_random or _is_imagenet(data)
        facts = network_facts(name, NAME, is_random)
        size, is_small = _size(facts, data), data.side <= SMALL
        return {
            f"{NODE}.NUM_CLASSES": len(data.classes),
            **model.options,
            f"{NODE}.WEIGHTS": facts.weights,
            **_normalisation(facts),
            "INPUT.CLASSIFICATION.CROP": "padded" if is_small else "resized",
            SIZE: size,
            "INPUT.CLASSIFICATION.SIZE_TEST": size,
            "INPUT.CLASSIFICATION.RESIZE_TEST": size if is_small else round(size * 8 / 7),
            **_solver(has_layer_norm(name, len(data.classes)), not facts.weights, batch),
        }

    def downloads(self, files: Iterable[dict[str, Any]]) -> str:
        if not any(options.get(f"{NODE}.WEIGHTS") for options in files):
            return ""
        return "ImageNet's weights will be downloaded; without internet: mokd init --no-download."

    def distilled(self, size: int) -> dict[str, Any]:
        return {"MOKD.TEACHER.IMAGE_SIZE": size, "MOKD.LOGITS.TEMPERATURE": 4.0}


def _is_imagenet(data: Data) -> bool:
    """Its folders are called as WordNet numbers them, in the order of the weights' classes."""
    return len(data.classes) == 1000 and all(re.fullmatch(r"n\d{8}", c) for c in data.classes)


def _solver(is_transformer: bool, is_random: bool, batch: int) -> dict[str, Any]:
    """Rates grow with the batch, AdamW's with its root."""
    if not is_transformer:  # Goyal et al. 2017
        return {"SOLVER.BASE_LR": round(SGD[is_random] * batch / 64, 6)}
    rate = ADAMW[is_random] * math.sqrt(batch / 64)  # Malladi et al. 2022
    return {
        "SOLVER.OPTIMIZER": "AdamW",
        "SOLVER.BASE_LR": round(rate, 6),
        "SOLVER.WEIGHT_DECAY": 0.05,
    }


def _normalisation(facts: NetworkFacts) -> dict[str, Any]:
    """Where it is not that of the base config."""
    mean, std = ([round(x, 3) for x in values] for values in (facts.pixel_mean, facts.pixel_std))
    is_usual = (mean, std) == (list(IMAGENET_MEAN), list(IMAGENET_STD))
    return {} if is_usual else {"MODEL.PIXEL_MEAN": mean, "MODEL.PIXEL_STD": std}


def _size(facts: NetworkFacts, data: Data) -> int:
    """Return the side of the images for a network: about the data's own, but not above a bound."""
    if facts.is_fixed:
        return facts.least_size
    most = MOST_PIXELS if torch.cuda.is_available() else MOST_ON_CPU
    return max(min(math.ceil(data.side / 32) * 32, most), facts.least_size)


def _side(file_name: str) -> int:
    with opened(file_name) as image:
        return min(image.size)


def _check_weights(name: str, weights: str, classes: list[str]) -> None:
    if not os.path.isfile(weights):
        raise FileNotFoundError(f"{WEIGHTS} '{weights}' does not exist: expected a file here.")
    _check_names(trained_class_names(weights, WEIGHTS), classes)
    check_number(_number(name, weights, classes), classes)


def _number(name: str, weights: str, classes: list[str]) -> int:
    """Return the number of classes of weights, as far as they say it."""
    node = get_cfg().MODEL.CLASSIFIER
    node.NAME, node.NUM_CLASSES = name, len(classes)
    return classes_of_weights(node, weights, WEIGHTS)


def _check_names(names: list[str] | None, classes: list[str]) -> None:
    if names and names != classes:
        raise ValueError(
            f"--teacher knows the classes {listed_names(names)}, but --data has "
            f"{listed_names(classes)}: expected the same in the same order. {REMEDY}"
        )
