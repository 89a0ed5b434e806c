# Copyright (c) The mokd_det authors.
"""What two RPNs say at the same anchors, and the losses between them."""

import logging

import pytest
import torch
from detectron2.modeling import build_model

from mokd_det.engine import DistillationTrainer
from mokd_det.modeling.output_losses import rpn_losses
from mokd_det.modeling.rpn_outputs import AnchorOutputs, RPNReader, build_rpn_readers

from .families import FAMILIES, batch_of


def at_anchors(logits, deltas):
    """One level of two anchors at one position of one image."""
    logits = torch.tensor(logits).view(1, 2, 1, 1)
    return AnchorOutputs([logits], [torch.tensor(deltas).view(1, 2, 4, 1, 1)])


def random_outputs(seed, *sizes):
    generator = torch.Generator().manual_seed(seed)
    return AnchorOutputs(
        [torch.randn(2, 3, *size, generator=generator) for size in sizes],
        [torch.randn(2, 3, 4, *size, generator=generator) for size in sizes],
    )


def test_frozen_values():
    student = at_anchors([0.0, 2.0], [[0.5, 0.0, 0.0, -0.5], [1.0, 1.0, 1.0, 1.0]])
    teacher = at_anchors([3.0, -3.0], [[0.0, 0.0, 0.0, 0.0]] * 2)
    # p = 0.9526 and 0.0474, the student's 0.5 and 0.8808: weights 0.9526 and 0.8808. Divergences
    # 0.5023 and 1.8412; distances 2 (0.5 - 1/18) and 4 (1 - 1/18).
    objectness, boxes = rpn_losses(student, teacher)
    expected = (0.9526 * 0.5023 + 0.8808 * 1.8412) / (0.9526 + 0.8808)
    assert objectness.item() == pytest.approx(expected, abs=2e-4)
    assert boxes.item() == pytest.approx(
        (0.9526 * 0.8889 + 0.0474 * 3.7778) / (0.9526 + 0.8808), abs=2e-4
    )


def test_background_of_both_sides_does_not_count():
    """Thousands of anchors on which nobody sees an object change nothing."""
    few = random_outputs(0, (2, 2)), random_outputs(1, (2, 2))
    empty = AnchorOutputs([torch.full((2, 3, 40, 40), -30.0)], [torch.ones(2, 3, 4, 40, 40)])
    many = [AnchorOutputs(x.logits + empty.logits, x.deltas + empty.deltas) for x in few]
    for one, other in zip(rpn_losses(*few), rpn_losses(*many)):
        assert torch.allclose(one, other, rtol=1e-5)


def test_equal_outputs_have_no_loss_and_no_gradient():
    teacher, student = random_outputs(0, (3, 4), (2, 2)), random_outputs(0, (3, 4), (2, 2))
    values = [x.requires_grad_() for x in (*student.logits, *student.deltas)]
    objectness, boxes = rpn_losses(student, teacher)
    assert abs(objectness) < 1e-6 and boxes == 0
    (objectness + boxes).backward()
    assert max(x.grad.abs().max() for x in values) < 1e-7


def test_an_image_without_objects_counts_little():
    nothing = at_anchors([-200.0, -200.0], [[0.0] * 4] * 2)
    assert rpn_losses(nothing, nothing) == (0, 0)
    unsure = at_anchors([-5.0, -5.0], [[1.0] * 4] * 2), at_anchors([-5.0, -5.0], [[0.0] * 4] * 2)
    objectness, boxes = rpn_losses(*unsure)
    assert objectness == 0 and boxes.item() == pytest.approx(2 * 3.7778 * 0.0067, abs=1e-3)


def test_images_count_alike():
    """So two processes with an image each have the loss of one with both."""
    student, teacher = random_outputs(0, (3, 4), (2, 2)), random_outputs(1, (3, 4), (2, 2))
    split = [
        [AnchorOutputs([v[i : i + 1] for v in x.logits], [v[i : i + 1] for v in x.deltas])]
        for x in (student, teacher)
        for i in range(2)
    ]
    first, second = rpn_losses(*split[0], *split[2]), rpn_losses(*split[1], *split[3])
    for one, other, both in zip(first, second, rpn_losses(student, teacher)):
        assert torch.allclose((one + other) / 2, both)


def test_the_gradient_leads_to_the_teacher():
    teacher = random_outputs(0, (3, 4))
    student = random_outputs(1, (3, 4))
    values = [*student.logits, *student.deltas]
    optimizer = torch.optim.SGD([v.requires_grad_() for v in values], lr=5.0)
    first = sum(rpn_losses(student, teacher))
    for _ in range(100):
        optimizer.zero_grad()
        sum(rpn_losses(student, teacher)).backward()
        optimizer.step()
    assert sum(rpn_losses(student, teacher)) < 0.5 * first


def test_maps_of_other_padding_are_compared_where_both_are():
    student, teacher = random_outputs(0, (5, 4), (2, 2)), random_outputs(1, (4, 6), (2, 3))
    ours, theirs = student.cropped_to(teacher), teacher.cropped_to(student)
    assert [x.shape[-2:] for x in ours.logits] == [(4, 4), (2, 2)]
    assert [x.shape for x in ours.deltas] == [x.shape for x in theirs.deltas]
    assert torch.equal(theirs.logits[0], teacher.logits[0][..., :4, :4])


