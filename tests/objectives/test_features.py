# Copyright (c) The mokd_det authors.
"""Foreground weighting of feature matching, and pairs of different grids and inputs."""

import pytest
import torch

from mokd_det.engine import DistillationTrainer
from mokd_det.modeling.foreground import foreground_weights
from mokd_det.subspace import FEATURE_LOSSES

from .families import batch_of, step


def test_weights_by_hand():
    """A map of 4 x 6 cells of 8 pixels; the box touches rows 0-1 and columns 1-2."""
    weights = foreground_weights([torch.tensor([[9.0, 3.0, 20.0, 12.0]])], (4, 6), 8, 0.5)
    inside = torch.zeros(4, 6, dtype=torch.bool)
    inside[0:2, 1:3] = True
    assert weights.shape == (1, 1, 4, 6)
    assert torch.allclose(weights[0, 0][inside], torch.tensor(0.5 * 24 / 4))
    assert torch.allclose(weights[0, 0][~inside], torch.tensor(0.5 * 24 / 20))
    assert weights.mean() == pytest.approx(1.0)


def test_rotated_boxes_are_refused():
    with pytest.raises(ValueError, match="FOREGROUND takes boxes of 4 numbers, not rotated"):
        foreground_weights([torch.zeros(1, 5)], (4, 6), 8, 0.5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_each_image_has_mean_one_and_its_share_inside(share):
    boxes = [
        torch.tensor([[0.0, 0.0, 30.0, 30.0], [20.0, 20.0, 50.0, 40.0]]),
        torch.zeros(0, 4),  # nothing in it
        torch.tensor([[-5.0, -5.0, 500.0, 500.0]]),  # nothing else in it
        torch.tensor([[33.0, 33.0, 34.0, 34.0]]),  # smaller than a cell: still one
        torch.tensor([[900.0, 900.0, 950.0, 950.0]]),  # in the padding only
    ]
    weights = foreground_weights(boxes, (8, 8), 8, share)
    assert torch.allclose(weights.mean((1, 2, 3)), torch.ones(5))
    for index in (1, 2, 4):
        assert (weights[index] == 1).all()
    assert weights[3, 0, 4, 4] == pytest.approx(64 * share)


@pytest.mark.parametrize("name", sorted(FEATURE_LOSSES))
def test_losses_with_weights(name):
    loss = FEATURE_LOSSES.get(name)
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 4, 6)
    ones = torch.ones(2, 1, 4, 6)
    assert torch.allclose(loss(student, teacher, ones), loss(student, teacher))
    half = torch.zeros_like(ones)
    half[..., :3] = 2.0  # all weight on the left half
    expected = loss(student[..., :3].contiguous(), teacher[..., :3].contiguous())
    assert torch.allclose(loss(student, teacher, half), expected, atol=1e-6)


@pytest.mark.parametrize("source", ["ground_truth", "teacher"])
def test_foreground_changes_the_loss_only_where_there_are_objects(make_cfg, source):
    opts = ["MOKD.FEATURES.FOREGROUND", source, "MOKD.FEATURES.FOREGROUND_SCORE", 0.3]
    losses = []
    for extra in ([], [*opts, "MOKD.FEATURES.FOREGROUND_SHARE", 1.0]):
        cfg = make_cfg("mokd", extra)
        torch.manual_seed(0)
        model = DistillationTrainer.build_model(cfg)
        torch.manual_seed(0)
        objectives, balance = step(model, batch_of(cfg))
        assert balance.fallback == "" and list(objectives) == ["task", "features"]
        losses.append(objectives["features"]["loss_features"].item())
    assert losses[0] != losses[1]


def test_levels_by_positions_are_the_mean_over_all_positions(make_cfg):
    """Two levels of 32 x 32 and 16 x 16 positions: four fifths and one fifth, times two."""
    parts = []
    for names, kind in ((["p3"], "equal"), (["p4"], "equal"), (["p3", "p4"], "positions")):
        opts = ["MOKD.FEATURES.STUDENT", names, "MOKD.FEATURES.LEVEL_WEIGHTS", kind]
        cfg = make_cfg("mokd", opts)
        torch.manual_seed(0)
        model = DistillationTrainer.build_model(cfg)
        for projector in model.projectors.values():  # the same for a level alone and with others
            for parameter in projector.parameters():
                torch.nn.init.eye_(parameter)
            torch.nn.init.eye_(projector.teacher_weight)
        torch.manual_seed(0)
        objectives, _ = step(model, batch_of(cfg))
        parts.append(objectives["features"]["loss_features"].item())
    fine, coarse, both = parts
    assert both == pytest.approx(2 * (0.8 * fine + 0.2 * coarse), rel=1e-5)


def test_a_frozen_projector_stays_and_the_student_learns(make_cfg):
    cfg = make_cfg("mokd", ["MOKD.FEATURES.PROJECTOR", "FrozenProjector"])
    model = DistillationTrainer.build_model(cfg)
    objectives, balance = step(model, batch_of(cfg))
    assert all(p.grad is None for p in model.projectors.parameters())
    assert list(model.projectors.parameters()) and balance.gram[1, 1] > 0


def test_bad_level_weights(make_cfg):
    with pytest.raises(ValueError, match="LEVEL_WEIGHTS is 'area': expected one of"):
        DistillationTrainer.build_model(make_cfg("mokd", ["MOKD.FEATURES.LEVEL_WEIGHTS", "area"]))


def test_bad_foreground_options(make_cfg):
    for option, value, message in (
        ("FOREGROUND", "gt", "MOKD.FEATURES.FOREGROUND is 'gt': expected one of"),
        ("FOREGROUND_SHARE", 1.5, r"FOREGROUND_SHARE is 1.5: expected a number in \[0, 1\]"),
        ("FOREGROUND_SCORE", -1.0, "FOREGROUND_SCORE is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationTrainer.build_model(make_cfg("mokd", [f"MOKD.FEATURES.{option}", value]))


@pytest.mark.parametrize("student_format", ["BGR", "RGB"])
@pytest.mark.parametrize("channels", [24, 192])
def test_pairs_of_other_widths_and_channel_orders(make_cfg, student_format, channels):
    """The teacher has 128 channels, RGB and its own mean; levels p3-p6 against strides twice as
    coarse."""
    opts = ["INPUT.FORMAT", student_format, "MODEL.FPN.OUT_CHANNELS", channels]
    opts += ["MOKD.FEATURES.STUDENT", ["p3", "p4", "p5"], "MOKD.FEATURES.DIM", 0]
    opts += ["MOKD.FEATURES.TEACHER", ["p4", "p5", "p6"], "MOKD.OUTPUTS.ENABLED", True]
    cfg = make_cfg("mokd", opts)
    model = DistillationTrainer.build_model(cfg)
    objectives, balance = step(model, batch_of(cfg))
    assert balance.fallback == ""
    assert model.projectors["p3"].dim == max(channels, 128)
    assert all(loss.isfinite() for parts in objectives.values() for loss in parts.values())
