# Copyright (c) The mokd_det authors.
"""The frozen detector: its own config, its own weights, its own preprocessing."""

import dataclasses
import os

import torch
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from ..config import find_config, load_config
from .acceleration import pool_in_float32
from .frozen_teacher import FrozenTeacher, speed_options
from .lazy_config import load_lazy_config
from .loading import StrictCheckpointer
from .outputs import Outputs, build_output_reader
from .rpn_outputs import AnchorOutputs
from .scripted import ScriptedDetector

__all__ = ["Teacher", "TeacherView", "build_teacher", "teacher_config"]


@dataclasses.dataclass
class TeacherView:
    """
    What the teacher sees in one batch, without gradients.

    Attributes:
        features (dict[str, Tensor]): name -> (N, C, H / stride, W / stride).
        image_sizes (list[tuple[int]]): (height, width) before padding.
        proposals (list[Tensor] or None): for each image (P_i, 4) boxes, XYXY in pixels.
        state: what the output reader needs to say more.
        targets (Outputs or None): at the student's boxes, once they are known.
        rpn_targets (AnchorOutputs or None): its RPN's, once they are asked for.
    """

    features: dict
    image_sizes: list
    proposals: list | None = None
    state: object = None
    targets: Outputs | None = None
    rpn_targets: AnchorOutputs | None = None


class Teacher(FrozenTeacher):
    """A frozen detector."""

    def __init__(self, model, input_format, *, proposals=0, **options):
        """
        Args:
            model (nn.Module): a Detectron2 detector with ``backbone`` and ``preprocess_image``.
            input_format (str): the channel order it was trained with, "RGB" or "BGR".
            proposals (int): most boxes an image at which its outputs are read; 0: features only.
            options: of :class:`FrozenTeacher`.

        Raises:
            ValueError: an option that this model or machine does not have.
        """
        if options.get("compile") and isinstance(model, ScriptedDetector):
            raise ValueError(
                f"MOKD.TEACHER.COMPILE is '{options['compile']}', but a TorchScript file is "
                "compiled already: set it to ''."
            )
        super().__init__(model, model.backbone, **options)
        self.input_format = input_format
        self.proposals = proposals
        self.reader = build_output_reader(model, "teacher") if proposals else None
        if self.precision != torch.float32:  # else it may run under the student's autocast
            pool_in_float32(self.model)

    def feature_shapes(self):
        """Return dict[str, ShapeSpec] of the backbone's feature maps."""
        return self.model.backbone.output_shape()

    def view(self, batched_inputs, input_format):
        """
        Run the backbone, and the first stage or the head if outputs are wanted.

        Args:
            batched_inputs (list[dict]): Detectron2's, each with ``image``, a (C, H, W) tensor of
                the student's data loader: unnormalised, before the student's preprocessing.
            input_format (str): channel order of these images.

        Returns:
            TeacherView: under the teacher's own normalisation and padding. On a stream of its
            own, its tensors are ready after :meth:`wait`.
        """
        return self._run_beside(self._view, batched_inputs, input_format)

    def _view(self, batched_inputs, input_format):
        if input_format != self.input_format:
            batched_inputs = [{"image": x["image"].flip(0)} for x in batched_inputs]
        images = self.model.preprocess_image(batched_inputs)
        tensor = images.tensor.contiguous(memory_format=self.memory_format)
        features = self.model.backbone(tensor)
        view = TeacherView(features, images.image_sizes)
        if self.proposals:
            view.state = self.reader.run(features)
            view.proposals = self.reader.propose(view.state, images, self.proposals)
        if self.precision is not None:
            # The student's side may have another precision, and no autocast to bridge it.
            view.features = {name: x.float() for name, x in features.items()}
        return view

    def outputs(self, view, boxes):
        """
        Args:
            view (TeacherView): of this teacher.
            boxes (list[Tensor]): for each image (R_i, 4), XYXY in pixels.

        Returns:
            Outputs: at these boxes.
        """
        return self._run(self.reader.at, view.state, boxes, view.image_sizes)

    def rpn_outputs(self, view, reader):
        """Return the :class:`AnchorOutputs` of this teacher's :class:`RPNReader`."""
        return self._run(reader, view.state)

    def objects(self, view, threshold):
        """Return, for each image, the (B_i, 4) boxes that it is sure of beyond ``threshold``."""
        outputs = self.outputs(view, view.proposals)
        confidence, classes = outputs.confidence()
        counts = [len(boxes) for boxes in view.proposals]
        boxes = outputs.boxes_of(classes).split(counts)
        return [b[c > threshold] for b, c in zip(boxes, confidence.split(counts))]


