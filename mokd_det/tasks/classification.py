# Copyright (c) The mokd_det authors.
"""Classifiers of torchvision, timm and one's own."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.data import DataLoader

from ..config import find_config, load_config, merge_overrides
from ..data import ResumableLoader, check_classes, classification, trained_class_names
from ..export import ClassifierExporter
from ..modeling import Classifier, TapShape, as_map, check_batch_norm, classes_of_weights
from ..modeling import common_grid, default_tap, find_taps
from ..modeling import implied_options, input_normalisation, load_trained_classifier, replace_taps
from ..objectives import ClassifierHead, Level, Objective
from ..teachers import PRE_LOGITS, ClassifierTeacher, speed_options
from .base import TASKS, Features, Names, Task


@TASKS.register("classification")
class ClassificationTask(Task):
    """
    The shared features are the tapped ones. All that comes before the last of them is shared; each
    objective's gradient is measured where it reaches them directly.
    """

    meta_architectures = ("Classifier",)
    options = (
        "DATALOADER.REPEATED_AUGMENTATION",
        "INPUT.CLASSIFICATION",
        "MODEL.CLASSIFIER",
        "MOKD.TEACHER.CLASSIFIER",
        "MOKD.TEACHER.IMAGE_SIZE",
        "TEST.PER_CLASS",
    )
    stock_options = (
        "DATASETS.CLASSIFICATION",
        "INPUT.CLASSIFICATION",
        "MODEL.CLASSIFIER",
        "SOLVER.UNIT",
        "TEST.BATCH_SIZE",
        "TEST.PER_CLASS",
    )
    has_stock_step = False

    def usual_objectives(self, cfg: CfgNode) -> list[str]:
        return ["features", "logits"]

    def load_trained(self, cfg: CfgNode, option: str = "MODEL.WEIGHTS") -> Classifier:
        if cfg.MODEL.WEIGHTS:
            cfg = self.untrained_config(cfg)
        elif not cfg.MODEL.CLASSIFIER.WEIGHTS:
            raise ValueError(
                "MODEL.WEIGHTS and MODEL.CLASSIFIER.WEIGHTS are empty: add MODEL.WEIGHTS "
                "/path/to/model.pth, or MODEL.CLASSIFIER.WEIGHTS DEFAULT for ImageNet's."
            )
        return load_trained_classifier(cfg, option)

    def stock_module(self, model: Any) -> nn.Module:
        return model.network

    def untrained_config(self, cfg: CfgNode) -> CfgNode:
        """What follows from MODEL.CLASSIFIER.WEIGHTS besides the weights is in OPTIONS then."""
        cfg = super().untrained_config(cfg)
        options = cfg.MODEL.CLASSIFIER
        given = {key.lower() for key in options.OPTIONS}
        for key, value in implied_options(options.NAME, options.WEIGHTS).items():
            if key not in given:
                options.OPTIONS[key] = value
        options.WEIGHTS = ""
        return cfg

    def teacher_config(self, cfg: CfgNode) -> CfgNode:
        options = cfg.MOKD.TEACHER
        if bool(options.CLASSIFIER) == bool(options.CONFIG_FILE):
            raise ValueError(
                f"MOKD.TEACHER.CLASSIFIER is '{options.CLASSIFIER}' and CONFIG_FILE "
                f"'{options.CONFIG_FILE}': for a classifier give one of the two, a network's name "
                "or the teacher's config file."
            )
        teacher_cfg = _own_config(cfg)
        if teacher_cfg.MODEL.META_ARCHITECTURE != cfg.MODEL.META_ARCHITECTURE:
            raise ValueError(
                f"MOKD.TEACHER.CONFIG_FILE '{options.CONFIG_FILE}' has MODEL.META_ARCHITECTURE "
                f"'{teacher_cfg.MODEL.META_ARCHITECTURE}', but the student is a classifier: name a "
                "classifier's config."
            )
        teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
        option, given = _given_weights(cfg, teacher_cfg)
        if not given:
            raise ValueError(
                f"{option} is empty, and so are the weights of the teacher's config: give "
                "'DEFAULT', the name of a weight enum, or a file."
            )
        is_file = "://" in given or PathManager.isfile(given)
        if not is_file and ("/" in given or os.path.splitext(given)[1]):
            raise FileNotFoundError(
                f"{option} '{given}' does not exist (looked in {os.getcwd()}). Train the teacher "
                "first."
            )
        if is_file:
            teacher_cfg = self.untrained_config(teacher_cfg)
        else:
            teacher_cfg.MODEL.CLASSIFIER.WEIGHTS = given
        teacher_cfg.MODEL.WEIGHTS = given if is_file else ""
        return teacher_cfg

    def teacher_weights_option(self, cfg: CfgNode) -> str:
        return _given_weights(cfg, _own_config(cfg))[0]

    def teacher_config_at_students_size(self, cfg: CfgNode) -> CfgNode:
        teacher_cfg = super().teacher_config_at_students_size(cfg)
        teacher_cfg.INPUT.CLASSIFICATION = teacher_images(cfg)
        return teacher_cfg

    def build_teacher(self, cfg: CfgNode) -> ClassifierTeacher:
        student_size = cfg.INPUT.CLASSIFICATION.SIZE_TRAIN
        teacher_cfg, options = self.teacher_config(cfg), cfg.MOKD.TEACHER
        network, option = teacher_cfg.MODEL.CLASSIFIER, self.teacher_weights_option(cfg)
        # A name says nothing of classes, which features need not share with the student.
        if options.CLASSIFIER and "MODEL.CLASSIFIER.NUM_CLASSES" not in options.OPTS:
            given = teacher_cfg.MODEL.WEIGHTS or network.WEIGHTS
            network.NUM_CLASSES = classes_of_weights(network, given, option)
        model = self.load_trained(teacher_cfg, option)
        size = cfg.MOKD.TEACHER.IMAGE_SIZE or student_size
        return ClassifierTeacher(model, size, size != student_size, **speed_options(cfg))

    def shared_part(self, student: Any) -> nn.Module:
        return SharedPart(student)

    def match_features(
        self, cfg: CfgNode, student: Any, teacher: Any, names: Names = (), teacher_names: Names = ()
    ) -> list[Level]:
        ours, theirs = list(names) or [default_tap(student)], list(teacher_names)
        if not theirs:
            theirs = ours if names else [default_tap(teacher.model)]
        if len(ours) != len(theirs) or len(set(ours)) < len(ours):
            raise ValueError(
                f"MOKD.FEATURES.STUDENT {ours} and MOKD.FEATURES.TEACHER {theirs} must be lists of "
                "the same length, and no tap of the student may come twice."
            )
        size, option = cfg.INPUT.CLASSIFICATION.SIZE_TRAIN, "MOKD.FEATURES."
        shapes = find_taps(student, ours, size, f"{option}STUDENT")
        teacher_shapes = find_taps(teacher.model, theirs, teacher.image_size, f"{option}TEACHER")
        teacher.tap(tuple(teacher_shapes))
        level_map = dict(zip(ours, theirs))
        return [
            Level(
                tap,
                other := level_map[tap],
                shape.channels,
                teacher_shapes[other].channels,
                functools.partial(_align, shape=shape, teacher_shape=teacher_shapes[other]),
                is_vector="vector" in (shape.kind, teacher_shapes[other].kind),
            )
            for tap, shape in shapes.items()
        ]

    def match_heads(
        self, cfg: CfgNode, student: Any, teacher: Any, names: Names = (), teacher_names: Names = ()
    ) -> tuple[list[Level], ClassifierHead]:
        if any(name != PRE_LOGITS for name in (*names, *teacher_names)):
            raise ValueError(
                f"MOKD.TEACHER_HEAD.STUDENT is {list(names)} and TEACHER {list(teacher_names)}, "
                f"but a classifier's head reads '{PRE_LOGITS}': leave both empty."
            )
        size, option = cfg.INPUT.CLASSIFICATION.SIZE_TRAIN, "MOKD.TEACHER_HEAD."
        ours, theirs = (
            find_taps(model, [PRE_LOGITS], pixels, f"{option}{side}")[PRE_LOGITS]
            for model, pixels, side in (
                (student, size, "STUDENT"),
                (teacher.model, teacher.image_size, "TEACHER"),
            )
        )
        if theirs.kind not in ("vector", "map"):
            raise ValueError(
                f"MOKD.OBJECTIVES has 'teacher_head', but the head of the teacher's "
                f"{type(teacher.model.network).__name__} reads {theirs.kind}: expected (N, C) or "
                "(N, C, H, W). Use 'features' or 'logits'."
            )
        teacher.tap((PRE_LOGITS,))
        align = functools.partial(_onto_grid, shape=ours, teacher_shape=theirs)
        level = Level(PRE_LOGITS, PRE_LOGITS, ours.channels, theirs.channels, align)
        return [level], ClassifierHead(teacher.model.head, teacher, theirs.kind == "vector")

    def replace_features(
        self, student: Any, names: Sequence[str], function: Callable[[Features], Features]
    ) -> AbstractContextManager:
        # The head's input comes last: nothing inside the head is tapped.
        names = [*(name for name in names if name != PRE_LOGITS), *{PRE_LOGITS} & set(names)]
        return replace_taps(student, names, function)

    def check_batch(self, cfg: CfgNode, student: Any, count: int) -> None:
        check_batch_norm(student, cfg.INPUT.CLASSIFICATION.SIZE_TRAIN, count)

    def check_pair(
        self, cfg: CfgNode, student: Any, teacher: Any, objectives: Sequence[Objective]
    ) -> None:
        """
        At features, a rule sees conflict only where both gradients arrive. At parameters, the
        backward pass of the losses ends at the features, so no loss may reach what comes before
        around them.
        """
        if not any(objective.taps for objective in objectives):
            raise ValueError(
                f"The objectives {', '.join(o.name for o in objectives)} name no features of the "
                f"classifier: set 'taps' of yours to submodules or ('{PRE_LOGITS}',)."
            )
        options = cfg.MOKD.BALANCING
        if options.MEASURE_AT == "parameters" and getattr(student.network, "aux_logits", False):
            raise ValueError(
                "MOKD.BALANCING.MEASURE_AT 'parameters' cannot have the heads for training only of "
                f"{type(student.network).__name__}, which leave it before the tapped features: set "
                "MODEL.CLASSIFIER.OPTIONS to {aux_logits: False}, or MEASURE_AT to 'features'."
            )
        if options.MEASURE_AT != "features" or options.RULE == "fixed":
            return
        taps = [set(objective.taps) for objective in objectives]
        if PRE_LOGITS not in set.union(*taps):
            return
        for objective in objectives:
            if PRE_LOGITS not in objective.taps:
                raise ValueError(
                    f"Objective '{objective.name}' reads {list(objective.taps)}, and others "
                    f"'{PRE_LOGITS}': with MOKD.BALANCING.MEASURE_AT 'features' the task's "
                    f"gradient is measured at '{PRE_LOGITS}' then, and that of "
                    f"'{objective.name}' elsewhere, so that rule '{options.RULE}' could not see "
                    f"their conflict. Add '{PRE_LOGITS}' to MOKD.FEATURES.STUDENT and TEACHER, or "
                    "set MOKD.BALANCING.MEASURE_AT to 'parameters'."
                )

    def build_train_loader(self, cfg: CfgNode) -> ResumableLoader:
        return classification.build_train_loader(cfg)

    def build_test_loader(self, cfg: CfgNode, name: str) -> DataLoader:
        return classification.build_test_loader(cfg, name)

    def check_config(self, cfg: CfgNode) -> None:
        if cfg.MOKD.ENABLED:
            self.teacher_config(cfg)

    def check_data(self, cfg: CfgNode, options: Sequence[str] = ("TRAIN", "TEST")) -> None:
        is_training = "TRAIN" in options
        check_classes(cfg, options, None if is_training else trained_class_names(cfg.MODEL.WEIGHTS))
        for option in options:
            for name in cfg.DATASETS[option]:
                path = MetadataCatalog.get(name).image_path
                report = classification.check_source(path, broken=cfg.DATASETS.BROKEN_IMAGES)
                report.raise_for_errors(f"DATASETS.{option}: '{name}' ({path})")

    def exporter(self, cfg: CfgNode) -> ClassifierExporter:
        return ClassifierExporter(cfg, self.stock_options)


class SharedPart(nn.Module):
    """What task and distillation share of a classifier: all but its head, under stock names."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self._classifier = [classifier]  # no part of this module

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Parameter]]:
        classifier = self._classifier[0]
        head = {id(p) for p in classifier.head.parameters()}
        named = classifier.network.named_parameters(*args, **kwargs)
        return ((name, p) for name, p in named if id(p) not in head)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        return self._classifier[0].network.named_modules(*args, **kwargs)


