# Copyright (c) The mokd_det authors.
"""Distilling classifiers: taps, objectives, the teacher, and gradients by equality."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from mokd_det.config import load_config
from mokd_det.data.classification import Batch
from mokd_det.engine import DistillationTrainer
from mokd_det.modeling import Classifier
from mokd_det.modeling.classification import (
    ClassifierTeacher,
    build_classifier_teacher,
    build_network,
)
from mokd_det.modeling.classification.taps import (
    PRE_LOGITS,
    TapShape,
    as_map,
    common_grid,
    find_taps,
    replace_taps,
)
from mokd_det.modeling.trained import teacher_config

from .test_networks import FAMILIES

FIXED = ["MOKD.BALANCING.RULE", "fixed", "MOKD.BALANCING.WEIGHTS"]
PLACE = "MOKD.BALANCING.PLACE"
TINY_VIT = [
    "MODEL.CLASSIFIER.NAME",
    "vit_tiny_16",
    "MODEL.CLASSIFIER.OPTIONS",
    "{image_size: 32}",
]


def digit_batch(size=32, count=6, classes=10):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.arange(count) % classes)


def network(name, **options):
    return Classifier(
        network=torchvision.models.get_model(name, num_classes=10, **options),
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
        num_classes=10,
    )


def test_taps_come_in_the_order_in_which_they_run():
    shapes = find_taps(network("resnet18"), [PRE_LOGITS, "layer3", "layer2.0.conv1"], 32, "X")
    assert list(shapes) == ["layer2.0.conv1", "layer3", PRE_LOGITS]
    assert shapes["layer3"] == TapShape("map", 256)


def test_taps_of_transformers():
    swin = find_taps(network("swin_t"), ["features", PRE_LOGITS], 64, "X")
    assert swin["features"] == TapShape("map_channels_last", 768)
    cfg = load_config("configs/Digits/student_scratch.yaml", TINY_VIT)
    vit = find_taps(Classifier(cfg), ["encoder.layers.encoder_layer_5"], 32, "X")
    assert vit["encoder.layers.encoder_layer_5"] == TapShape("tokens", 192)


@pytest.mark.parametrize(
    "name, message",
    [
        ("layer9", "X has 'layer9', which ResNet does not have. Use 'pre_logits' or a submodule: "),
        ("", "X has ''"),
        ("fc", "X has 'fc', which is in the head 'fc'"),
        ("layer1.0.relu", "ran more than once"),
    ],
)
def test_taps_that_cannot_be_read(name, message):
    with pytest.raises(ValueError, match=message):
        find_taps(network("resnet18"), [name], 32, "X")


def test_a_tap_that_does_not_run_is_an_error():
    model = network("resnet18")
    with pytest.raises(RuntimeError, match=r"\['layer2'\] of the classifier did not run"):
        with replace_taps(model, ["layer2"], lambda features: features):
            pass


def test_looking_for_taps_leaves_no_trace():
    model = network("resnet18").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    find_taps(model, ["layer4"], 32, "X")
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_every_kind_of_feature_becomes_a_map():
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    assert as_map(x, TapShape("map", 3)) is x
    assert torch.equal(as_map(x.permute(0, 2, 3, 1), TapShape("map_channels_last", 3)), x)
    tokens = x.flatten(2).transpose(1, 2)
    assert torch.equal(as_map(tokens, TapShape("tokens", 3)), x)
    with_class = torch.cat([torch.full((2, 1, 3), -1.0), tokens], 1)
    assert torch.equal(as_map(with_class, TapShape("tokens", 3)), x)
    assert as_map(x[:, :, 0, 0], TapShape("vector", 3)).shape == (2, 3, 1, 1)


def test_the_coarser_grid_is_common():
    x = torch.rand(2, 3, 4, 4)
    student, teacher = common_grid(x, torch.rand(2, 5, 1, 1))
    assert torch.allclose(student[..., 0, 0], x.mean((2, 3))) and teacher.shape == (2, 5, 1, 1)
    student, teacher = common_grid(x, torch.rand(2, 5, 8, 8))
    assert student is x and teacher.shape == (2, 5, 4, 4)


@pytest.fixture
def build(make_digits_cfg):
    def make(opts=()):
        torch.manual_seed(1)
        return DistillationTrainer.build_model(
            make_digits_cfg(["MOKD.FEATURES.DIM", 32, *opts])
        ).train()

    return make


def gradients(model, losses=None, batch=None):
    """After a balanced step on the digits; or of the given sum of losses."""
    model.zero_grad()
    objectives = model(batch or digit_batch())
    values = [sum(parts.values()) for parts in objectives.values()]
    if losses is None:
        model.boundary.backward(values, model.parameters())
    else:
        sum(w * v for w, v in zip(losses, values)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(value, expected, name):
    """Up to the order in which floats are added, which deep networks amplify."""
    assert (value - expected).norm() <= 1e-3 * expected.norm() + 1e-5, name


class NoSplit:
    """In the boundary's place: all objectives use the same features."""

    balancer = type("B", (), {"needs_second_forward": False})

    def split(self, features, objectives, names=None, extra=None, own=()):
        return [[*features, *(extra or {}).get(i, ())] for i in range(objectives)]


