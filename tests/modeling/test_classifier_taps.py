# Copyright (c) The mokd_det authors.
"""Features inside classifiers: which there are, and on one grid."""

import pytest
import torch

from mokd_det.config import load_config
from mokd_det.modeling import Classifier, TapShape, as_map, common_grid, find_taps, replace_taps
from mokd_det.teachers import PRE_LOGITS

from .classifiers import TINY_VIT, classifier, digit_batch


def test_taps_come_in_the_order_in_which_they_run():
    shapes = find_taps(classifier("resnet18"), [PRE_LOGITS, "layer3", "layer2.0.conv1"], 32, "X")
    assert list(shapes) == ["layer2.0.conv1", "layer3", PRE_LOGITS]
    assert shapes["layer3"] == TapShape("map", 256)


def test_taps_of_transformers():
    swin = find_taps(classifier("swin_t"), ["features", PRE_LOGITS], 64, "X")
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
        find_taps(classifier("resnet18"), [name], 32, "X")


def test_an_output_of_several_tensors_is_no_feature():
    tap = "encoder.layers.encoder_layer_0.self_attention"
    with pytest.raises(ValueError, match=f"X has '{tap}', whose output .tuple. is no features"):
        find_taps(classifier("vit_b_16"), [tap], 224, "X")


def test_a_tap_that_does_not_run_is_an_error():
    model = classifier("resnet18")
    with pytest.raises(RuntimeError, match=r"\['layer2'\] of the classifier did not run"):
        with replace_taps(model, ["layer2"], lambda features: features):
            pass


def test_looking_for_taps_leaves_no_trace():
    model = classifier("resnet18").train()
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


def test_what_follows_a_tap_may_work_in_place():
    model = classifier("vgg11").eval()
    read = {}
    with replace_taps(model, ["features.0", "features.3"], lambda x: read.update(x) or x):
        model(digit_batch())
    assert read["features.0"].min() < 0 and read["features.3"].min() < 0  # not yet rectified