def teacher_config(cfg):
    """
    Args:
        cfg (CfgNode): the student's config, with ``MOKD.TEACHER``.

    Returns:
        CfgNode: the teacher's own config, on the student's device.

    Raises:
        ValueError, FileNotFoundError: config or weights are not given or missing.
    """
    options = cfg.MOKD.TEACHER
    if options.CLASSIFIER:
        raise ValueError(
            f"MOKD.TEACHER.CLASSIFIER is '{options.CLASSIFIER}', but the student is no classifier "
            "(MODEL.META_ARCHITECTURE): name a detector in MOKD.TEACHER.CONFIG_FILE."
        )
    if not options.CONFIG_FILE:
        raise ValueError(
            "MOKD.TEACHER.CONFIG_FILE is empty: name the config file that the teacher was "
            "trained with, and its weights in MOKD.TEACHER.WEIGHTS."
        )
    option = "MOKD.TEACHER.CONFIG_FILE"
    config_file, zoo_weights = find_config(options.CONFIG_FILE, option)
    if config_file.endswith(".py"):
        teacher_cfg = load_config("", ["MODEL.META_ARCHITECTURE", "LazyConfigDetector"])
        teacher_cfg.MODEL.LAZY_CONFIG.FILE = config_file
        teacher_cfg.MODEL.LAZY_CONFIG.OVERRIDES = list(options.OPTS)
        lazy = load_lazy_config(config_file, options.OPTS, option)
        teacher_cfg.INPUT.FORMAT = lazy.model.get("input_format", teacher_cfg.INPUT.FORMAT)
    else:
        teacher_cfg = load_config(config_file, options.OPTS, option=option)
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    # All weights come from the file below, so none are downloaded for the backbone alone.
    teacher_cfg.MODEL.TORCHVISION.WEIGHTS = ""
    if not options.WEIGHTS and zoo_weights and "MODEL.WEIGHTS" not in options.OPTS:
        teacher_cfg.MODEL.WEIGHTS = zoo_weights
    teacher_cfg.MODEL.WEIGHTS = options.WEIGHTS or teacher_cfg.MODEL.WEIGHTS
    if not teacher_cfg.MODEL.WEIGHTS:
        raise ValueError(
            "MOKD.TEACHER.WEIGHTS is empty, and so is MODEL.WEIGHTS of "
            f"'{options.CONFIG_FILE}': name the teacher's trained weights."
        )
    is_local = "://" not in teacher_cfg.MODEL.WEIGHTS
    if is_local and not PathManager.isfile(teacher_cfg.MODEL.WEIGHTS):
        raise FileNotFoundError(
            f"MOKD.TEACHER.WEIGHTS '{teacher_cfg.MODEL.WEIGHTS}' does not exist (looked in "
            f"{os.getcwd()}). Train the teacher first: tools/train_net.py --config-file "
            f"{options.CONFIG_FILE}"
        )
    return teacher_cfg


def build_teacher(cfg):
    """
    Build the teacher of ``cfg.MOKD.TEACHER`` and load its weights strictly.

    Args:
        cfg (CfgNode): the student's config.

    Returns:
        Teacher

    Raises:
        ValueError, FileNotFoundError: see :func:`teacher_config`; or a teacher that the student's
            images or options do not suit.
    """
    options = cfg.MOKD.TEACHER
    if options.TORCHSCRIPT.FILE:
        model = ScriptedDetector.from_config(cfg)
        input_format = options.TORCHSCRIPT.INPUT_FORMAT
    else:
        teacher_cfg = teacher_config(cfg)
        model = build_model(teacher_cfg)
        input_format = teacher_cfg.INPUT.FORMAT
        for name in ("backbone", "preprocess_image"):
            if not hasattr(model, name):
                raise ValueError(
                    f"The teacher's MODEL.META_ARCHITECTURE "
                    f"'{teacher_cfg.MODEL.META_ARCHITECTURE}' has no '{name}', which distilling "
                    "its features needs."
                )
        StrictCheckpointer(model, option="MOKD.TEACHER.WEIGHTS").load(
            teacher_cfg.MODEL.WEIGHTS, checkpointables=[]
        )
    formats = {cfg.INPUT.FORMAT, input_format}
    if len(formats) > 1 and formats != {"RGB", "BGR"}:
        raise ValueError(
            f"INPUT.FORMAT is '{cfg.INPUT.FORMAT}' for the student and '{input_format}' for the "
            "teacher: only RGB and BGR can be converted into each other. Train both with the same "
            "format."
        )
    features = cfg.MOKD.FEATURES
    foreground = features.ENABLED and features.FOREGROUND == "teacher"
    reads_outputs = cfg.MOKD.OUTPUTS.ENABLED or foreground
    if reads_outputs and cfg.MOKD.OUTPUTS.PROPOSALS < 1:
        raise ValueError(
            f"MOKD.OUTPUTS.PROPOSALS is {cfg.MOKD.OUTPUTS.PROPOSALS}: expected 1 or more."
        )
    return Teacher(
        model,
        input_format,
        proposals=cfg.MOKD.OUTPUTS.PROPOSALS if reads_outputs else 0,
        **speed_options(cfg),
    )
