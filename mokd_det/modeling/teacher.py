# Copyright (c) The mokd_det authors.
"""The frozen teacher: its own config, its own weights, its own preprocessing."""

import os

import torch
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from ..config import load_config
from .loading import StrictCheckpointer

__all__ = ["Teacher", "build_teacher", "teacher_config"]


class Teacher:
    """
    A detector that is only ever run, in eval mode and without gradients.

    Deliberately no ``nn.Module``: whatever holds a Teacher shows none of it in ``parameters()``,
    ``state_dict()``, the optimizer or DistributedDataParallel.
    """

    def __init__(self, model, input_format):
        """
        Args:
            model (nn.Module): a Detectron2 detector with ``backbone`` and ``preprocess_image``.
            input_format (str): the channel order it was trained with, "RGB" or "BGR".
        """
        self.model = model.eval().requires_grad_(False)
        self.input_format = input_format

    def feature_shapes(self):
        """Return dict[str, ShapeSpec] of the backbone's feature maps."""
        return self.model.backbone.output_shape()

    @torch.no_grad()
    def features(self, batched_inputs, input_format):
        """
        Run the backbone only.

        Args:
            batched_inputs (list[dict]): Detectron2's, each with ``image``, a (C, H, W) tensor of
                the student's data loader: unnormalised, before the student's preprocessing.
            input_format (str): channel order of these images.

        Returns:
            dict[str, Tensor]: name -> (N, C, H / stride, W / stride), under the teacher's own
            normalisation and padding.
        """
        # Again at every step: nothing that walks over modules may have left it in train mode.
        self.model.eval()
        if input_format != self.input_format:
            batched_inputs = [{"image": x["image"].flip(0)} for x in batched_inputs]
        images = self.model.preprocess_image(batched_inputs)
        return self.model.backbone(images.tensor)


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
    if not options.CONFIG_FILE:
        raise ValueError(
            "MOKD.TEACHER.CONFIG_FILE is empty: name the config file that the teacher was "
            "trained with, and its weights in MOKD.TEACHER.WEIGHTS."
        )
    teacher_cfg = load_config(options.CONFIG_FILE, options.OPTS, option="MOKD.TEACHER.CONFIG_FILE")
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    # All weights come from the file below, so none are downloaded for the backbone alone.
    teacher_cfg.MODEL.TORCHVISION.WEIGHTS = ""
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
    if cfg.INPUT.FORMAT != teacher_cfg.INPUT.FORMAT and {
        cfg.INPUT.FORMAT,
        teacher_cfg.INPUT.FORMAT,
    } != {"RGB", "BGR"}:
        raise ValueError(
            f"INPUT.FORMAT is '{cfg.INPUT.FORMAT}' for the student and "
            f"'{teacher_cfg.INPUT.FORMAT}' for the teacher: only RGB and BGR can be converted "
            "into each other. Train both with the same format."
        )
    return teacher_cfg


def build_teacher(cfg):
    """
    Build the teacher of ``cfg.MOKD.TEACHER`` and load its weights strictly.

    Args:
        cfg (CfgNode): the student's config.

    Returns:
        Teacher
    """
    teacher_cfg = teacher_config(cfg)
    model = build_model(teacher_cfg)
    for name in ("backbone", "preprocess_image"):
        if not hasattr(model, name):
            raise ValueError(
                f"The teacher's MODEL.META_ARCHITECTURE '{teacher_cfg.MODEL.META_ARCHITECTURE}' "
                f"has no '{name}', which distilling its features needs."
            )
    StrictCheckpointer(model, option="MOKD.TEACHER.WEIGHTS").load(
        teacher_cfg.MODEL.WEIGHTS, checkpointables=[]
    )
    return Teacher(model, teacher_cfg.INPUT.FORMAT)