def test_reader_says_what_the_rpn_says(family_cfg):
    """In the order of the RPN's own decoding: logits and deltas of one anchor stay together."""
    cfg = family_cfg("faster_rcnn", ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0]]])
    torch.manual_seed(5)
    model = build_model(cfg).eval()
    rpn = model.proposal_generator
    seen = {}
    predict = rpn.predict_proposals

    def record(anchors, logits, deltas, sizes):
        seen["logits"], seen["deltas"] = logits, deltas
        return predict(anchors, logits, deltas, sizes)

    rpn.predict_proposals = record
    with torch.no_grad():
        images = model.preprocess_image(batch_of(cfg))
        features = model.backbone(images.tensor)
        rpn(images, features)
        read = RPNReader(rpn, [0, 2])(features)
    assert [x.shape[1] for x in read.logits] == [4, 4]
    for level, (logits, deltas) in zip([0, 2], zip(read.logits, read.deltas)):
        assert torch.equal(logits.permute(0, 2, 3, 1).flatten(1), seen["logits"][level])
        assert torch.equal(deltas.permute(0, 3, 4, 1, 2).flatten(1, 3), seen["deltas"][level])
    logits, deltas = AnchorOutputs(read.logits[:1], read.deltas[:1]).flat()
    best = logits[1].argmax()
    anchor, row, column = torch.unravel_index(best, read.logits[0].shape[1:])
    assert torch.equal(deltas[1, best], read.deltas[0][1, anchor, :, row, column])


def rpn_pair(family_cfg, *opts):
    models = [build_model(family_cfg("faster_rcnn", x)) for x in ([], list(opts))]
    return build_rpn_readers(*models)


def test_levels_with_the_same_anchors_are_paired(family_cfg):
    ours, theirs = rpn_pair(family_cfg)
    assert ours.in_features == theirs.in_features == ["p3", "p4", "p5", "p6"]
    sizes = [[16, 32], [48, 64], [96, 100], [192, 256]]
    ours, theirs = rpn_pair(family_cfg, "MODEL.ANCHOR_GENERATOR.SIZES", sizes)
    assert ours.in_features == theirs.in_features == ["p3", "p4", "p6"]
    fewer = ["MODEL.RPN.IN_FEATURES", ["p4", "p5"]]
    sizes = ["MODEL.ANCHOR_GENERATOR.SIZES", [[48, 64], [96, 128]]]
    ours, theirs = rpn_pair(family_cfg, *fewer, *sizes)
    assert ours.in_features == theirs.in_features == ["p4", "p5"]


@pytest.mark.parametrize(
    "opts",
    [
        ["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [9], [10], [11]]],
        ["MODEL.ANCHOR_GENERATOR.OFFSET", 0.5],
        ["MODEL.RPN.BBOX_REG_WEIGHTS", (2.0, 2.0, 1.0, 1.0)],
        ["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"],
    ],
)
def test_other_anchors_or_units_are_not_compared(family_cfg, opts):
    assert rpn_pair(family_cfg, *opts) is None


def test_a_dense_detector_has_no_rpn(family_cfg):
    models = [build_model(family_cfg(family)) for family in ("retinanet", "faster_rcnn")]
    assert build_rpn_readers(*models) is None


@pytest.mark.parametrize("family", [f for f in FAMILIES if "retinanet" not in f])
def test_every_two_stage_family_has_its_rpn_read(family_cfg, family):
    cfg = family_cfg(family)
    models = [build_model(cfg) for _ in range(2)]
    ours, _ = build_rpn_readers(*models)
    assert ours.in_features == list(models[0].proposal_generator.in_features)


def objectives(cfg):
    model = DistillationTrainer.build_model(cfg)
    batch = batch_of(cfg)
    view = model.teacher.view(batch, cfg.INPUT.FORMAT)
    images = model.student.preprocess_image(batch)
    features = model.student.backbone(images.tensor)
    return model, model.outputs(features, model.outputs.parameters, view, model.teacher)


def test_the_log_says_what_is_compared(make_cfg, caplog):
    opts = ["MOKD.OUTPUTS.ENABLED", True]
    with caplog.at_level(logging.INFO, logger="mokd_det"):
        _, losses = objectives(make_cfg("mokd", opts))
    assert "the RPNs of both sides are compared on p3, p4, p5, p6 of p3, p4, p5, p6" in caplog.text
    assert "loss_output_rpn_cls" in losses
    caplog.clear()
    anchors = ["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [9], [10], [11]]]
    with caplog.at_level(logging.INFO, logger="mokd_det"):
        _, losses = objectives(make_cfg("mokd", [*opts, *anchors]))
    assert "not compared: on no level do both have one with the same anchors" in caplog.text
    assert set(losses) == {"loss_output_classes", "loss_output_boxes"}


def test_the_weight_multiplies_and_zero_leaves_the_rpn_alone(make_cfg):
    opts = ["MOKD.OUTPUTS.ENABLED", True, "MOKD.OUTPUTS.RPN_WEIGHT"]
    torch.manual_seed(0)
    model, once = objectives(make_cfg("mokd", [*opts, 1.0]))
    head = {id(p) for p in model.student.proposal_generator.parameters()}
    assert head <= {id(p) for p in model.outputs.parameters}
    torch.manual_seed(0)
    _, thrice = objectives(make_cfg("mokd", [*opts, 3.0]))
    for name in ("loss_output_rpn_cls", "loss_output_rpn_loc"):
        assert torch.allclose(3 * once[name], thrice[name])
    assert torch.equal(once["loss_output_classes"], thrice["loss_output_classes"])
    model, none = objectives(make_cfg("mokd", [*opts, 0.0]))
    assert set(none) == {"loss_output_classes", "loss_output_boxes"}
    head = {id(p) for p in model.student.proposal_generator.parameters()}
    assert not head & {id(p) for p in model.outputs.parameters}
