# Copyright (c) The mokd_det authors.
"""Outputs of detectors at given boxes, and the losses between them."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ROIAlign
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.roi_heads import cascade_rcnn, fast_rcnn
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage

from mokd_det.modeling import Outputs, build_output_reader
from mokd_det.modeling.output_losses import box_loss, class_loss

from .families import FAMILIES, batch_of, step
from mokd_det.engine import DistillationTrainer, build_trainer


def outputs(logits, exclusive, boxes=None):
    logits = torch.as_tensor(logits, dtype=torch.float32)
    if boxes is None:
        boxes = torch.tensor([0.0, 0.0, 10.0, 10.0]).expand(len(logits), 1, 4)
    return Outputs(logits, exclusive, boxes)


def random_logits(rows, columns, seed, scale=3.0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def test_probabilities_of_a_softmax_are_precise_near_one_and_zero():
    logits = torch.cat([random_logits(50, 5, 0, 10.0), torch.tensor([[40.0, 0, 0, 0, 0]])])
    log_p, log_rest = outputs(logits, True).log_probabilities()
    exact = F.softmax(logits.double(), dim=1)
    others = torch.stack(
        [torch.cat([exact[:, :i], exact[:, i + 1 :]], 1).sum(1) for i in range(4)], dim=1
    )
    assert log_p.shape == log_rest.shape == (51, 4)
    assert torch.allclose(log_p.double(), exact[:, :4].log(), atol=1e-5)
    assert torch.allclose(log_rest.double(), others.log(), atol=1e-5)


def test_probabilities_of_sigmoids():
    logits = random_logits(20, 3, 0, 10.0)
    log_p, log_rest = outputs(logits, False).log_probabilities(2.0)
    p = torch.sigmoid(logits.double() / 2)
    assert torch.allclose(log_p.double(), p.log(), atol=1e-5)
    assert torch.allclose(log_rest.double(), (-torch.expm1(p.log())).log(), atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_class_loss_of_two_softmaxes_is_hintons(temperature):
    student, teacher = random_logits(6, 4, 0), random_logits(6, 4, 1)
    p = F.softmax(teacher / temperature, 1)
    expected = (p * (p.log() - F.log_softmax(student / temperature, 1))).sum(1).mean()
    loss = class_loss(outputs(student, True), outputs(teacher, True), temperature)
    assert torch.allclose(loss, expected * temperature**2, atol=1e-6)


def test_class_loss_of_two_families_compares_each_class():
    """A softmax of 3 classes and background against 3 sigmoids, both ways."""
    softmax, sigmoid = random_logits(6, 4, 0), random_logits(6, 3, 1)
    p, q = F.softmax(softmax, 1)[:, :3], torch.sigmoid(sigmoid)

    def divergence(p, q):
        both = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        return both.sum(1).mean()

    a, b = outputs(softmax, True), outputs(sigmoid, False)
    assert torch.allclose(class_loss(a, b), divergence(q, p), atol=1e-5)
    assert torch.allclose(class_loss(b, a), divergence(p, q), atol=1e-5)


def test_frozen_values():
    teacher = outputs([[2.0, 0.0, -1.0], [0.0, 0.0, 3.0]], True)
    student = outputs([[0.0, 1.0], [-2.0, 0.5]], False)
    assert class_loss(student, teacher).item() == pytest.approx(0.9519, abs=1e-4)
    box = torch.tensor([[[0.0, 0.0, 5.0, 10.0]]]).expand(2, 1, 4)
    student = outputs([[0.0, 1.0], [-2.0, 0.5]], False, box)
    # GIoU of a half of the box is 1/2; the weights are 0.8438 and 0.0453.
    assert box_loss(student, teacher).item() == pytest.approx((0.8438 + 0.0453) / 4, abs=1e-4)


@pytest.mark.parametrize("exclusive", [True, False])
def test_equal_outputs_have_no_loss_and_no_gradient(exclusive):
    logits = random_logits(6, 4, 0).requires_grad_()
    # Of tens of pixels: torchvision adds 1e-7 to areas, which counts for boxes below a pixel.
    sides = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(0))
    boxes = (10 + 90 * sides).cumsum(2).requires_grad_()
    student = Outputs(logits, exclusive, boxes[:, :1])
    teacher = Outputs(logits.detach(), exclusive, boxes[:, :1].detach())
    loss = class_loss(student, teacher) + box_loss(student, teacher)
    assert abs(loss.item()) < 1e-6
    loss.backward()
    assert logits.grad.abs().max() < 1e-6 and boxes.grad.abs().max() < 1e-6


def test_boxes_of_the_teachers_class_where_it_sees_an_object():
    boxes = torch.arange(24.0).view(2, 3, 4)
    given = Outputs(torch.zeros(2, 4), True, boxes)
    assert torch.equal(given.boxes_of(torch.tensor([2, 0])), boxes[[0, 1], [2, 0]])
    background = outputs([[-20.0, -20.0, 20.0]], True)
    far = outputs([[0.0, 0.0, 0.0]], True, torch.tensor([[[50.0, 50.0, 60.0, 60.0]]]))
    assert box_loss(far, background) < 1e-6


def test_no_boxes_give_zero():
    empty = outputs(torch.zeros(0, 4), True)
    assert class_loss(empty, empty) == 0 and box_loss(empty, empty) == 0


def eval_model(cfg):
    torch.manual_seed(5)
    return build_model(cfg).eval()


@pytest.mark.parametrize("family", [f for f in FAMILIES if "retinanet" not in f])
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
    reader = build_output_reader(model, "teacher")
    with torch.no_grad():
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features, None)
        model.roi_heads(images, features, proposals)
        given = [p.proposal_boxes.tensor for p in proposals]
        read = reader(features, given, images.image_sizes)
        for ours, theirs in zip(reader.propose(features, images, 7), given):
            assert torch.equal(ours, theirs[:7])
    boxes, scores = seen[0]
    assert read.exclusive and read.logits.shape == scores.shape
    assert torch.allclose(F.softmax(read.logits, 1), scores, atol=1e-6)
    assert torch.allclose(read.boxes.flatten(1), boxes, atol=1e-3)


def test_box_head_without_layers(family_cfg):
    """Its 4-D output is the predictor's to flatten."""
    head = ["MODEL.ROI_BOX_HEAD.NUM_FC", 0, "MODEL.ROI_BOX_HEAD.NUM_CONV", 1]
    cfg = family_cfg("faster_rcnn", [*head, "MODEL.ROI_BOX_HEAD.CONV_DIM", 8])
    model, batch = eval_model(cfg), batch_of(cfg)
    boxes = [torch.tensor([[0.0, 0.0, 50.0, 50.0]])] * 2
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(batch).tensor)
        read = build_output_reader(model, "student")(features, boxes, [(192, 192)] * 2)
        pooled = model.roi_heads.box_pooler(
            [features[f] for f in model.roi_heads.box_in_features], [Boxes(b) for b in boxes]
        )
        scores, _ = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    assert torch.equal(read.logits, scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_boxes_at_all(family_cfg, family):
    cfg = family_cfg(family)
    model, batch = eval_model(cfg), batch_of(cfg)
    reader = build_output_reader(model, "teacher")
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(batch).tensor)
        none = reader.locations(features, [torch.zeros(0, 4)] * 2)
        read = reader(features, none, [(192, 192)] * 2)
    assert len(read.logits) == len(read.boxes) == 0
    assert class_loss(read, read) == 0 and box_loss(read, read) == 0