@pytest.mark.parametrize("place", ["features", "parameters"])
@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v2", "squeezenet1_1"])
def test_three_objectives_at_weights_one_are_the_plain_sum(build, place, name):
    """Also with dropout in the head: both of its runs drop the same."""
    opts = [*FIXED, [1.0, 1.0, 1.0], PLACE, place, "MODEL.CLASSIFIER.NAME", name]
    model = build(opts)
    assert model.objectives == ["task", "features", "outputs"]
    torch.manual_seed(5)
    batch = digit_batch(64)
    balanced = gradients(model, batch=batch)

    model.boundary = NoSplit()
    torch.manual_seed(5)
    student = model.student
    view = model.teacher.view(batch)
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
    matched = model.features(features, view, model.teacher, batch)["loss_features"]
    t = 4.0
    divergence = F.kl_div(
        F.log_softmax(logits[0] / t, 1), F.softmax(view.logits / t, 1), reduction="batchmean"
    )
    (task + matched + t * t * divergence).backward()
    plain = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert balanced.keys() == plain.keys()
    for key, value in plain.items():
        assert_close(balanced[key], value, key)


@pytest.mark.parametrize("place", ["features", "parameters"])
@pytest.mark.parametrize("rule", ["fixed", "constant_dominance", "loss_ratio"])
def test_the_head_gets_its_task_and_the_weighted_logits(build, place, rule):
    """And the projectors the weighted features, or the task's pace whatever the weight."""
    model = build([*FIXED, [1.0, 0.5, 3.0], PLACE, place, "MOKD.BALANCING.RULE", rule])
    balanced = gradients(model)
    weights, own = (
        x.tolist() for x in (model.boundary.last.weights, model.boundary.last.own_weights)
    )
    if rule == "fixed":
        assert weights == own == [1.0, 0.5, 3.0]
    else:
        assert own[1] > 100 * weights[1]  # no agreement has been shown in one step
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
            w = [0.0, own[1], 0.0]
            assert value.any(), name
        expected = sum(a * b for a, b in zip(w, given))
        assert_close(value, expected, name)


