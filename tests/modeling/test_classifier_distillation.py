# Copyright (c) The mokd_det authors.
"""Distilling classifiers: gradients by equality, and every family."""

import pytest
import torch
import torch.nn.functional as F
import torchvision

from mokd_det.config import load_config
from mokd_det.data.classification import Batch
from mokd_det.engine import DistillationTrainer
from mokd_det.modeling import Classifier, build_network
from mokd_det.objectives import StudentOutputs
from mokd_det.teachers import PRE_LOGITS

from .classifiers import (
    FAMILIES,
    FIXED,
    MEASURE_AT,
    TINY_VIT,
    NoSplit,
    assert_close,
    classifier_families,
    digit_batch,
    gradients,
)


@pytest.mark.parametrize("measured_at", ["features", "parameters"])
@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v2", "squeezenet1_1"])
def test_three_objectives_at_weights_one_are_the_plain_sum(build, measured_at, name):
    """Also with dropout in the head: both of its runs drop the same."""
    opts = [*FIXED, [1.0, 1.0, 1.0], MEASURE_AT, measured_at, "MODEL.CLASSIFIER.NAME", name]
    model = build(opts)
    assert model.names == ["task", "features", "logits"]
    torch.manual_seed(5)
    batch = digit_batch(64)
    balanced = gradients(model, batch=batch)

    model.boundary = NoSplit()
    torch.manual_seed(5)
    student = model.student
    outputs = model.teacher.run(batch)
    logits = []
    features = {}
    hooks = [
        student.head.register_forward_pre_hook(lambda m, a: features.update({PRE_LOGITS: a[0]})),
        student.network.register_forward_hook(lambda m, a, output: logits.append(output)),
    ]
    model.zero_grad()
    task = student(batch)["loss_cls"]
    for hook in hooks:
        hook.remove()
    matched = model.objectives["features"](StudentOutputs(features, batch), outputs)
    matched = matched["loss_features"]
    t = 4.0
    divergence = F.kl_div(
        F.log_softmax(logits[0] / t, 1), F.softmax(outputs.logits / t, 1), reduction="batchmean"
    )
    (task + matched + t * t * divergence).backward()
    plain = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert balanced.keys() == plain.keys()
    for key, value in plain.items():
        assert_close(balanced[key], value, key)


@pytest.mark.parametrize("measured_at", ["features", "parameters"])
@pytest.mark.parametrize("rule", ["fixed", "loss_ratio"])
def test_the_head_gets_its_task_and_the_weighted_logits(build, measured_at, rule):
    """And the projectors the weighted features, or the task's pace whatever the weight."""
    model = build([*FIXED, [1.0, 0.5, 3.0], MEASURE_AT, measured_at, "MOKD.BALANCING.RULE", rule])
    balanced = gradients(model)
    decision = model.boundary.last
    weights = decision.weights.tolist()
    own = decision.factors(1, is_own=True)
    if rule == "fixed":
        assert weights == [1.0, 0.5, 3.0] and own == 0.5
    else:
        assert own > 100 * weights[1]  # no agreement has been shown in one step
    model.boundary = NoSplit()
    torch.manual_seed(1)
    parts = [gradients(model, [float(i == j) for j in range(3)]) for i in range(3)]
    for name, value in balanced.items():
        given = [part.get(name, torch.zeros_like(value)) for part in parts]
        if name.startswith("student.network.fc."):
            w = [1.0, 0.0, weights[2]]
        elif name.startswith("student."):
            w = weights
        else:  # projectors
            w = [0.0, own, 0.0]
            assert value.any(), name
        expected = sum(a * b for a, b in zip(w, given))
        assert_close(value, expected, name)


@pytest.mark.parametrize("rule", ["loss_ratio", "min_norm", "cosine_gate"])
def test_three_objectives_are_balanced_by_every_rule(build, rule):
    model = build(["MOKD.BALANCING.RULE", rule])
    gradients(model)
    decision = model.boundary.last
    assert decision.gram.shape == (3, 3) and decision.weights.isfinite().all()
    assert decision.fallback == "" and (decision.gram.diagonal() > 0).all()
    assert model.boundary.names == [PRE_LOGITS]