def test_boxes_stay_float32_in_a_student_with_mixed_precision(make_cfg, monkeypatch):
    """Both sides pool at the same boxes: bfloat16 would round them to 4 pixels from 512 on."""
    seen = []
    roi_align = ROIAlign.forward
    monkeypatch.setattr(
        ROIAlign, "forward", lambda s, x, rois: seen.append(rois.dtype) or roi_align(s, x, rois)
    )
    opts = ["MOKD.OUTPUTS.ENABLED", True, "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0]
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
    reader = build_output_reader(model, "student")
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
        indices = reader._nearest(*state[0], boxes)
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


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet", "cascade_rcnn"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(family_cfg, tmp_path, family):
    cfg = family_cfg(family)
    teacher = eval_model(cfg)
    torch.save({"model": teacher.state_dict()}, tmp_path / "t.pth")
    (tmp_path / "t.yaml").write_text(cfg.dump())
    opts = ["MOKD.ENABLED", True, "MOKD.OUTPUTS.ENABLED", True, "MOKD.FEATURES.ENABLED", False]
    opts += ["MOKD.TEACHER.CONFIG_FILE", str(tmp_path / "t.yaml")]
    opts += ["MOKD.TEACHER.WEIGHTS", str(tmp_path / "t.pth")]
    cfg = family_cfg(family, opts)
    model = DistillationTrainer.build_model(cfg)
    model.student.load_state_dict(teacher.state_dict())
    view = model.teacher.view(batch_of(cfg), cfg.INPUT.FORMAT)
    model.student.eval()  # BatchNorm as the teacher's
    with torch.no_grad():
        losses = model.outputs(view.features, model.outputs.parameters, view, model.teacher)
    expected = {"loss_output_classes", "loss_output_boxes"}
    if family != "retinanet":
        expected |= {"loss_output_rpn_cls", "loss_output_rpn_loc"}
    assert set(losses) == expected
    assert all(abs(loss) < 1e-5 for loss in losses.values()), losses
    with torch.no_grad():
        model.outputs.parameters[-1].add_(1.0)
        losses = model.outputs(view.features, model.outputs.parameters, view, model.teacher)
    assert max(losses.values()) > 1e-3


@pytest.mark.parametrize("place", ["features", "parameters"])
@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet"])
def test_the_students_head_gets_the_weighted_gradient(family_cfg, family, place):
    """Weights (1, 0, 2): head and backbone get task + 2 outputs, measured one by one."""
    gradients = {}
    for weights in ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 2.0)):
        opts = ["MOKD.ENABLED", True, "MOKD.OUTPUTS.ENABLED", True, "MOKD.BALANCING.RULE", "fixed"]
        opts += ["MOKD.BALANCING.WEIGHTS", list(weights), "MOKD.BALANCING.PLACE", place]
        cfg = family_cfg(family, opts)
        torch.manual_seed(2)
        model = DistillationTrainer.build_model(cfg)
        batch = batch_of(cfg)
        torch.manual_seed(4)
        with torch.jit.optimized_execution(
            False
        ):  # the same bits in every pass of RetinaNet's loss
            step(model, batch)
        gradients[weights] = {n: p.grad for n, p in model.student.named_parameters()}
    task, both_heads, all_three = gradients.values()
    heads = [n for n in task if not n.startswith("backbone") and task[n] is not None]
    trained = {id(p) for p in model.outputs.parameters}
    names = {n for n, p in model.student.named_parameters() if id(p) in trained}
    assert names and names <= set(heads)
    for name in task:
        if not task[name].requires_grad and name.startswith("backbone"):
            expected = task[name] + 2 * both_heads[name]
        else:  # heads get the plain task gradient in each run
            outputs_only = both_heads[name] - task[name]
            expected = task[name] + 2 * outputs_only
            assert (outputs_only.abs().max() > 0) == (name in names), name
        assert torch.allclose(all_three[name], expected, rtol=2e-3, atol=1e-5), name


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MOKD.OUTPUTS.TEMPERATURE", 0.0], "MOKD.OUTPUTS.TEMPERATURE is 0.0: expected > 0"),
        (["MOKD.OUTPUTS.PROPOSALS", 0], "MOKD.OUTPUTS.PROPOSALS is 0: expected 1 or more"),
        (
            ["MOKD.OUTPUTS.ENABLED", False, "MOKD.OUTPUTS.PROPOSALS", 0]
            + ["MOKD.FEATURES.FOREGROUND", "teacher"],
            "MOKD.OUTPUTS.PROPOSALS is 0: expected 1 or more",
        ),
        (["MOKD.OUTPUTS.BOX_WEIGHT", -1.0], "BOX_WEIGHT -1.0 and .*: expected numbers >= 0"),
        (["MOKD.OUTPUTS.RPN_WEIGHT", -1.0], "RPN_WEIGHT -1.0: expected numbers >= 0"),
        (
            ["MODEL.ROI_HEADS.NUM_CLASSES", 2],
            "the student has 2 classes and the teacher 1.*Set MODEL.ROI_HEADS.NUM_CLASSES",
        ),
        (
            ["MOKD.BALANCING.RULE", "fixed"],
            "MOKD.BALANCING.WEIGHTS has 2 entries for 3 objectives: give one for each",
        ),
        (
            ["MOKD.BALANCING.RULE", "min_norm", "MOKD.BALANCING.CLIP", False],
            "MOKD.BALANCING.CLIP False is defined for 2 objectives, not 3",
        ),
        (
            ["MOKD.FEATURES.ENABLED", False, "MOKD.OUTPUTS.ENABLED", False],
            "enable one of them",
        ),
    ],
)
def test_bad_options_are_explained(make_cfg, opts, message):
    cfg = make_cfg("mokd", ["MOKD.OUTPUTS.ENABLED", True, *opts])
    with pytest.raises(ValueError, match=message):
        DistillationTrainer.build_model(cfg)
