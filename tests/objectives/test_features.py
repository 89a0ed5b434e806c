# Copyright (c) The mokd_det authors.
"""The objective that matches feature maps: levels, foreground, and pairs of different sides."""

import pytest
import torch

from mokd_det.engine import DistillationTrainer, validate

from ..conftest import OUTPUTS
from ..modeling.families import batch_of, step


def features_step(cfg):
    """Return (the objective, its loss, decision) of a model's first step."""
    torch.manual_seed(0)
    model, batch = DistillationTrainer.build_model(cfg), batch_of(cfg)
    torch.manual_seed(0)
    losses, decision = step(model, batch)
    assert decision.fallback == "" and list(losses) == model.names
    return model.objectives["features"], losses["features"]["loss_features"].item(), decision


@pytest.mark.parametrize(
    "side, loss", [("learned", "smooth_l1"), ("frozen", "mse"), ("identity", "cosine")]
)
def test_explicit_level_map_across_strides(make_cfg, side, loss):
    """Channels 64 and 128, and strides 8 -> 16 and 32 -> 16."""
    opts = ["MOKD.FEATURES.STUDENT", ["p3", "p5"], "MOKD.FEATURES.TEACHER", ["p4", "p4"]]
    opts += ["MOKD.FEATURES.TEACHER_SIDE", side, "MOKD.FEATURES.LOSS", loss]
    objective, value, _ = features_step(make_cfg("mokd", [*opts, "MOKD.FEATURES.DIM", 0]))
    assert 0 < value < float("inf") and set(objective.projectors) == {"p3", "p5"}
    assert [(x.student, x.teacher, x.stride) for x in objective.levels] == [
        ("p3", "p4", 8),
        ("p5", "p4", 32),
    ]
    assert {(x.student_channels, x.teacher_channels) for x in objective.levels} == {(64, 128)}


def test_foreground_changes_the_loss(make_cfg):
    opts = ["MOKD.FEATURES.FOREGROUND_SCORE", 0.3, "MOKD.FEATURES.FOREGROUND_SHARE", 1.0]
    values = {
        features_step(make_cfg("mokd", [*opts, "MOKD.FEATURES.FOREGROUND", source]))[1]
        for source in ("", "ground_truth", "teacher")
    }
    assert len(values) == 3


def test_levels_by_positions_are_the_mean_over_all_positions(make_cfg, monkeypatch):
    """Two levels of 24 x 24 and 12 x 12 positions: four fifths and one fifth, times two."""
    build_model = DistillationTrainer.build_model

    def with_equal_projectors(cfg):
        model = build_model(cfg)
        for projector in model.objectives["features"].projectors.values():
            for parameter in projector.parameters():
                torch.nn.init.eye_(parameter)
            torch.nn.init.eye_(projector.teacher_weight)
        return model

    monkeypatch.setattr(DistillationTrainer, "build_model", with_equal_projectors)
    values = []
    for names, kind in ((["p3"], "equal"), (["p4"], "equal"), (["p3", "p4"], "positions")):
        opts = ["MOKD.FEATURES.STUDENT", names, "MOKD.FEATURES.LEVEL_WEIGHTS", kind]
        values.append(features_step(make_cfg("mokd", opts))[1])
    fine, coarse, both = values
    assert both == pytest.approx(2 * (0.8 * fine + 0.2 * coarse), rel=1e-5)


def test_a_frozen_projector_stays_and_the_student_learns(make_cfg):
    cfg = make_cfg("mokd", ["MOKD.FEATURES.PROJECTOR", "FrozenProjector"])
    objective, _, decision = features_step(cfg)
    parameters = list(objective.projectors.parameters())
    assert parameters and all(p.grad is None for p in parameters)
    assert not objective.used_parameters().own and decision.gram[1, 1] > 0


@pytest.mark.parametrize(
    "student_format, channels",
    [
        pytest.param("BGR", 24, marks=pytest.mark.slow),
        ("RGB", 24),
        ("BGR", 192),
        pytest.param("RGB", 192, marks=pytest.mark.slow),
    ],
)
def test_pairs_of_other_widths_and_channel_orders(make_cfg, student_format, channels):
    """The teacher has 128 channels, RGB and its own mean; levels p3-p5 against strides twice as
    coarse."""
    opts = ["INPUT.FORMAT", student_format, "MODEL.FPN.OUT_CHANNELS", channels]
    opts += ["MOKD.FEATURES.STUDENT", ["p3", "p4", "p5"], "MOKD.FEATURES.DIM", 0]
    opts += ["MOKD.FEATURES.TEACHER", ["p4", "p5", "p6"], *OUTPUTS]
    cfg = make_cfg("mokd", opts)
    model = DistillationTrainer.build_model(cfg)
    losses, decision = step(model, batch_of(cfg))
    assert decision.fallback == ""
    assert model.objectives["features"].projectors["p3"].dim == max(channels, 128)
    assert all(loss.isfinite() for parts in losses.values() for loss in parts.values())


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("LEVEL_WEIGHTS", "area", "LEVEL_WEIGHTS is 'area': expected one of"),
        ("FOREGROUND", "gt", "MOKD.FEATURES.FOREGROUND is 'gt': expected one of"),
        ("FOREGROUND_SHARE", 1.5, r"FOREGROUND_SHARE is 1.5: expected a number in \[0, 1\]"),
        ("FOREGROUND_SCORE", -1.0, "FOREGROUND_SCORE is -1.0"),
        ("LOSS", "l7", "MOKD.FEATURES.LOSS is 'l7'"),
        ("PROJECTOR", "P", "MOKD.FEATURES.PROJECTOR is 'P'"),
        ("TEACHER_SIDE", "froze", "MOKD.FEATURES.TEACHER_SIDE is 'froze'"),
        ("DIM", -1, "MOKD.FEATURES.DIM is -1"),
    ],
)
def test_bad_options_are_explained(make_cfg, option, value, message):
    with pytest.raises(ValueError, match=message):
        validate(make_cfg("mokd", [f"MOKD.FEATURES.{option}", value]))
