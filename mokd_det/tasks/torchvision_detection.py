# Copyright (c) The mokd_det authors.
"""torchvision's detectors, with Detectron2's data and evaluation."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn
from torchvision.models.detection.ssd import SSD

from ..config import get_cfg
from ..config.bounds import leaves
from ..data import ResumableLoader, check_detection_sets
from ..export import TorchvisionDetectorExporter
from ..modeling import COCO_NAMES, StrictCheckpointer, replace_backbone_features, shortened
from .base import TASKS, Features
from .detection import DetectionTask, check_weights_exist

NODE = "MODEL.TORCHVISION_DETECTOR"
# Detectron2's loader does this for its own detectors; torchvision's do it themselves.
OF_LOADER = (
    *("MIN_SIZE_TRAIN", "MIN_SIZE_TRAIN_SAMPLING", "MAX_SIZE_TRAIN"),
    *("MIN_SIZE_TEST", "MAX_SIZE_TEST"),
)
# What is read of a config's MODEL.
READ = (
    *("MODEL.META_ARCHITECTURE", "MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.MASK_ON", NODE),
    *("MODEL.KEYPOINT_ON", "MODEL.BACKBONE.COMPILE", "MODEL.BACKBONE.CHECKPOINTING"),
)


@TASKS.register("torchvision_detection")
class TorchvisionDetectionTask(DetectionTask):
    """
    The loader gives images in their own size, and the network resizes them. With a teacher both see
    the batch as the student's network has resized it.
    """

    meta_architectures = ("TorchvisionDetector",)
    options = (NODE,)
    stock_options = (NODE,)
    has_stock_step = False

    def load_trained(self, cfg: CfgNode, option: str = "MODEL.WEIGHTS") -> nn.Module:
        model: Any
        if not cfg.MODEL.WEIGHTS:
            if not cfg.MODEL.TORCHVISION_DETECTOR.WEIGHTS:
                raise ValueError(
                    f"MODEL.WEIGHTS and {NODE}.WEIGHTS are empty: add MODEL.WEIGHTS "
                    f"/path/to/model.pth, or {NODE}.WEIGHTS DEFAULT for torchvision's."
                )
            model = build_model(cfg).eval()
            if model.random:
                given = cfg.MODEL.TORCHVISION_DETECTOR.WEIGHTS
                raise ValueError(
                    f"{option} is empty, and {NODE}.WEIGHTS '{given}' is for other classes: "
                    f"{shortened(model.random)} would be random. Name the trained weights in "
                    f"{option} (or, for COCO's classes, set COCO_IDS True)."
                )
            return model
        model = build_model(self.untrained_config(cfg))
        checkpointer = StrictCheckpointer(model.network, option=option)
        checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
        return model.eval()

    def stock_module(self, model: Any) -> nn.Module:
        return model.network

    def untrained_config(self, cfg: CfgNode) -> CfgNode:
        """What torchvision freezes with the weights stays as it is; only their values do not."""
        cfg = super().untrained_config(cfg)
        cfg.MODEL.TORCHVISION_DETECTOR.DOWNLOAD = False
        return cfg

    def with_teacher_weights(self, teacher_cfg: CfgNode, options: CfgNode) -> CfgNode:
        node = teacher_cfg.MODEL.TORCHVISION_DETECTOR
        given = options.WEIGHTS or teacher_cfg.MODEL.WEIGHTS or node.WEIGHTS
        if not given:
            raise ValueError(
                "MOKD.TEACHER.WEIGHTS is empty, and so are the weights of the teacher's config: "
                "give 'DEFAULT', the name of a weight enum, or a file."
            )
        if "/" in given or "." in given or PathManager.isfile(given):
            check_weights_exist(given, options)
            teacher_cfg.MODEL.WEIGHTS = given
            if options.DETECTOR and not node.WEIGHTS:
                node.WEIGHTS = "DEFAULT"  # what it freezes, and its epsilon
        else:
            teacher_cfg.MODEL.WEIGHTS, node.WEIGHTS = "", given
        return teacher_cfg

    def shared_part(self, student: Any) -> nn.Module:
        return student.backbone

    def prepare_batch(self, student: Any, batch: Any) -> Any:
        return student.prepare(batch)

    def replace_features(
        self, student: Any, names: Sequence[str], function: Callable[[Features], Features]
    ) -> AbstractContextManager:
        return replace_backbone_features(student.backbone, function)

    def check_student(self, cfg: CfgNode, student: nn.Module) -> None:
        self.check_recipe(
            cfg, "two-stage" if hasattr(student.network, "roi_heads") else "one-stage"
        )

    def check_batch(self, cfg: CfgNode, student: Any, count: int) -> None:
        if count == 1 and isinstance(student.network, SSD) and has_batch_norm(student.network):
            raise ValueError(
                "SOLVER.IMS_PER_BATCH is too small: a process trains on one image at once "
                "(SOLVER.MICRO_BATCHES divides them, too), and BatchNorm has no statistics of "
                "SSDlite's last map, which is 1 x 1. Use 2 images at once or more."
            )

    def check_config(self, cfg: CfgNode) -> None:
        usual = get_cfg()
        for key, value, default in leaves(cfg, usual, "MODEL"):
            if not key.startswith(READ) and not same(value, default):
                raise ValueError(
                    f"{key} is {value!r}, but torchvision's detectors do not read it: remove it, "
                    f"and see {NODE} (arguments of torchvision's constructor are in its OPTIONS)."
                )
        if cfg.TEST.DETECTIONS_PER_IMAGE != usual.TEST.DETECTIONS_PER_IMAGE:
            raise ValueError(
                f"TEST.DETECTIONS_PER_IMAGE is {cfg.TEST.DETECTIONS_PER_IMAGE}, but torchvision's "
                f"detectors do not read it: remove it, and set box_detections_per_img (R-CNN) or "
                f"detections_per_img in {NODE}.OPTIONS."
            )
        node = cfg.MODEL.TORCHVISION_DETECTOR
        if not node.DOWNLOAD and node.WEIGHTS and not cfg.MODEL.WEIGHTS:
            raise ValueError(
                f"{NODE}.DOWNLOAD is False, but MODEL.WEIGHTS is empty: training would start from "
                "random weights. Set it to True, or name a file in MODEL.WEIGHTS."
            )
        for key in OF_LOADER:
            if cfg.INPUT[key] != usual.INPUT[key]:
                raise ValueError(
                    f"INPUT.{key} is {cfg.INPUT[key]}, but torchvision's detectors resize images "
                    f"themselves: remove it, and set min_size and max_size in {NODE}.OPTIONS."
                )
        name = cfg.MODEL.TORCHVISION_DETECTOR.NAME
        for key, prefix in (("MASK_ON", "maskrcnn"), ("KEYPOINT_ON", "keypointrcnn")):
            if cfg.MODEL[key] != name.startswith(prefix):
                raise ValueError(
                    f"MODEL.{key} is {cfg.MODEL[key]}, but {NODE}.NAME is '{name}': set it to "
                    f"{name.startswith(prefix)}."
                )
        super().check_config(cfg)

    def check_data(self, cfg: CfgNode, options: Sequence[str] = ("TRAIN", "TEST")) -> None:
        node = cfg.MODEL.TORCHVISION_DETECTOR
        if node.COCO_IDS:  # also the heads' order is COCO's then
            head = f"{NODE}.NUM_CLASSES", node.NUM_CLASSES
            check_detection_sets(in_own_size(cfg), options, head, COCO_NAMES)
        else:
            super().check_data(in_own_size(cfg), options)

    def build_train_loader(self, cfg: CfgNode) -> ResumableLoader:
        return super().build_train_loader(in_own_size(cfg))

    def build_test_loader(self, cfg: CfgNode, name: str) -> Iterable[Any]:
        return super().build_test_loader(in_own_size(cfg), name)

    def exporter(self, cfg: CfgNode) -> TorchvisionDetectorExporter:
        return TorchvisionDetectorExporter(cfg)


def in_own_size(cfg: CfgNode) -> CfgNode:
    """Return a config whose loaders leave images in their size."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = (0,), "choice"
    cfg.INPUT.MIN_SIZE_TEST = 0
    return cfg


def has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def same(value: Any, default: Any) -> bool:
    """Whether two options are equal; YAML has lists where a default is a tuple."""
    return value == default or (isinstance(default, (list, tuple)) and [*value] == [*default])
