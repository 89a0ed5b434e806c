# Copyright (c) The mokd_det authors.
"""The objective that lets the teacher's heads read the student's features."""

import logging

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torch import nn

from mokd_det.engine import DistillationTrainer, validate
from mokd_det.modeling import as_map, find_taps
from mokd_det.objectives import ClassifierHead, StudentOutputs, normalise_like
from mokd_det import readers
from mokd_det.readers import build_box_reader
from mokd_det.teachers import ClassifierTeacher

from ..conftest import OUTPUTS_ONLY
from ..modeling.classifiers import FAMILIES, classifier, digit_batch, gradients
from ..modeling.families import FCOS, LAZY, batch_of, saved_teacher, step

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


def test_the_teacher_stays_as_it_is(make_cfg):
    """Neither a gradient nor a buffer of it changes, and its heads are no parameters of ours."""
    cfg = make_cfg("mokd", HEADS)
    model = DistillationTrainer.build_model(cfg)
    teacher = model.teacher.model
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    teacher.train()  # somebody walked over the modules
    losses, decision = step(model, batch_of(cfg))
    assert set(losses["teacher_head"]) == BOXES | RPN and decision.gram[1, 1] > 0
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    used = model.objectives["teacher_head"].used_parameters()
    assert not used.borrowed and len(used.own) == 4
    assert all(p.grad.abs().sum() > 0 for p in used.own)
    grads = {n: p.grad for n, p in model.student.named_parameters() if n.startswith("backbone")}
    assert all(g is not None for n, g in grads.items() if "fpn" in n)


@pytest.mark.parametrize("source", LAZY)
def test_students_that_nobody_can_read(make_cfg, tmp_path, source):
    """FCOS and ViTDet, with their own strides and channels."""
    path = tmp_path / "student.py"
    path.write_text(source)
    opts = ["MODEL.META_ARCHITECTURE", "LazyConfigDetector", "MODEL.LAZY_CONFIG.FILE", str(path)]
    opts += ["MOKD.ENABLED", True, "MOKD.OBJECTIVES", ["teacher_head"]]
    cfg = make_cfg("faster_rcnn", opts)
    losses, decision = step(DistillationTrainer.build_model(cfg), batch_of(cfg))
    assert set(losses["teacher_head"]) == BOXES | RPN
    assert decision.gram[1, 1] > 0 and decision.fallback == ""


def test_levels_are_matched_by_stride_and_boxes_go_to_the_nearest(make_cfg, caplog):
    """The teacher reads boxes on p3-p5 and objectness on p3-p6; the student has p4 and p5."""
    opts = ["MOKD.TEACHER_HEAD.STUDENT", ["p4", "p5"], "MOKD.TEACHER_HEAD.TEACHER", ["p4", "p5"]]
    model, batch, teacher, objective = built(make_cfg("mokd", [*HEADS, *opts]))
    whole, part = model.teacher.reader, objective.head.reader
    assert (whole.in_features, part.in_features) == (["p3", "p4", "p5"], ["p4", "p5"])
    assert objective.head.rpn_reader.in_features == ["p4", "p5"]
    small = torch.tensor([[10.0, 20.0, 40.0, 60.0]])
    large = torch.tensor([[0.0, 0.0, 240.0, 240.0], [0.0, 0.0, 500.0, 460.0]])
    boxes, sizes = [small, large], teacher.image_sizes
    assert part.elsewhere(boxes) == 1 and whole.elsewhere(boxes) == 0
    features = teacher.features
    with torch.no_grad():
        ours, theirs = (r(features, boxes, sizes) for r in (part, whole))
        assert not torch.allclose(ours.logits[:1], theirs.logits[:1], atol=1e-6)
        assert torch.allclose(ours.logits[1:], theirs.logits[1:], atol=1e-6)
        pooled = part.pooler([features["p4"], features["p5"]], [Boxes(b) for b in boxes])
        expected = part.pooler.pooler.level_poolers[1](features["p4"], with_index(small))
    assert torch.allclose(pooled[:1], expected)
    caplog.set_level(logging.INFO, logger="mokd_det")
    model.student.train()
    for _ in range(2):
        step(model, batch)
    said = [r.getMessage() for r in caplog.records if "are read on the nearest" in r.getMessage()]
    assert len(said) == 1 and "of the first batch's" in said[0]


def with_index(boxes):
    return torch.cat([torch.zeros(len(boxes), 1), boxes], dim=1)