def test_the_measured_gradients_are_those_at_the_heads_input(build):
    model = build([*FIXED, [1.0, 1.0, 1.0]])
    gradients(model)
    gram = model.boundary.last.gram
    seen = {}

    def keep(_module, args):
        seen["x"] = args[0]
        args[0].retain_grad()

    model.boundary = NoSplit()
    handle = model.student.head.register_forward_pre_hook(keep)
    objectives = model(digit_batch())
    objectives["task"]["loss_cls"].backward(retain_graph=True)
    task = seen["x"].grad.clone()
    handle.remove()
    assert gram[0, 0].item() == pytest.approx((task**2).sum().item(), rel=1e-4)


def test_spatial_taps_alone_are_measured_at_the_last_of_them(build):
    opts = ["MOKD.OBJECTIVES", ["features"], "MOKD.FEATURES.STUDENT", ["stage3", "stage4"]]
    model = build([*opts, "MOKD.FEATURES.TEACHER", ["layer3", "layer4"]])
    assert set(model.objectives["features"].projectors) == {"stage3", "stage4"}
    gradients(model)
    assert model.boundary.names == ["stage3", "stage4"]
    gram = model.boundary.last.gram
    assert gram[0, 0] > 0 and gram[0, 1] != 0  # the task arrives at stage4


def test_logits_beside_features_elsewhere_need_a_common_place(build):
    opts = ["MOKD.FEATURES.STUDENT", ["stage4"], "MOKD.FEATURES.TEACHER", ["layer4"]]
    with pytest.raises(ValueError, match="could not see their conflict. Add 'pre_logits'"):
        build(opts)
    gradients(build([*opts, MEASURE_AT, "parameters"]))
    gradients(build([*opts, *FIXED, [1.0, 1.0, 1.0]]))
    both = ["MOKD.FEATURES.STUDENT", ["pre_logits", "stage4"]]
    model = build([*both, "MOKD.FEATURES.TEACHER", ["pre_logits", "layer4"]])
    gradients(model)
    assert model.boundary.names == ["stage4", PRE_LOGITS]


VIT_STUDENT = [*TINY_VIT, "MODEL.PIXEL_STD", [50.0, 50.0, 50.0]]


def vit_weights(tmp_path):
    cfg = load_config("configs/Digits/student_scratch.yaml", TINY_VIT)
    path = str(tmp_path / "vit.pth")
    torch.save(Classifier(cfg).state_dict(), path)
    return path


@pytest.mark.parametrize(
    "opts",
    [
        ["MOKD.FEATURES.STUDENT", [], "MOKD.FEATURES.TEACHER", []],
        # tokens on their grid against a map
        [
            *("MOKD.FEATURES.STUDENT", ["encoder.layers.encoder_layer_11", "pre_logits"]),
            *("MOKD.FEATURES.TEACHER", ["layer3", "pre_logits"]),
        ],
    ],
    ids=["pre_logits", "tokens"],
)
def test_a_convolutional_teacher_of_a_transformer(build, opts):
    model = build([*VIT_STUDENT, *opts])
    before = {n: p.clone() for n, p in model.student.named_parameters()}
    for name in gradients(model):
        assert not name.startswith("teacher")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.student.parameters())
    assert before.keys() == dict(model.student.named_parameters()).keys()


@pytest.mark.parametrize("taps", [([], []), (["stage4", "pre_logits"],) * 2])
def test_a_transformer_as_teacher_at_its_own_resolution(build, tmp_path, taps):
    opts = ["MOKD.TEACHER.CONFIG_FILE", "", "MOKD.TEACHER.CLASSIFIER", "vit_tiny_16"]
    opts += ["MOKD.TEACHER.WEIGHTS", vit_weights(tmp_path), "MOKD.TEACHER.IMAGE_SIZE", 48]
    opts += ["MOKD.TEACHER.OPTS", ["MODEL.CLASSIFIER.OPTIONS", "{image_size: 48}"]]
    ours, theirs = taps
    if theirs:
        theirs = ["encoder.layers.encoder_layer_3", "pre_logits"]
    opts += ["MOKD.FEATURES.STUDENT", ours, "MOKD.FEATURES.TEACHER", theirs]
    with pytest.raises(ValueError, match="encoder.pos_embedding"):  # weights for 32 pixels
        build(opts)
    cfg = load_config("configs/Digits/student_scratch.yaml", TINY_VIT)
    cfg.MODEL.CLASSIFIER.OPTIONS.image_size = 48
    torch.save(Classifier(cfg).state_dict(), tmp_path / "vit.pth")
    model = build(opts)
    assert model.teacher.image_size == 48 and model.teacher.is_resized
    gradients(model)