@pytest.mark.parametrize(
    "rule",
    [
        *("constant_dominance", "loss_ratio", "aligned"),
        *("protected_min_norm", "min_norm", "anchored", "imtl_g"),
    ],
)
def test_three_objectives_are_balanced_by_every_rule(build, rule):
    model = build(["MOKD.BALANCING.RULE", rule])
    gradients(model)
    balance = model.boundary.last
    assert balance.gram.shape == (3, 3) and balance.weights.isfinite().all()
    assert balance.fallback == "" and (balance.gram.diagonal() > 0).all()
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
    opts = ["MOKD.OUTPUTS.ENABLED", False, "MOKD.FEATURES.STUDENT", ["stage3", "stage4"]]
    model = build([*opts, "MOKD.FEATURES.TEACHER", ["layer3", "layer4"]])
    assert model.taps == ("stage3", "stage4")
    assert set(model.features.projectors) == {"stage3", "stage4"}
    gradients(model)
    gram = model.boundary.last.gram
    assert gram[0, 0] > 0 and gram[0, 1] != 0  # the task arrives at stage4


def test_logits_beside_features_elsewhere_need_a_common_place(build):
    opts = ["MOKD.FEATURES.STUDENT", ["stage4"], "MOKD.FEATURES.TEACHER", ["layer4"]]
    with pytest.raises(ValueError, match="could not see their conflict. Add 'pre_logits'"):
        build(opts)
    gradients(build([*opts, PLACE, "parameters"]))
    gradients(build([*opts, *FIXED, [1.0, 1.0, 1.0]]))
    both = ["MOKD.FEATURES.STUDENT", ["pre_logits", "stage4"]]
    model = build([*both, "MOKD.FEATURES.TEACHER", ["pre_logits", "layer4"]])
    assert model.taps == ("stage4", PRE_LOGITS)
    gradients(model)


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


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_distilled(build, name):
    """Also those whose head begins with a dropout that works in place."""
    opts = ["MODEL.CLASSIFIER.NAME", name]
    if name == "vit_b_16":
        opts += ["MODEL.CLASSIFIER.OPTIONS", "{image_size: 32}"]
    if FAMILIES[name][0] != PRE_LOGITS:  # whose heads have hidden layers
        opts += [PLACE, "parameters"]
    side = SIDES.get(name, 64)
    opts += ["INPUT.CLASSIFICATION.SIZE_TRAIN", side, "INPUT.CLASSIFICATION.SIZE_TEST", side]
    model = build(opts)
    found = gradients(model, batch=digit_batch(side, count=2))
    reached = [n for n in found if n.startswith("student.")]
    assert reached and all(found[n].isfinite().all() for n in reached)
    assert len(model.boundary.last.weights) == 3


@pytest.mark.parametrize("place", ["features", "parameters"])
def test_a_head_that_works_in_place_changes_nothing(build, place):
    """Its gradients are those of the same head that does not."""
    found = []
    for inplace in (True, False):
        model = build(
            ["MODEL.CLASSIFIER.NAME", "mnasnet0_5", *FIXED, [1.0, 1.0, 1.0], PLACE, place]
        )
        model.student.head[0].inplace = inplace
        torch.manual_seed(2)
        found.append(gradients(model, batch=digit_batch(64)))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_what_follows_a_tap_may_work_in_place():
    model = network("vgg11").eval()
    read = {}
    with replace_taps(model, ["features.0", "features.3"], lambda x: read.update(x) or x):
        model(digit_batch())
    assert read["features.0"].min() < 0 and read["features.3"].min() < 0  # not yet rectified


@pytest.mark.parametrize("name, tap", [("resnet18", "bn1"), ("densenet121", "features")])
def test_a_tap_is_the_same_tensor_on_both_sides(name, tap):
    """On the teacher's, too, what follows may work in place."""
    model = network(name).eval()
    seen, batch = {}, digit_batch()
    with replace_taps(model, [tap], lambda features: seen.update(features) or features):
        model(batch)
    teacher = ClassifierTeacher(model, 32)
    teacher.taps = (tap,)
    view = teacher.view(batch)
    teacher.wait(view)
    assert seen[tap].min() < 0 and torch.equal(view.features[tap], seen[tap])