@pytest.mark.parametrize("norm", ["", "BN"])
def test_a_dense_head_reads_some_levels_as_it_reads_all(family_cfg, norm):
    """Also one with a BatchNorm for each level, which counts calls."""
    cfg = family_cfg("retinanet", ["MODEL.RETINANET.NORM", norm])
    detector = build_model(cfg).eval()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    whole, part = (build_box_reader(detector, "teacher", n) for n in (None, {"p4", "p5"}))
    with torch.no_grad():
        images = detector.preprocess_image(batch_of(cfg))
        features = detector.backbone(images.tensor)
        boxes = [torch.tensor([[30.0, 30.0, 90.0, 100.0]]), torch.rand(5, 4).cumsum(1) * 60]
        boxes = part.locations(features, boxes)
        ours, theirs = (r(features, boxes, images.image_sizes) for r in (part, whole))
    assert part.in_features == ["p4", "p5"] and len(ours.logits) == len(theirs.logits) > 0
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-5)
    assert torch.allclose(ours.boxes, theirs.boxes, atol=1e-3)


def test_levels_of_other_strides_are_brought_onto_the_teachers_grid(make_cfg):
    opts = ["MOKD.TEACHER_HEAD.STUDENT", ["p3", "p6"], "MOKD.TEACHER_HEAD.TEACHER", ["p4", "p5"]]
    cfg = make_cfg("mokd", [*HEADS, *opts])
    model = DistillationTrainer.build_model(cfg)
    losses, decision = step(model, batch_of(cfg))
    assert all(loss.isfinite() for loss in losses["teacher_head"].values())
    assert decision.gram[1, 1] > 0


def test_the_trained_batch_decides_the_distribution():
    """Each channel gets the teacher's mean and variance, however the student's are."""
    torch.manual_seed(0)
    target = torch.randn(3, 4, 5, 6) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None] + 7
    given = torch.randn(3, 4, 8, 2, requires_grad=True)
    found = normalise_like(100 * given - 5, target)
    for statistic in (torch.mean, torch.std):
        ours, theirs = (statistic(x, dim=(0, 2, 3)) for x in (found, target))
        assert torch.allclose(ours, theirs, rtol=2e-2)
    assert torch.allclose(normalise_like(target, target), target, atol=1e-4)
    found.square().sum().backward()
    assert given.grad.isfinite().all()


@pytest.mark.parametrize(
    "opts, message",
    [
        (["PROJECTOR", "linear"], "TEACHER_HEAD.PROJECTOR is 'linear': expected one of 'Linear'"),
        (["TEMPERATURE", 0.0], "TEACHER_HEAD.TEMPERATURE is 0.0: expected a finite number"),
        (["CLASS_WEIGHT", float("inf")], "CLASS_WEIGHT is inf: expected a finite number >= 0"),
        (
            ["TEMPERATURE", 2.0, "MOKD.TEACHER_HEAD.CLASS_WEIGHT", 0.0],
            "TEMPERATURE is 2.0, but it is read for classes only",
        ),
        (["RPN_WEIGHT", -1.0], "RPN_WEIGHT is -1.0: expected a finite number >= 0"),
    ],
)
def test_bad_options_are_explained(make_cfg, opts, message):
    with pytest.raises(ValueError, match=message):
        validate(make_cfg("mokd", [*HEADS, f"MOKD.TEACHER_HEAD.{opts[0]}", *opts[1:]]))


@pytest.mark.parametrize(
    "opts, message",
    [
        (["PROJECTOR", "none"], "'p3' of the student has 64 channels and 'p3' of the teacher 128"),
        (["STUDENT", [["p3"]]], "MOKD.TEACHER_HEAD.STUDENT is .*: expected a list of names"),
        (
            ["STUDENT", ["p3", "p6"], "MOKD.TEACHER_HEAD.RPN_WEIGHT", 0.0],
            "TEACHER has .'p6'., .* the teacher's heads read p3 .stride 8, 128 ch.., p4",
        ),
        (["STUDENT", ["p9"]], "MOKD.TEACHER_HEAD.STUDENT has .'p9'., which its side does not"),
        (
            ["STUDENT", ["p3", "p4"], "MOKD.TEACHER_HEAD.TEACHER", ["p4", "p4"]],
            "MOKD.TEACHER_HEAD.TEACHER .'p4', 'p4'. names a level twice",
        ),
        (["TEACHER", ["p3"]], "MOKD.TEACHER_HEAD.TEACHER is .* but MOKD.TEACHER_HEAD.STUDENT is"),
        (
            ["STUDENT", ["p6"]],
            "heads read boxes on .'p3', 'p4', 'p5'., but the student has levels for .'p6'. only",
        ),
    ],
)
def test_a_pair_that_does_not_fit_is_explained(make_cfg, opts, message):
    cfg = make_cfg("mokd", [*HEADS, f"MOKD.TEACHER_HEAD.{opts[0]}", *opts[1:]])
    with pytest.raises(ValueError, match=message):
        DistillationTrainer.build_model(cfg)


