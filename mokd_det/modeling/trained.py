# Copyright (c) The mokd_det authors.
"""Trained models of a config, whether it is a detector's or a classifier's."""

from detectron2.modeling import build_model

from .classification import classifier_teacher_config, is_classifier, load_trained_classifier
from .loading import StrictCheckpointer
from .teacher import teacher_config as detector_teacher_config

__all__ = ["load_trained_model", "teacher_config"]


def teacher_config(cfg):
    """See :func:`mokd_det.modeling.teacher.teacher_config`; also for classifiers."""
    return (classifier_teacher_config if is_classifier(cfg) else detector_teacher_config)(cfg)


def load_trained_model(cfg, option="MODEL.WEIGHTS"):
    """
    Build the plain model of a config (the student, if it distils) with its trained weights.

    Args:
        cfg (CfgNode): with ``MODEL.WEIGHTS``.
        option (str): the config key they were given with, for messages.

    Returns:
        nn.Module: in eval mode.

    Raises:
        ValueError: no weights given, or they do not fit.
    """
    if is_classifier(cfg):
        return load_trained_classifier(cfg, option)
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("MODEL.WEIGHTS is empty: add MODEL.WEIGHTS /path/to/model.pth")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.TORCHVISION.WEIGHTS = ""  # MODEL.WEIGHTS holds the backbone as well
    model = build_model(cfg)
    StrictCheckpointer(model, option=option).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    return model.eval()
