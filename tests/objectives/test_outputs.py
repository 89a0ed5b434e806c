# Copyright (c) The mokd_det authors.
"""The objective that matches what two detectors say."""

import logging

import pytest
import torch
from detectron2.modeling import build_model

from mokd_det.engine import DistillationTrainer, validate
from mokd_det.objectives import StudentOutputs

from ..conftest import OUTPUTS, OUTPUTS_ONLY
from ..modeling.families import batch_of, saved_teacher, step

BOXES = {"loss_output_classes", "loss_output_boxes"}
RPN = {"loss_output_rpn_cls", "loss_output_rpn_loc"}


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet", "cascade_rcnn"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(family_cfg, tmp_path, family):
    cfg = family_cfg(family)
    torch.manual_seed(5)
    opts = saved_teacher(cfg, build_model(cfg), tmp_path)
    cfg = family_cfg(family, [*opts, *OUTPUTS_ONLY])
    model, batch = DistillationTrainer.build_model(cfg), batch_of(cfg)
    model.student.load_state_dict(model.teacher.model.state_dict())
    model.student.eval()  # BatchNorm as the teacher's
    teacher = model.teacher.run(batch, cfg.INPUT.FORMAT)
    objective = model.objectives["outputs"]
    with torch.no_grad():
        losses = objective(StudentOutputs(teacher.features, batch), teacher)
    assert set(losses) == (BOXES if family == "retinanet" else BOXES | RPN)
    assert all(abs(loss) < 1e-5 for loss in losses.values()), losses
    with torch.no_grad():
        objective.used_parameters().borrowed[-1].add_(1.0)
        losses = objective(StudentOutputs(teacher.features, batch), teacher)
    assert max(losses.values()) > 1e-3


@pytest.mark.parametrize(
    "family, measured_at",
    [
        ("faster_rcnn", "features"),
        pytest.param("faster_rcnn", "parameters", marks=pytest.mark.slow),
        pytest.param("retinanet", "features", marks=pytest.mark.slow),
        pytest.param("retinanet", "parameters", marks=pytest.mark.slow),
    ],
)
def test_the_students_head_gets_the_weighted_gradient(family_cfg, family, measured_at):
    """Weights (1, 0, 2): head and backbone get task + 2 outputs, measured one by one."""
    gradients = {}
    for weights in ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 2.0)):
        opts = ["MOKD.ENABLED", True, *OUTPUTS, "MOKD.BALANCING.RULE", "fixed"]
        opts += ["MOKD.BALANCING.FIXED.WEIGHTS", list(weights)]
        cfg = family_cfg(family, [*opts, "MOKD.BALANCING.MEASURE_AT", measured_at])
        torch.manual_seed(2)
        model = DistillationTrainer.build_model(cfg)
        batch = batch_of(cfg)
        torch.manual_seed(4)
        # The same bits in every pass of RetinaNet's loss.
        with torch.jit.optimized_execution(False):
            step(model, batch)
        gradients[weights] = {n: p.grad for n, p in model.student.named_parameters()}
    task, both_heads, all_three = gradients.values()
    heads = [n for n in task if not n.startswith("backbone") and task[n] is not None]
    trained = {id(p) for p in model.objectives["outputs"].used_parameters().borrowed}
    names = {n for n, p in model.student.named_parameters() if id(p) in trained}
    assert names and names <= set(heads)
    for name in task:
        if name.startswith("backbone"):
            expected = task[name] + 2 * both_heads[name]
        else:  # heads get the plain task gradient in each run
            outputs_only = both_heads[name] - task[name]
            expected = task[name] + 2 * outputs_only
            assert (outputs_only.abs().max() > 0) == (name in names), name
        assert torch.allclose(all_three[name], expected, rtol=2e-3, atol=1e-5), name


def losses_of(cfg):
    """Return (model, losses of its objective "outputs")."""
    torch.manual_seed(0)
    model, batch = DistillationTrainer.build_model(cfg), batch_of(cfg)
    teacher = model.teacher.run(batch, cfg.INPUT.FORMAT)
    features = model.student.backbone(model.student.preprocess_image(batch).tensor)
    return model, model.objectives["outputs"](StudentOutputs(features, batch), teacher)


def borrowed(model):
    return {id(p) for p in model.objectives["outputs"].used_parameters().borrowed}


