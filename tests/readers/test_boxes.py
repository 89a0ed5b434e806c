# Copyright (c) The mokd_det authors.
"""Outputs of detectors at given boxes."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ROIAlign
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.roi_heads import cascade_rcnn, fast_rcnn
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage

from mokd_det.engine import build_trainer
from mokd_det.objectives.output_losses import box_loss, class_loss
from mokd_det.readers import BoxOutputs, build_box_reader, build_rpn_readers

from ..conftest import OUTPUTS
from ..modeling.families import TWO_STAGE, batch_of


NO_BOXES = torch.zeros(0, 1, 4)


def random_logits(rows, columns, seed, scale=3.0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def test_probabilities_of_a_softmax_are_precise_near_one_and_zero():
    logits = torch.cat([random_logits(50, 5, 0, 10.0), torch.tensor([[40.0, 0, 0, 0, 0]])])
    log_p, log_rest = BoxOutputs(logits, True, NO_BOXES).log_probabilities()
    exact = F.softmax(logits.double(), dim=1)
    others = torch.stack(
        [torch.cat([exact[:, :i], exact[:, i + 1 :]], 1).sum(1) for i in range(4)], dim=1
    )
    assert log_p.shape == log_rest.shape == (51, 4)
    assert torch.allclose(log_p.double(), exact[:, :4].log(), atol=1e-5)
    assert torch.allclose(log_rest.double(), others.log(), atol=1e-5)


def test_probabilities_of_sigmoids():
    logits = random_logits(20, 3, 0, 10.0)
    log_p, log_rest = BoxOutputs(logits, False, NO_BOXES).log_probabilities(2.0)
    p = torch.sigmoid(logits.double() / 2)
    assert torch.allclose(log_p.double(), p.log(), atol=1e-5)
    assert torch.allclose(log_rest.double(), (-torch.expm1(p.log())).log(), atol=1e-4)


def test_boxes_of_a_class():
    boxes = torch.arange(24.0).view(2, 3, 4)
    given = BoxOutputs(torch.zeros(2, 4), True, boxes)
    assert torch.equal(given.boxes_of(torch.tensor([2, 0])), boxes[[0, 1], [2, 0]])


def eval_model(cfg):
    torch.manual_seed(5)
    return build_model(cfg).eval()


def assert_nothing_at_no_boxes(reader, features):
    none = reader.locations(features, [torch.zeros(0, 4)] * 2)
    read = reader(features, none, [(192, 192)] * 2)
    assert len(read.logits) == len(read.boxes) == 0
    assert class_loss(read, read) == 0 and box_loss(read, read) == 0


@pytest.mark.parametrize("family", TWO_STAGE)
def test_two_stage_reader_says_what_the_detector_says(family_cfg, monkeypatch, family):
    """Before thresholds and NMS, inference has these scores and boxes at its own proposals."""
    cfg = family_cfg(family)
    model, batch = eval_model(cfg), batch_of(cfg)
    seen = []

    def record(boxes, scores, *args):
        seen.append((torch.cat(list(boxes)), torch.cat(list(scores))))
        return inference(boxes, scores, *args)

    inference = fast_rcnn.fast_rcnn_inference
    monkeypatch.setattr(fast_rcnn, "fast_rcnn_inference", record)
    monkeypatch.setattr(cascade_rcnn, "fast_rcnn_inference", record)
    reader = build_box_reader(model, "teacher")
    with torch.no_grad():
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features, None)
        model.roi_heads(images, features, proposals)
        given = [p.proposal_boxes.tensor for p in proposals]
        read = reader(features, given, images.image_sizes)
        for ours, theirs in zip(reader.propose(features, images, 7), given):
            assert torch.equal(ours, theirs[:7])
        assert_nothing_at_no_boxes(reader, features)
    boxes, scores = seen[0]
    assert read.exclusive and read.logits.shape == scores.shape
    assert torch.allclose(F.softmax(read.logits, 1), scores, atol=1e-6)
    assert torch.allclose(read.boxes.flatten(1), boxes, atol=1e-3)
    # Its RPN can be read, too, at all of its levels.
    rpn, _ = build_rpn_readers(model, model)
    assert rpn.in_features == list(model.proposal_generator.in_features)


def test_box_head_without_layers(family_cfg):
    """Its 4-D output is the predictor's to flatten."""
    head = ["MODEL.ROI_BOX_HEAD.NUM_FC", 0, "MODEL.ROI_BOX_HEAD.NUM_CONV", 1]
    cfg = family_cfg("faster_rcnn", [*head, "MODEL.ROI_BOX_HEAD.CONV_DIM", 8])
    model, batch = eval_model(cfg), batch_of(cfg)
    boxes = [torch.tensor([[0.0, 0.0, 50.0, 50.0]])] * 2
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(batch).tensor)
        read = build_box_reader(model, "student")(features, boxes, [(192, 192)] * 2)
        pooled = model.roi_heads.box_pooler(
            [features[f] for f in model.roi_heads.box_in_features], [Boxes(b) for b in boxes]
        )
        scores, _ = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    assert torch.equal(read.logits, scores)


