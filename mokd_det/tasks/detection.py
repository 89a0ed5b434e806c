# Copyright (c) The mokd_det authors.
"""Detectron2's detectors, and every other meta-architecture that looks like one."""

import functools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from ..config import find_config, get_cfg, load_config, merge_overrides
from ..data import ResumableLoader, build_resumable_train_loader, build_test_loader
from ..data import build_train_mapper, check_detection_sets, check_head, known_class_names
from ..data import trained_class_names
from ..export import DetectorExporter
from ..modeling import COCO_NAMES, StrictCheckpointer, check_detector_name, load_lazy_config
from ..modeling import replace_backbone_features
from ..objectives import DetectorHeads, Level, Objective, align_resolution, onto_grid
from ..readers import build_box_reader, build_rpn_reader, feature_shapes, stock_rpn
from ..teachers import DetectorTeacher, ScriptedDetector, Teacher, speed_options
from .base import TASKS, Features, Names, Task, task_of
from .levels import build_head_map, build_level_map, matched_levels


OF_TEACHER = "MOKD.TEACHER.OPTS: override"
RECIPES_FOR = ("", "one-stage", "two-stage")
# Where a meta-architecture has the number of its classes.
NUM_CLASSES = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "TorchvisionDetector": "MODEL.TORCHVISION_DETECTOR.NUM_CLASSES",
}