def test_the_log_says_what_is_compared(make_cfg, caplog):
    with caplog.at_level(logging.INFO, logger="mokd_det"):
        _, losses = losses_of(make_cfg("mokd", OUTPUTS))
    assert "the RPNs of both sides are compared on p3, p4, p5, p6 of p3, p4, p5, p6" in caplog.text
    assert set(losses) == BOXES | RPN
    caplog.clear()
    anchors = ["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [9], [10], [11]]]
    with caplog.at_level(logging.INFO, logger="mokd_det"):
        _, losses = losses_of(make_cfg("mokd", [*OUTPUTS, *anchors]))
    assert "not compared: on no level do both have one with the same anchors" in caplog.text
    assert set(losses) == BOXES


def test_weights_multiply_and_zero_leaves_out(make_cfg):
    model, once = losses_of(make_cfg("mokd", OUTPUTS))
    assert {id(p) for p in model.student.proposal_generator.parameters()} <= borrowed(model)
    rpn, classes, boxes = (f"MOKD.OUTPUTS.{x}_WEIGHT" for x in ("RPN", "CLASS", "BOX"))
    _, other = losses_of(make_cfg("mokd", [*OUTPUTS, rpn, 3.0, classes, 0.0]))
    assert set(other) == {"loss_output_boxes", *RPN}
    for name in RPN:
        assert torch.allclose(3 * once[name], other[name])
    assert torch.equal(once["loss_output_boxes"], other["loss_output_boxes"])
    model, other = losses_of(make_cfg("mokd", [*OUTPUTS, rpn, 0.0, boxes, 2.0]))
    assert set(other) == BOXES
    assert torch.equal(2 * once["loss_output_boxes"], other["loss_output_boxes"])
    assert torch.equal(once["loss_output_classes"], other["loss_output_classes"])
    assert not {id(p) for p in model.student.proposal_generator.parameters()} & borrowed(model)


@pytest.mark.parametrize(
    "opts, message",
    [
        (["TEMPERATURE", 0.0], "MOKD.OUTPUTS.TEMPERATURE is 0.0: expected a finite number > 0"),
        (["BOX_WEIGHT", -1.0], "OUTPUTS.BOX_WEIGHT is -1.0: expected a finite number >= 0"),
        (["RPN_WEIGHT", float("nan")], "RPN_WEIGHT is nan: expected a finite number >= 0"),
        (["TEMPERATURE", float("inf")], "OUTPUTS.TEMPERATURE is inf: expected a finite number"),
        (
            ["LOSS", "dist", "MOKD.OUTPUTS.CLASS_WEIGHT", 0.0],
            "OUTPUTS.LOSS is 'dist', but it is read for classes only, and MOKD.OUTPUTS.CLASS_WEI",
        ),
        (["RPN_WEIGHT", -1.0], "RPN_WEIGHT is -1.0: expected a finite number >= 0"),
        (["LOSS", "mse"], "MOKD.OUTPUTS.LOSS is 'mse': expected one of 'kl', 'dkd', 'dist'"),
        (["DKD_BETA", 0.25], "MOKD.OUTPUTS.DKD_BETA is 0.25, but it is read with LOSS 'dkd' only"),
        (
            ["BOX_WEIGHT", 0.0, "MOKD.OUTPUTS.CLASS_WEIGHT", 0.0],
            "CLASS_WEIGHT 0.0, .* expected one of CLASS_WEIGHT, BOX_WEIGHT above",
        ),
    ],
)
def test_bad_options_are_explained(make_cfg, opts, message):
    cfg = make_cfg("mokd", [*OUTPUTS, f"MOKD.OUTPUTS.{opts[0]}", *opts[1:]])
    with pytest.raises(ValueError, match=message):
        validate(cfg)


def test_other_classes_have_no_common_outputs(make_cfg):
    cfg = make_cfg("mokd", [*OUTPUTS, "MODEL.ROI_HEADS.NUM_CLASSES", 2])
    message = "student has 2 classes and the teacher 1.*Set MODEL.ROI_HEADS.NUM_CLASSES"
    with pytest.raises(ValueError, match=message):
        DistillationTrainer.build_model(cfg)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_dkd_is_for_two_softmaxes(make_cfg, tmp_path, side):
    """A RetinaNet has sigmoids."""
    retinanet = make_cfg("retinanet")
    opts = ["MOKD.ENABLED", True, *OUTPUTS_ONLY, "MOKD.OUTPUTS.LOSS", "dkd"]
    if side == "teacher":
        opts += saved_teacher(retinanet, build_model(retinanet), tmp_path)
    cfg = make_cfg("retinanet" if side == "student" else "faster_rcnn", opts)
    with pytest.raises(ValueError, match="LOSS is 'dkd', .* one for each class .RetinaNet.: use"):
        DistillationTrainer.build_model(cfg)


def test_the_class_loss_is_the_chosen_one(make_cfg):
    """With one class and background there are no others for DKD's second part: it is as "kl"."""
    loss, beta = "MOKD.OUTPUTS.LOSS", "MOKD.OUTPUTS.DKD_BETA"
    choices = [[], [loss, "dkd", beta, 8.0], [loss, "dist"]]
    pairs = [losses_of(make_cfg("mokd", [*OUTPUTS, *x])) for x in choices]
    kl, dkd, dist = (losses["loss_output_classes"].item() for _, losses in pairs)
    assert dkd == pytest.approx(kl, rel=1e-5) and 0 < kl < dist < 4
    objectives = [model.objectives["outputs"] for model, _ in pairs]
    assert [(x.loss, x.dkd_beta) for x in objectives] == [("kl", 1), ("dkd", 8), ("dist", 1)]
    assert len({losses["loss_output_boxes"].item() for _, losses in pairs}) == 1