def test_places_of_a_network_with_heads_for_training_only(build):
    opts = ["MODEL.CLASSIFIER.NAME", "googlenet", "MOKD.BALANCING.PLACE", "parameters"]
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
    assert set(model(digit_batch())) == {"task", "features", "outputs"}
    gradients(model)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.student.parameters())


def test_teacher_sees_the_same_images_under_its_own_normalisation(make_digits_cfg):
    opts = ["MOKD.TEACHER.OPTS", ["MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]]]
    teacher = build_classifier_teacher(make_digits_cfg(opts))
    teacher.taps = (PRE_LOGITS, "layer4")
    batch = digit_batch()
    seen = []
    teacher.model.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    view = teacher.view(batch)
    mean = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    assert torch.allclose(seen[0], (batch.images.float() - mean) / std)
    assert set(view.features) == {PRE_LOGITS, "layer4"}
    assert torch.equal(teacher.model.network.fc(view.features[PRE_LOGITS]), view.logits)
    assert not view.logits.requires_grad


@pytest.mark.parametrize(
    "options, bound",
    [
        (["PRECISION", "bfloat16"], 0.1),
        (["CHANNELS_LAST", True], 1e-3),
        (["COMPILE", "aot_eager"], 1e-3),
        (["INFERENCE_MODE", True], 0.0),
    ],
)
def test_options_of_speed_change_the_view_within_bounds_only(make_digits_cfg, options, bound):
    views = []
    for opts in ([], options):
        opts = [f"MOKD.TEACHER.{o}" if i % 2 == 0 else o for i, o in enumerate(opts)]
        teacher = build_classifier_teacher(make_digits_cfg(opts))
        teacher.taps = (PRE_LOGITS,)
        teacher.view(digit_batch())
        views.append(teacher.view(digit_batch()))
    for name in ("logits", PRE_LOGITS):
        plain, fast = (view.logits if name == "logits" else view.features[name] for view in views)
        assert fast.dtype == torch.float32 and not fast.is_inference()
        assert (fast - plain).abs().max() <= bound * plain.std()


def test_no_trace_of_the_teacher(build):
    model = build()
    names = {n.split(".")[0] for n, _ in model.named_parameters()} | {
        n.split(".")[0] for n in model.state_dict()
    }
    assert names == {"student", "features"}
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


def test_a_teacher_by_name_wants_what_its_weights_want(make_digits_cfg, monkeypatch):
    opts = ["MOKD.TEACHER.CONFIG_FILE", "", "MOKD.TEACHER.CLASSIFIER", "mobilenet_v3_small"]
    opts += ["MOKD.TEACHER.WEIGHTS", "IMAGENET1K_V1"]
    cfg = teacher_config(make_digits_cfg(opts))
    assert cfg.MODEL.CLASSIFIER.NAME == "mobilenet_v3_small"
    assert cfg.MODEL.CLASSIFIER.WEIGHTS == "IMAGENET1K_V1" and cfg.MODEL.WEIGHTS == ""
    assert cfg.MODEL.PIXEL_MEAN == pytest.approx([123.675, 116.28, 103.53])
    assert cfg.MODEL.CLASSIFIER.NUM_CLASSES == 10


@pytest.mark.parametrize(
    "opts, error, message",
    [
        (["CLASSIFIER", "resnet18"], ValueError, "give one of the first two"),
        (["CONFIG_FILE", ""], ValueError, "give one of the first two"),
        (["WEIGHTS", ""], ValueError, "MOKD.TEACHER.WEIGHTS is empty, and so are"),
        (["WEIGHTS", "no/file.pth"], FileNotFoundError, "'no/file.pth' does not exist"),
        (["WEIGHTS", "V9"], ValueError, "V9': neither a file nor one of"),
        (["CONFIG_FILE", "configs/Quick-Start/teacher.yaml"], ValueError, "but the student is a c"),
        (["IMAGE_SIZE", -1], ValueError, "IMAGE_SIZE is -1"),
        (["STREAM", True], ValueError, "STREAM True needs a GPU"),
    ],
)
def test_teachers_that_cannot_be(make_digits_cfg, opts, error, message):
    opts = [f"MOKD.TEACHER.{opts[0]}", opts[1]]
    with pytest.raises(error, match=message):
        build_classifier_teacher(make_digits_cfg(opts))


@pytest.mark.parametrize("name", ["resnet17", "timm.resnet17"])
def test_an_unknown_teacher_is_not_called_the_student(make_digits_cfg, name):
    if name.startswith("timm."):
        pytest.importorskip("timm")
    opts = ["MOKD.TEACHER.CONFIG_FILE", "", "MOKD.TEACHER.CLASSIFIER", name]
    with pytest.raises(ValueError, match=f"^MOKD.TEACHER.CLASSIFIER is '{name}'"):
        build_classifier_teacher(make_digits_cfg(opts))


def test_a_classifier_cannot_teach_a_detector(make_cfg):
    with pytest.raises(ValueError, match="CLASSIFIER is 'resnet18', but the student is no classif"):
        teacher_config(make_cfg("mokd", ["MOKD.TEACHER.CLASSIFIER", "resnet18"]))


def test_other_classes_have_no_common_logits(build):
    with pytest.raises(ValueError, match="student has 7 classes and the teacher 10"):
        build(["MODEL.CLASSIFIER.NUM_CLASSES", 7])


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MOKD.OUTPUTS.TEMPERATURE", 0.0], "TEMPERATURE is 0.0: expected > 0"),
        (["MOKD.FEATURES.FOREGROUND", "teacher"], "classifiers have no boxes"),
        (["MOKD.FEATURES.LEVEL_WEIGHTS", "positions"], "no levels of a pyramid"),
        (["MOKD.FEATURES.STUDENT", ["stage4"]], "MOKD.FEATURES.TEACHER has 'stage4', which ResNet"),
        (
            ["MOKD.FEATURES.STUDENT", ["stage4"], "MOKD.FEATURES.TEACHER", ["layer4", "layer3"]],
            "must be lists of the same length",
        ),
        (["MOKD.FEATURES.STUDENT", ["stage9"]], "MOKD.FEATURES.STUDENT has 'stage9'"),
        (["MOKD.FEATURES.ENABLED", False, "MOKD.OUTPUTS.ENABLED", False], "enable one of them"),
        (["MODEL.BACKBONE.COMPILE", "eager"], "are for detectors"),
    ],
)
def test_pairs_that_cannot_be_distilled(make_digits_cfg, opts, message):
    with pytest.raises(ValueError, match=message):
        cfg = make_digits_cfg(opts)
        DistillationTrainer(cfg)


def test_other_classes_are_fine_without_logits(build):
    opts = ["MODEL.CLASSIFIER.NUM_CLASSES", 7, "MOKD.OUTPUTS.ENABLED", False]
    gradients(build(opts), batch=digit_batch(classes=7))


def test_soft_targets_of_mixed_images(build):
    batch = digit_batch()
    probabilities = F.one_hot(batch.targets, 10).float()
    mixed = Batch(batch.images.float(), 0.7 * probabilities + 0.3 * probabilities.roll(1, 0))
    model = build()
    soft = model(mixed)["task"]["loss_cls"]
    first = model(batch)["task"]["loss_cls"]
    second = model(Batch(batch.images, batch.targets.roll(1, 0)))["task"]["loss_cls"]
    assert soft.item() == pytest.approx(0.7 * first.item() + 0.3 * second.item(), rel=1e-4)
    assert math.isfinite(model(mixed)["outputs"]["loss_logits"].item())


def test_half_of_a_batch_on_an_empty_image_list(build):
    model = build().eval()
    empty = Batch(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    assert model(empty).shape == (0, 10)
    assert isinstance(model.student.network, nn.Module)