SIDES = {"inception_v3": 299, "maxvit_t": 224, "vit_b_16": 32}


@pytest.mark.parametrize("name", classifier_families(["resnet18", "efficientnet_b0"]))
def test_every_family_is_distilled(build, name):
    """Also those whose head begins with a dropout that works in place."""
    opts = ["MODEL.CLASSIFIER.NAME", name]
    if name == "vit_b_16":
        opts += ["MODEL.CLASSIFIER.OPTIONS", "{image_size: 32}"]
    if FAMILIES[name][0] != PRE_LOGITS:  # whose heads have hidden layers
        opts += [MEASURE_AT, "parameters"]
    side = SIDES.get(name, 64)
    opts += ["INPUT.CLASSIFICATION.SIZE_TRAIN", side, "INPUT.CLASSIFICATION.SIZE_TEST", side]
    model = build(opts)
    found = gradients(model, batch=digit_batch(side, count=2))
    reached = [n for n in found if n.startswith("student.")]
    assert reached and all(found[n].isfinite().all() for n in reached)
    assert len(model.boundary.last.weights) == 3


@pytest.mark.parametrize("measured_at", ["features", "parameters"])
def test_a_head_that_works_in_place_changes_nothing(build, measured_at):
    """Its gradients are those of the same head that does not."""
    found = []
    for inplace in (True, False):
        model = build(
            [
                "MODEL.CLASSIFIER.NAME",
                "mnasnet0_5",
                *FIXED,
                [1.0, 1.0, 1.0],
                MEASURE_AT,
                measured_at,
            ]
        )
        model.student.head[0].inplace = inplace
        torch.manual_seed(2)
        found.append(gradients(model, batch=digit_batch(64)))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_places_of_a_network_with_heads_for_training_only(build):
    opts = ["MODEL.CLASSIFIER.NAME", "googlenet", MEASURE_AT, "parameters"]
    with pytest.raises(ValueError, match="cannot have the heads for training only of GoogLeNet"):
        build(opts)


def test_a_model_takes_its_own_state(build):
    model = build()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert "student.conv1.0.weight" in state
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.zero_()
    model.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_timms_networks_teach_each_other(build, tmp_path):
    pytest.importorskip("timm")
    teacher = build_network("timm.resnet18", 10)
    torch.save(teacher.state_dict(), tmp_path / "resnet.pth")
    opts = ["MODEL.CLASSIFIER.NAME", "timm.vit_tiny_patch16_224"]
    opts += ["MODEL.CLASSIFIER.OPTIONS", "{img_size: 32, depth: 2}"]
    opts += ["MOKD.TEACHER.CONFIG_FILE", "", "MOKD.TEACHER.CLASSIFIER", "timm.resnet18"]
    opts += ["MOKD.TEACHER.WEIGHTS", str(tmp_path / "resnet.pth")]
    opts += ["MOKD.FEATURES.STUDENT", ["blocks.0", "pre_logits"]]
    model = build([*opts, "MOKD.FEATURES.TEACHER", ["layer3", "pre_logits"]])
    state = model.teacher.model.network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in teacher.state_dict().items())
    assert set(model(digit_batch())) == {"task", "features", "logits"}
    gradients(model)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.student.parameters())


def test_no_trace_of_the_teacher(build):
    model = build()
    names = {n.split(".")[0] for n, _ in model.named_parameters()} | {
        n.split(".")[0] for n in model.state_dict()
    }
    assert names == {"student", "objectives"}
    stock = torchvision.models.shufflenet_v2_x0_5(num_classes=10)
    stock.load_state_dict(model.student.state_dict(), strict=True)
    teacher = {id(p) for p in model.teacher.model.parameters()}
    assert not teacher & {id(p) for p in model.parameters()}
    model.train()
    model(digit_batch())
    assert not model.teacher.model.training


def test_the_same_initial_student_as_without_distillation(make_digits_cfg):
    states = []
    for enabled in (True, False):
        torch.manual_seed(3)
        model = DistillationTrainer.build_model(make_digits_cfg(["MOKD.ENABLED", enabled]))
        states.append(model.student.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_an_empty_batch_of_broken_images(build):
    model = build().eval()
    empty = Batch(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    assert model(empty).shape == (0, 10)
