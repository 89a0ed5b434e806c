# Copyright (c) The mokd_det authors.
"""Parts of the student that start from the teacher's weights."""

import pytest
import torch
from detectron2.modeling import build_model

from mokd_det.config import load_config
from mokd_det.engine import build_trainer
from mokd_det.modeling import inheritable_names

from ..conftest import CONFIGS

# As wide as the teacher in FPN and heads; the backbones are of other families.
WIDE = ["MODEL.FPN.OUT_CHANNELS", 128, "MODEL.ROI_BOX_HEAD.FC_DIM", 256]


@pytest.mark.parametrize("average", [0.0, pytest.param(0.9, marks=pytest.mark.slow)])
def test_fpn_and_heads_start_from_the_teachers(make_cfg, teacher_weights, average):
    prefixes = ["backbone.fpn_output", "proposal_generator", "roi_heads"]
    opts = [*WIDE, "MOKD.INHERIT", prefixes, "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 0]
    cfg = make_cfg("mokd", [*opts, "SOLVER.EMA_DECAY", average])
    plain = build_trainer(make_cfg("mokd", [*WIDE, "SOLVER.EMA_DECAY", average], "plain"))
    trainer = build_trainer(cfg)
    trainer.resume_or_load(False)
    teacher = torch.load(teacher_weights)["model"]
    state = trainer._trainer.model.student.state_dict()
    inherited = {key for key in state if key.startswith(tuple(prefixes))}
    assert inherited == set(trainer.inherited)
    models = [trainer._trainer.model.student]
    models += [trainer.average.model] if average else []
    for model in models:
        for key, value in model.state_dict().items():
            if key in inherited:
                assert torch.equal(value, teacher[key]), key
    fresh = plain._trainer.model.student.state_dict()
    assert not any(torch.equal(fresh[k], teacher[k]) for k in inherited if "weight" in k)

    # A resumed run goes on with what it has learned.
    trainer.train()
    learned = trainer._trainer.model.student.state_dict()
    cfg.SOLVER.MAX_ITER = 3
    resumed = build_trainer(cfg)
    resumed.resume_or_load(True)
    key = "roi_heads.box_predictor.cls_score.weight"
    resumed_state = resumed._trainer.model.student.state_dict()
    assert torch.equal(resumed_state[key], learned[key])
    assert not torch.equal(learned[key], teacher[key])


def test_what_does_not_fit_is_listed(make_cfg, teacher_weights, caplog):
    student = build_model(make_cfg("faster_rcnn"))
    teacher = build_model(load_config(CONFIGS["teacher"], ["MODEL.TORCHVISION.WEIGHTS", ""]))
    with caplog.at_level("INFO", "mokd_det.modeling.inherit"):
        names = inheritable_names(student, teacher, ["proposal_generator"])
    biases = "proposal_generator.rpn_head.anchor_deltas.bias"
    assert biases in names and f"Inherited from the teacher: {names[0]}" in caplog.text
    wrong = "proposal_generator.rpn_head.conv.weight"
    assert wrong not in names
    assert f"{wrong} (64, 64, 3, 3) (teacher (128, 128, 3, 3))" in caplog.text
    with pytest.raises(ValueError, match=r"MOKD.INHERIT has 'backbone.bottom_up.res'.*teacher: no"):
        inheritable_names(student, teacher, ["backbone.bottom_up.res"])
    with pytest.raises(ValueError, match="the student has no such name"):
        inheritable_names(student, teacher, ["neck"])
    with pytest.raises(ValueError, match="MOKD.INHERIT has 'neck'"):  # before training
        build_trainer(make_cfg("mokd", ["MOKD.INHERIT", ["neck"]]))


def test_the_layer_that_sees_the_images_needs_the_same_images(make_cfg):
    student = build_model(make_cfg("faster_rcnn"))
    same = build_model(make_cfg("faster_rcnn"))
    stem = "backbone.bottom_up.stem.conv1.weight"
    assert stem in inheritable_names(student, same, ["backbone.bottom_up"])
    other = build_model(make_cfg("faster_rcnn", ["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]]))
    with pytest.raises(ValueError, match=f"'{stem}', which sees the images"):
        inheritable_names(student, other, ["backbone.bottom_up"])
    assert inheritable_names(student, other, ["backbone.bottom_up.res4"])