def test_heads_that_cannot_be_read_are_explained(make_cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(readers.build, "FCOS", dict)  # a detector that no reader knows
    path = tmp_path / "fcos.py"
    path.write_text(FCOS)
    opts = ["MODEL.META_ARCHITECTURE", "LazyConfigDetector", "MODEL.LAZY_CONFIG.FILE", str(path)]
    cfg = make_cfg("faster_rcnn", opts)
    opts = saved_teacher(cfg, build_model(cfg), tmp_path)
    message = "heads of the teacher, a FCOS, cannot be read.*'teacher_head' there.*.'features'."
    with pytest.raises(ValueError, match=message):
        DistillationTrainer.build_model(make_cfg("mokd", [*opts, *HEADS]))


def test_a_weight_of_an_rpn_that_is_not_there(family_cfg, tmp_path):
    cfg = family_cfg("retinanet")
    opts = saved_teacher(cfg, build_model(cfg), tmp_path)
    cfg = family_cfg("retinanet", [*opts, *HEADS, "MOKD.TEACHER_HEAD.RPN_WEIGHT", 3.0])
    with pytest.raises(ValueError, match="RPN_WEIGHT is 3.0, but the teacher, a RetinaNet, has no"):
        DistillationTrainer.build_model(cfg)


# ---- classifiers -------------------------------------------------------------------------------

DIGITS = [
    *("MOKD.OBJECTIVES", ["teacher_head"], "MOKD.FEATURES.DIM", 0),
    *("MOKD.LOGITS.TEMPERATURE", 1.0),
]


def test_a_classifiers_head_reads_its_own_features(build):
    """Nothing to learn with the teacher's features; its own tapped run is not touched."""
    model, batch = build(DIGITS), digit_batch()
    teacher = model.teacher.run(batch)
    objective = model.objectives["teacher_head"]
    nn.init.dirac_(objective.projectors["pre_logits"].weight)
    channels = teacher.features["pre_logits"].shape[1]
    weight = torch.eye(channels)[:, :, None, None]
    objective.projectors["pre_logits"].weight = nn.Parameter(weight)
    losses = objective(StudentOutputs(teacher.features, batch), teacher)
    assert set(losses) == {"loss_teacher_head"} and abs(losses["loss_teacher_head"]) < 1e-5
    kept = teacher.features["pre_logits"].clone()
    features = {"pre_logits": kept.flip(1)}
    assert objective(StudentOutputs(features, batch), teacher)["loss_teacher_head"] > 1e-4
    assert torch.equal(teacher.features["pre_logits"], kept)


def test_a_classifier_of_other_classes_can_be_the_teacher(build):
    found = gradients(
        build([*DIGITS, "MODEL.CLASSIFIER.NUM_CLASSES", 7]), batch=digit_batch(classes=7)
    )
    assert any("projectors" in name for name in found)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ("mobilenet_v2", "squeezenet1_1") else pytest.mark.slow)
        for n in FAMILIES
    ],
)
def test_heads_of_torchvisions_classifiers(name):
    """Whatever they read, (N, C) or (N, C, H, W), they say of it what the network says."""
    network = classifier(name).eval()
    size = 299 if name == "inception_v3" else 64
    size = 224 if name in ("vit_b_16", "maxvit_t") else size
    shape = find_taps(network, ["pre_logits"], size, "X")["pre_logits"]
    teacher = ClassifierTeacher(network, size)
    teacher.tap(("pre_logits",))
    said = teacher.run(digit_batch(size, 2))
    head = ClassifierHead(network.head, teacher, shape.kind == "vector")
    given = {"pre_logits": as_map(said.features["pre_logits"], shape)}
    assert abs(head.losses(given, said, 1.0)["loss_teacher_head"]) < 1e-5


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MOKD.TEACHER_HEAD.STUDENT", ["layer4"]], "a classifier's head reads 'pre_logits'"),
        (["MOKD.TEACHER_HEAD.BOX_WEIGHT", 2.0], "BOX_WEIGHT is 2.0, but it is read for detection"),
    ],
)
def test_options_of_detectors_do_not_suit_classifiers(make_digits_cfg, build, opts, message):
    with pytest.raises(ValueError, match=message):
        validate(make_digits_cfg([*DIGITS, *opts]))
        build([*DIGITS, *opts])