def _align(
    student: Tensor, teacher: Tensor, shape: TapShape, teacher_shape: TapShape
) -> tuple[Tensor, Tensor]:
    return common_grid(as_map(student, shape), as_map(teacher, teacher_shape))


def _onto_grid(
    student: Tensor, teacher: Tensor, shape: TapShape, teacher_shape: TapShape
) -> tuple[Tensor, Tensor]:
    teacher = as_map(teacher, teacher_shape)
    size = (teacher.shape[-2], teacher.shape[-1])
    return F.adaptive_avg_pool2d(as_map(student, shape), size), teacher


def _own_config(cfg: CfgNode) -> CfgNode:
    """Return the teacher's config as its name or its file gives it."""
    options, option = cfg.MOKD.TEACHER, "MOKD.TEACHER.CONFIG_FILE"
    if options.CLASSIFIER:
        return _config_by_name(cfg)
    config_file, _ = find_config(options.CONFIG_FILE, option)
    return load_config(config_file, options.OPTS, option, "MOKD.TEACHER.OPTS: override")


def _given_weights(cfg: CfgNode, teacher_cfg: CfgNode) -> tuple[str, str]:
    """Return what names the teacher's weights, for messages, and them; the first that is set."""
    options = cfg.MOKD.TEACHER
    if options.WEIGHTS:
        return "MOKD.TEACHER.WEIGHTS", options.WEIGHTS
    for key, value in (
        ("MODEL.WEIGHTS", teacher_cfg.MODEL.WEIGHTS),
        ("MODEL.CLASSIFIER.WEIGHTS", teacher_cfg.MODEL.CLASSIFIER.WEIGHTS),
    ):
        if value and key in options.OPTS[::2]:
            return f"MOKD.TEACHER.OPTS: {key}", value
        if value:
            return f"{key} of MOKD.TEACHER.CONFIG_FILE '{options.CONFIG_FILE}'", value
    return "MOKD.TEACHER.WEIGHTS", ""