@TASKS.register("detection")
class DetectionTask(Task):
    """
    Any model can be the student that has ``backbone``, a module which its forward pass calls once
    and which returns dict[str, Tensor], with ``output_shape()`` as Detectron2's backbones; and
    whose forward pass in training returns dict[str, Tensor] of losses. A teacher needs such a
    backbone and ``preprocess_image(batched_inputs)``, which returns an ImageList.
    """

    options: ClassVar[tuple[str, ...]] = (
        "INPUT.COLOR_JITTER",
        "INPUT.LSJ",
        "MODEL.BACKBONE.CHECKPOINTING",
        "MOKD.TEACHER.DETECTOR",
        "MODEL.BACKBONE.COMPILE",
        "MOKD.RECIPE_FOR",
        "MOKD.TEACHER.TORCHSCRIPT",
        "MOKD.TEACHER.PROPOSALS",
        "MOKD.FEATURES.FOREGROUND",
        "MOKD.FEATURES.FOREGROUND_SHARE",
        "MOKD.FEATURES.FOREGROUND_SCORE",
        "MOKD.FEATURES.FOREGROUND_UNIT",
        "MOKD.FEATURES.LEVEL_WEIGHTS",
        "MOKD.TEACHER_HEAD.CLASS_WEIGHT",
        "MOKD.TEACHER_HEAD.BOX_WEIGHT",
        "MOKD.TEACHER_HEAD.RPN_WEIGHT",
    )

    def usual_objectives(self, cfg: CfgNode) -> list[str]:
        scripted = cfg.MOKD.TEACHER.TORCHSCRIPT.FILE  # which has features only
        return ["features"] if scripted else ["teacher_head", "outputs"]

    def rule_options(self, rule: str, objectives: Names) -> dict[str, Any]:
        if rule != "loss_ratio":
            return {}
        options: dict[str, Any] = {"cap": 2.0}
        # What the teacher's head says of the student's features hardly agrees with the task there,
        # whether it helps or not (docs/balancing.md). Outputs tell a good teacher from a bad one.
        # Any other objective has to agree by itself.
        row = {name: i for i, name in enumerate(objectives, 1)}
        if list(row) == ["teacher_head"]:
            options["agreement"] = 0.0
        elif {"teacher_head", "outputs"} <= {*row}:
            options["together"] = [row["teacher_head"], row["outputs"]]
        elif "teacher_head" in row:
            options["trusted"] = [row["teacher_head"]]
        return options

    def load_trained(self, cfg: CfgNode, option: str = "MODEL.WEIGHTS") -> nn.Module:
        if not cfg.MODEL.WEIGHTS:
            raise ValueError("MODEL.WEIGHTS is empty: add MODEL.WEIGHTS /path/to/model.pth")
        model = build_model(self.untrained_config(cfg))  # MODEL.WEIGHTS has the backbone as well
        StrictCheckpointer(model, option=option).load(cfg.MODEL.WEIGHTS, checkpointables=[])
        return model.eval()

    def teacher_config(self, cfg: CfgNode) -> CfgNode:
        options = cfg.MOKD.TEACHER
        if options.CLASSIFIER:
            raise ValueError(
                f"MOKD.TEACHER.CLASSIFIER is '{options.CLASSIFIER}', but the student is no "
                "classifier (MODEL.META_ARCHITECTURE): name a detector in MOKD.TEACHER.CONFIG_FILE."
            )
        if bool(options.DETECTOR) == bool(options.CONFIG_FILE):
            raise ValueError(
                f"MOKD.TEACHER.CONFIG_FILE is '{options.CONFIG_FILE}' and DETECTOR "
                f"'{options.DETECTOR}': give one of the two, the config file that the teacher was "
                "trained with (and its weights in MOKD.TEACHER.WEIGHTS), or the name of a detector "
                "of torchvision."
            )
        if options.DETECTOR:
            teacher_cfg, zoo_weights = _config_by_name(cfg), ""
        else:
            teacher_cfg, zoo_weights = _read_teacher_config(options)
        teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
        if not options.WEIGHTS and zoo_weights and "MODEL.WEIGHTS" not in options.OPTS:
            teacher_cfg.MODEL.WEIGHTS = zoo_weights
        return task_of(teacher_cfg).with_teacher_weights(teacher_cfg, options)

    def with_teacher_weights(self, teacher_cfg: CfgNode, options: CfgNode) -> CfgNode:
        # All weights come from the file below, so none are downloaded for the backbone alone.
        teacher_cfg.MODEL.TORCHVISION.WEIGHTS = ""
        teacher_cfg.MODEL.WEIGHTS = options.WEIGHTS or teacher_cfg.MODEL.WEIGHTS
        if not teacher_cfg.MODEL.WEIGHTS:
            raise ValueError(
                "MOKD.TEACHER.WEIGHTS is empty, and so is MODEL.WEIGHTS of "
                f"'{options.CONFIG_FILE}': name the teacher's trained weights."
            )
        check_weights_exist(teacher_cfg.MODEL.WEIGHTS, options)
        return teacher_cfg

    def build_teacher(self, cfg: CfgNode) -> DetectorTeacher:
        options = cfg.MOKD.TEACHER
        if options.TORCHSCRIPT.FILE:
            model: nn.Module = ScriptedDetector.from_config(cfg)
            input_format = options.TORCHSCRIPT.INPUT_FORMAT
        else:
            teacher_cfg = self.teacher_config(cfg)
            model = task_of(teacher_cfg).load_trained(teacher_cfg, "MOKD.TEACHER.WEIGHTS")
            input_format = teacher_cfg.INPUT.FORMAT
            for name in ("backbone", "preprocess_image"):
                if not hasattr(model, name):
                    raise ValueError(
                        f"The teacher's MODEL.META_ARCHITECTURE "
                        f"'{teacher_cfg.MODEL.META_ARCHITECTURE}' has no '{name}', which "
                        "distilling its features needs."
                    )
        formats = {cfg.INPUT.FORMAT, input_format}
        if len(formats) > 1 and formats != {"RGB", "BGR"}:
            raise ValueError(
                f"INPUT.FORMAT is '{cfg.INPUT.FORMAT}' for the student and '{input_format}' for "
                "the teacher: only RGB and BGR can be converted into each other. Train both with "
                "the same format."
            )
        return DetectorTeacher(
            model, input_format, proposals=options.PROPOSALS, **speed_options(cfg)
        )

    def check_data(self, cfg: CfgNode, options: Sequence[str] = ("TRAIN", "TEST")) -> None:
        option = NUM_CLASSES.get(cfg.MODEL.META_ARCHITECTURE)
        head = (
            None if option is None else (option, functools.reduce(getattr, option.split("."), cfg))
        )
        names = trained_class_names(cfg.MODEL.WEIGHTS)
        if "TRAIN" not in options:
            names = names or known_class_names(cfg)
            if head is not None and names is not None and len(names) != head[1]:
                names = None  # of a set that is not this model's
        elif names is not None and sorted(names) != sorted(known_class_names(cfg) or ()):
            names = None  # weights to start from, for other classes
        check_detection_sets(cfg, options, head, names)

    def check_model(
        self, cfg: CfgNode, model: nn.Module, options: Sequence[str] = ("TRAIN", "TEST")
    ) -> None:
        """The number of classes, wherever Detectron2's models have it: without a background."""
        model = self.stock_module(model)
        place = f"of the model, a {type(model).__name__},"
        if cfg.MODEL.META_ARCHITECTURE == "LazyConfigDetector":
            place += " (MODEL.LAZY_CONFIG.OVERRIDES)"
        for part in ("", "head", "roi_heads"):
            count = getattr(getattr(model, part, None) if part else model, "num_classes", None)
            if isinstance(count, int):
                key = ".".join(filter(None, (part, "num_classes")))
                check_head(cfg, options, f"'{key}' {place}", count)

    def shared_part(self, student: nn.Module) -> nn.Module:
        return student.get_submodule("backbone")

    def match_features(
        self, cfg: CfgNode, student: Any, teacher: Any, names: Names = (), teacher_names: Names = ()
    ) -> list[Level]:
        shapes, teacher_shapes = feature_shapes(student), teacher.feature_shapes()
        level_map = build_level_map(shapes, teacher_shapes, names, teacher_names)
        return matched_levels(level_map, shapes, teacher_shapes, align_resolution)

    def match_heads(
        self, cfg: CfgNode, student: Any, teacher: Any, names: Names = (), teacher_names: Names = ()
    ) -> tuple[list[Level], DetectorHeads]:
        options = cfg.MOKD.TEACHER_HEAD
        rpn = stock_rpn(teacher.model) if options.RPN_WEIGHT else None
        reads_boxes = bool(options.CLASS_WEIGHT or options.BOX_WEIGHT)
        read = [*rpn.in_features] if rpn else []
        if reads_boxes:
            teacher.read_boxes()
            read = [*dict.fromkeys([*teacher.reader.in_features, *read])]
        elif not read:
            raise ValueError(
                "MOKD.TEACHER_HEAD.CLASS_WEIGHT and BOX_WEIGHT are 0, and the teacher, a "
                f"{type(teacher.model).__name__}, has no RPN that can be read: set one of them for "
                "an R-CNN or RetinaNet; for others use MOKD.OBJECTIVES ['features']."
            )
        if rpn is None and options.RPN_WEIGHT not in (0, 1):
            raise ValueError(
                f"MOKD.TEACHER_HEAD.RPN_WEIGHT is {options.RPN_WEIGHT}, but the teacher, a "
                f"{type(teacher.model).__name__}, has no RPN that can be read: set it to 1."
            )
        shapes, teacher_shapes = feature_shapes(student), teacher.feature_shapes()
        of_heads = {name: teacher_shapes[name] for name in read}
        level_map = build_head_map(shapes, of_heads, names, teacher_names)
        given = set(level_map.values())
        reader = build_box_reader(teacher.model, "teacher", given) if reads_boxes else None
        if reader is not None and not reader.in_features:
            raise ValueError(
                f"The teacher's heads read boxes on {teacher.reader.in_features}, but the student "
                f"has levels for {sorted(given)} only (of equal stride): name a level for one of "
                "them in MOKD.TEACHER_HEAD.STUDENT and MOKD.TEACHER_HEAD.TEACHER."
            )
        rpn_reader = build_rpn_reader(teacher.model, given) if rpn else None
        read_on: Any = (("boxes", reader, teacher.reader), ("anchors", rpn_reader, rpn))
        for what, part, whole in read_on:
            if part is not None:
                logging.getLogger(__name__).info(
                    f"teacher_head: {what} are read on {', '.join(part.in_features)} of the "
                    f"teacher's {', '.join(whole.in_features)}."
                )
        levels = matched_levels(level_map, shapes, of_heads, onto_grid)
        return levels, DetectorHeads(
            reader,
            rpn_reader,
            options.CLASS_WEIGHT,
            options.BOX_WEIGHT,
            options.RPN_WEIGHT,
        )

    def replace_features(
        self, student: nn.Module, names: Sequence[str], function: Callable[[Features], Features]
    ) -> AbstractContextManager:
        return replace_backbone_features(student.get_submodule("backbone"), function)

    def check_student(self, cfg: CfgNode, student: nn.Module) -> None:
        backbone = getattr(student, "backbone", None)
        if not isinstance(backbone, nn.Module) or not hasattr(backbone, "output_shape"):
            raise ValueError(
                f"MODEL.META_ARCHITECTURE '{cfg.MODEL.META_ARCHITECTURE}' has no 'backbone' with "
                "'output_shape()', which distilling its features needs: see docs/distillation.md, "
                "Your own meta-architecture."
            )
        self.check_recipe(cfg, "two-stage" if hasattr(student, "roi_heads") else "one-stage")

    def check_recipe(self, cfg: CfgNode, kind: str) -> None:
        """Raise ValueError if the config has a recipe for another kind of student."""
        if cfg.MOKD.RECIPE_FOR not in ("", kind):
            raise ValueError(
                f"MOKD.RECIPE_FOR is '{cfg.MOKD.RECIPE_FOR}', for which the recipe's weights were "
                f"published, but the student is a {kind} detector: use the recipe for those, or "
                "set RECIPE_FOR to '' to try these weights."
            )

    def check_pair(
        self, cfg: CfgNode, student: nn.Module, teacher: Teacher, objectives: Sequence[Objective]
    ) -> None:
        """What both sides are given has one number of channels."""
        ours, theirs = (getattr(m, "pixel_mean", None) for m in (student, teacher.model))
        if ours is not None and theirs is not None and ours.numel() != theirs.numel():
            raise ValueError(
                f"MODEL.PIXEL_MEAN has {ours.numel()} entries for the student and "
                f"{theirs.numel()} for the teacher, but both see the same images: use models for "
                "the same number of channels."
            )

    def build_train_loader(self, cfg: CfgNode) -> ResumableLoader:
        return build_resumable_train_loader(cfg, mapper=build_train_mapper(cfg))

    def build_test_loader(self, cfg: CfgNode, name: str) -> Iterable[Any]:
        return build_test_loader(cfg, name)

    def check_config(self, cfg: CfgNode) -> None:
        if not cfg.MOKD.ENABLED:
            return
        options, usual = cfg.MOKD.TEACHER.TORCHSCRIPT, get_cfg().MOKD.TEACHER.TORCHSCRIPT
        if options.FILE:
            ScriptedDetector.check_config(cfg)
            return
        for key in options:
            if options[key] != usual[key]:
                raise ValueError(
                    f"MOKD.TEACHER.TORCHSCRIPT.{key} is {options[key]}, but TORCHSCRIPT.FILE, "
                    "which would be normalised by it, is empty: remove it, or name the file."
                )
        self.teacher_config(cfg)

    def exporter(self, cfg: CfgNode) -> DetectorExporter:
        return DetectorExporter(cfg)


