# Copyright (c) The mokd_det authors.
"""The frozen classifier: the student's images, under its own normalisation and resolution."""

import dataclasses
import os

import torch
import torch.nn.functional as F
from detectron2.utils.file_io import PathManager

from ...config import find_config, load_config, merge_overrides
from ..frozen_teacher import FrozenTeacher, speed_options
from .classifier import is_classifier, load_trained_classifier, without_initial_weights
from .networks import input_normalisation
from .taps import PRE_LOGITS

__all__ = [
    "ClassifierTeacher",
    "ClassifierView",
    "build_classifier_teacher",
    "classifier_teacher_config",
    "teacher_images",
]


@dataclasses.dataclass
class ClassifierView:
    """
    What the teacher sees in one batch, without gradients.

    Attributes:
        features (dict[str, Tensor]): by tap.
        logits (Tensor): (N, C).
    """

    features: dict
    logits: torch.Tensor


class ClassifierTeacher(FrozenTeacher):
    """A frozen classifier."""

    def __init__(self, model, image_size, is_resized=False, **options):
        """
        Args:
            model (Classifier):
            image_size (int): side of the images that it sees, in pixels.
            is_resized (bool): the student's images have another size.
            options: of :class:`FrozenTeacher`.

        Raises:
            ValueError: an option that this model or machine does not have.
        """
        super().__init__(model, model.network, **options)
        self.image_size = image_size
        self.is_resized = is_resized
        self._taps = ()
        self._found = {}

    @property
    def taps(self):
        """tuple[str]: submodules, or ``PRE_LOGITS``, whose features a view has; set once."""
        return self._taps

    @taps.setter
    def taps(self, names):
        # Hooks for good, unlike the student's: the teacher is ours, and may be compiled.
        assert not self._taps, "[ClassifierTeacher] taps are set once"
        self._taps = tuple(names)
        for name in self._taps:
            if name == PRE_LOGITS:
                hook = lambda _module, args: (self._keep(PRE_LOGITS, args[0]),)  # noqa: E731
                self.model.head.register_forward_pre_hook(hook)
            else:
                hook = lambda _m, _args, output, name=name: self._keep(name, output)  # noqa: E731
                self.model.network.get_submodule(name).register_forward_hook(hook)

    def _keep(self, name, feature):
        self._found[name] = feature
        return feature.clone()  # goes on: what follows may work in place, as on the student's side

    def view(self, batch, input_format="RGB"):
        """
        Args:
            batch (Batch): of the student's loader.
            input_format: always "RGB".

        Returns:
            ClassifierView: on a stream of its own, its tensors are ready after :meth:`wait`.
        """
        return self._run_beside(self._view, batch.images)

    def _view(self, images):
        images = images.to(self.model.device, torch.float32, non_blocking=True)
        if self.is_resized:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        images = self.model.preprocess(images).contiguous(memory_format=self.memory_format)
        self._found.clear()
        logits = self.model.network(images)
        view = ClassifierView(dict(self._found), logits)
        if self.precision is not None:
            # The student's side may have another precision, and no autocast to bridge it.
            view.features = {name: x.float() for name, x in view.features.items()}
            view.logits = logits.float()
        return view


def classifier_teacher_config(cfg):
    """
    Args:
        cfg (CfgNode): the student's config, with ``MOKD.TEACHER``.

    Returns:
        CfgNode: the teacher's own config, on the student's device.

    Raises:
        ValueError, FileNotFoundError: teacher or weights are not given, missing, or no classifier.
    """
    options = cfg.MOKD.TEACHER
    if bool(options.CLASSIFIER) == bool(options.CONFIG_FILE) or options.TORCHSCRIPT.FILE:
        raise ValueError(
            f"MOKD.TEACHER.CLASSIFIER is '{options.CLASSIFIER}', CONFIG_FILE "
            f"'{options.CONFIG_FILE}' and TORCHSCRIPT.FILE '{options.TORCHSCRIPT.FILE}': for a "
            "classifier give one of the first two, a network's name or the teacher's config file."
        )
    if options.CLASSIFIER:
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
    else:
        option = "MOKD.TEACHER.CONFIG_FILE"
        config_file, _ = find_config(options.CONFIG_FILE, option)
        teacher_cfg = load_config(config_file, options.OPTS, option=option)
    if not is_classifier(teacher_cfg):
        raise ValueError(
            f"MOKD.TEACHER.CONFIG_FILE '{options.CONFIG_FILE}' has MODEL.META_ARCHITECTURE "
            f"'{teacher_cfg.MODEL.META_ARCHITECTURE}', but the student is a classifier: name a "
            "classifier's config."
        )
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    given = options.WEIGHTS or teacher_cfg.MODEL.WEIGHTS or teacher_cfg.MODEL.CLASSIFIER.WEIGHTS
    if not given:
        raise ValueError(
            "MOKD.TEACHER.WEIGHTS is empty, and so are the weights of the teacher's config: give "
            "'DEFAULT', the name of a weight enum, or a file."
        )
    is_file = "://" in given or PathManager.isfile(given)
    if not is_file and ("/" in given or os.path.splitext(given)[1]):
        raise FileNotFoundError(
            f"MOKD.TEACHER.WEIGHTS '{given}' does not exist (looked in {os.getcwd()}). Train the "
            "teacher first, or give 'DEFAULT' for its ImageNet weights."
        )
    if is_file:
        teacher_cfg = without_initial_weights(teacher_cfg)
    else:
        teacher_cfg.MODEL.CLASSIFIER.WEIGHTS = given
    teacher_cfg.MODEL.WEIGHTS = given if is_file else ""
    return teacher_cfg


def teacher_images(cfg):
    """
    Args:
        cfg (CfgNode): the student's config.

    Returns:
        CfgNode: its ``INPUT.CLASSIFICATION``, evaluated at ``MOKD.TEACHER.IMAGE_SIZE`` if there is
        one.
    """
    images = cfg.INPUT.CLASSIFICATION.clone()
    images.defrost()
    if size := cfg.MOKD.TEACHER.IMAGE_SIZE:
        images.SIZE_TEST = images.RESIZE_TEST = size
    return images


def build_classifier_teacher(cfg):
    """
    Build the teacher of ``cfg.MOKD.TEACHER`` and load its weights strictly.

    Args:
        cfg (CfgNode): the student's config.

    Returns:
        ClassifierTeacher

    Raises:
        ValueError, FileNotFoundError: see :func:`classifier_teacher_config`.
    """
    size = cfg.MOKD.TEACHER.IMAGE_SIZE
    if size < 0:
        raise ValueError(
            f"MOKD.TEACHER.IMAGE_SIZE is {size}: expected 0 (the student's) or a number of pixels."
        )
    student_size = cfg.INPUT.CLASSIFICATION.SIZE_TRAIN
    model = load_trained_classifier(classifier_teacher_config(cfg), "MOKD.TEACHER.WEIGHTS")
    size = size or student_size
    return ClassifierTeacher(model, size, size != student_size, **speed_options(cfg))
