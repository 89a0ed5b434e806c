# Copyright (c) The mokd_det authors.
"""The objective that lets the teacher's heads read the student's features."""

import logging

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from mokd_det.engine import DistillationTrainer, validate
from mokd_det.objectives import StudentOutputs

from ..conftest import OUTPUTS_ONLY
from ..modeling.families import FCOS, batch_of, saved_teacher, step

HEADS = [*OUTPUTS_ONLY, "MOKD.OBJECTIVES", ["teacher_head"]]
BOXES = {"loss_teacher_head_classes", "loss_teacher_head_boxes"}
RPN = {"loss_teacher_head_rpn_cls", "loss_teacher_head_rpn_loc"}


def built(cfg):
    """Return (model, batch, the teacher's outputs, the objective)."""
    model, batch = DistillationTrainer.build_model(cfg), batch_of(cfg)
    outputs = model.teacher.run(batch, cfg.INPUT.FORMAT)
    return model, batch, outputs, model.objectives["teacher_head"]


@pytest.mark.parametrize(
    "family",
    [
        "faster_rcnn",
        "retinanet",
        pytest.param("retinanet_BN", marks=pytest.mark.slow),
        pytest.param("cascade_rcnn", marks=pytest.mark.slow),
        pytest.param("mask_rcnn", marks=pytest.mark.slow),
        pytest.param("faster_rcnn_C4", marks=pytest.mark.slow),
        pytest.param("faster_rcnn_DC5", marks=pytest.mark.slow),
    ],
)
def test_the_teachers_own_features_have_nothing_to_learn(family_cfg, tmp_path, family):
    """With the identity as projector the heads give the teacher's own answer: rounding is left."""
    cfg = family_cfg(family)
    torch.manual_seed(5)
    opts = saved_teacher(cfg, build_model(cfg), tmp_path)
    model, batch, teacher, objective = built(family_cfg(family, [*opts, *HEADS]))
    for projector in objective.projectors.values():
        nn.init.dirac_(projector.weight)
    with torch.no_grad():
        losses = objective(StudentOutputs(teacher.features, batch), teacher)
    assert set(losses) == (BOXES if "retinanet" in family else BOXES | RPN)
    assert all(abs(loss) < 1e-4 for loss in losses.values()), losses
    features = {name: x.flip(1) for name, x in teacher.features.items()}
    with torch.no_grad():
        losses = objective(StudentOutputs(features, batch), teacher)
    assert max(losses.values()) > 1e-3