def check_weights_exist(weights: str, options: CfgNode) -> None:
    """Raise FileNotFoundError for a local file of weights, of ``MOKD.TEACHER``, that is not."""
    if "://" not in weights and not PathManager.isfile(weights):
        raise FileNotFoundError(
            f"MOKD.TEACHER.WEIGHTS '{weights}' does not exist (looked in {os.getcwd()}). Train the "
            f"teacher first: mokd train --config-file {options.CONFIG_FILE or 'FILE'}"
        )


def _config_by_name(cfg: CfgNode) -> CfgNode:
    """The config of torchvision's detector ``MOKD.TEACHER.DETECTOR``."""
    options = cfg.MOKD.TEACHER
    check_detector_name(options.DETECTOR, "MOKD.TEACHER.DETECTOR")
    teacher_cfg = load_config("", ["MODEL.META_ARCHITECTURE", "TorchvisionDetector"])
    teacher_cfg.INPUT.FORMAT = "RGB"
    node = teacher_cfg.MODEL.TORCHVISION_DETECTOR
    node.NAME = options.DETECTOR
    # Keypoint R-CNN knows persons only.
    node.NUM_CLASSES = 1 if options.DETECTOR.startswith("keypoint") else len(COCO_NAMES)
    node.COCO_IDS = node.NUM_CLASSES > 1
    merge_overrides(teacher_cfg, options.OPTS, OF_TEACHER)
    return teacher_cfg


def _read_teacher_config(options: CfgNode) -> tuple[CfgNode, str]:
    """Return the teacher's config, and for a name of the model zoo the address of its weights."""
    option = "MOKD.TEACHER.CONFIG_FILE"
    config_file, zoo_weights = find_config(options.CONFIG_FILE, option)
    if not config_file.endswith(".py"):
        return load_config(config_file, options.OPTS, option, OF_TEACHER), zoo_weights
    teacher_cfg = load_config("", ["MODEL.META_ARCHITECTURE", "LazyConfigDetector"])
    teacher_cfg.MODEL.LAZY_CONFIG.FILE = config_file
    teacher_cfg.MODEL.LAZY_CONFIG.OVERRIDES = list(options.OPTS)
    lazy = load_lazy_config(config_file, options.OPTS, option)
    teacher_cfg.INPUT.FORMAT = lazy.model.get("input_format", teacher_cfg.INPUT.FORMAT)
    return teacher_cfg, zoo_weights