def _config_by_name(cfg: CfgNode) -> CfgNode:
    """The config of the network ``MOKD.TEACHER.CLASSIFIER``."""
    options = cfg.MOKD.TEACHER
    teacher_cfg = load_config("", ["MODEL.META_ARCHITECTURE", "Classifier"])
    teacher_cfg.INPUT.FORMAT = "RGB"
    teacher_cfg.MODEL.CLASSIFIER.NAME = options.CLASSIFIER
    teacher_cfg.MODEL.CLASSIFIER.WEIGHTS = options.WEIGHTS  # torchvision's, also as a file
    teacher_cfg.MODEL.CLASSIFIER.NUM_CLASSES = cfg.MODEL.CLASSIFIER.NUM_CLASSES
    mean, std = input_normalisation(options.CLASSIFIER, options.WEIGHTS)
    teacher_cfg.MODEL.PIXEL_MEAN, teacher_cfg.MODEL.PIXEL_STD = mean, std
    # It has no config file that says how it sees images.
    teacher_cfg.INPUT.CLASSIFICATION = teacher_images(cfg)
    merge_overrides(teacher_cfg, options.OPTS, "MOKD.TEACHER.OPTS: override")
    return teacher_cfg


def teacher_images(cfg: CfgNode) -> CfgNode:
    """Return ``INPUT.CLASSIFICATION``, evaluated at ``MOKD.TEACHER.IMAGE_SIZE`` if there is one."""
    images = cfg.INPUT.CLASSIFICATION.clone()
    images.defrost()
    if size := cfg.MOKD.TEACHER.IMAGE_SIZE:
        images.SIZE_TEST = images.RESIZE_TEST = size
    return images