def test_boxes_stay_float32_in_a_student_with_mixed_precision(make_cfg, monkeypatch):
    """Both sides pool at the same boxes: bfloat16 would round them to 4 pixels from 512 on."""
    seen = []
    roi_align = ROIAlign.forward
    monkeypatch.setattr(
        ROIAlign, "forward", lambda s, x, rois: seen.append(rois.dtype) or roi_align(s, x, rois)
    )
    opts = [*OUTPUTS, "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0]
    opts += ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"]
    trainer = build_trainer(make_cfg("mokd", opts))
    trainer.resume_or_load(False)
    with EventStorage(0):
        trainer._trainer.iter = 0
        trainer._trainer.run_step()
    assert len(seen) >= 3 and set(seen) == {torch.float32}


def test_retinanet_reader_says_what_the_detector_says(family_cfg):
    cfg = family_cfg("retinanet")
    model, batch = eval_model(cfg), batch_of(cfg)
    reader = build_box_reader(model, "student")
    with torch.no_grad():
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
        maps = [features[name] for name in model.head_in_features]
        logits, deltas = model.head(maps)
        logits = torch.cat([permute_to_N_HWA_K(x, 1) for x in logits], 1)
        deltas = torch.cat([permute_to_N_HWA_K(x, 4) for x in deltas], 1)
        anchors = Boxes.cat(model.anchor_generator(maps)).tensor

        # Any boxes: the nearest anchor is the one with the largest IoU of all.
        torch.manual_seed(0)
        corners = torch.rand(300, 2) * 180
        boxes = torch.cat([corners, corners + 4 + torch.rand(300, 2) * 120], 1)
        (nearest,) = reader.locations(features, [boxes])
        state = reader.run(features)
        indices = reader._nearest(state.anchors, state.grids, boxes)
        best = pairwise_iou(Boxes(boxes), Boxes(anchors))
        assert torch.allclose(best.gather(1, indices[:, None])[:, 0], best.max(1).values)
        assert torch.equal(nearest, anchors[indices.unique()])

        # About an anchor of its own it says what its head predicts there.
        chosen = [torch.randperm(len(anchors))[:50] for _ in batch]
        read = reader(features, [anchors[i] for i in chosen], images.image_sizes)
        expected = torch.cat([logits[n][i] for n, i in enumerate(chosen)])
        assert not read.exclusive and torch.equal(read.logits, expected)
        apply = model.box2box_transform.apply_deltas
        expected = torch.cat([apply(deltas[n][i], anchors[i]) for n, i in enumerate(chosen)])
        assert torch.equal(read.boxes[:, 0], expected)

        for found, size in zip(reader.propose(state, images, 20), images.image_sizes):
            assert 0 < len(found) <= 20
            height, width = size
            assert (found[:, 2] <= width).all() and (found[:, 3] <= height).all()
            assert (found >= 0).all()
        assert_nothing_at_no_boxes(reader, features)


@pytest.mark.parametrize(
    "opts, who, message",
    [
        (
            ["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"],
            "teacher",
            "The teacher has no proposal generator",
        ),
        (
            ["MODEL.META_ARCHITECTURE", "ProposalNetwork"],
            "student",
            "heads of the student, a ProposalNetwork, cannot be read.*expected an R-CNN",
        ),
    ],
)
def test_detectors_that_cannot_be_read(make_cfg, opts, who, message):
    with pytest.raises(ValueError, match=message):
        build_box_reader(build_model(make_cfg("faster_rcnn", opts)), who)


def test_other_anchors_of_a_retinanet_cannot_be_read(make_cfg):
    model = build_model(make_cfg("retinanet"))
    model.anchor_generator = torch.nn.Identity()
    with pytest.raises(ValueError, match="anchors of Identity cannot be read"):
        build_box_reader(model, "student")
