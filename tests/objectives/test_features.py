# Copyright (c) The mokd_det authors.
"""The objective that matches feature maps: levels, foreground, and pairs of different sides."""

import pytest
import torch

from mokd_det.engine import DistillationTrainer, validate

from ..conftest import OUTPUTS
from ..modeling.families import batch_of, step

LINEAR = ["MOKD.FEATURES.DIM", 0, "MOKD.FEATURES.PROJECTOR", "Linear"]
OBJECTS = ["MOKD.FEATURES.FOREGROUND", "ground_truth"]


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
        ("FOREGROUND_SHARE", 1.5, r"FOREGROUND_SHARE is 1.5: expected a finite number in \[0, 1\]"),
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


@pytest.mark.parametrize(
    "opts, message",
    [
        (["LOSS", "fgd"], "LOSS is 'fgd', which weighs positions by boxes, and FOREGROUND is ''"),
        (["LOSS", "cwd", *OBJECTS], "'ground_truth', but LOSS 'cwd' does not weigh positions"),
        (["MASKED", 1.0], r"MOKD.FEATURES.MASKED is 1.0: expected a finite number in \[0, 1\)"),
        (["MASKED", -0.1], r"MOKD.FEATURES.MASKED is -0.1: expected a finite number in \[0"),
        (["TEMPERATURE", 0.0], "MOKD.FEATURES.TEMPERATURE is 0.0: expected a finite number > 0"),
        (["FOREGROUND_UNIT", "cell", *OBJECTS], "FOREGROUND_UNIT is 'cell': expected one of"),
        (["MASKED", 0.5], "MASKED is 0.5, but it is read with PROJECTOR 'MaskedGenerator' only"),
        (["TEMPERATURE", 4.0], "TEMPERATURE is 4.0, but it is read with LOSS 'cwd' only"),
        (["PROJECTOR", "none"], "DIM is 256, but it is read with PROJECTOR 'SubspaceProjector'"),
        ([*("TEACHER_SIDE", "learned"), *LINEAR], "TEACHER_SIDE is 'learned', but it is read with"),
        (["FOREGROUND_UNIT", "box"], "FOREGROUND_UNIT is 'box', but it is read with FOREGROUND"),
        (["FOREGROUND_SHARE", 0.7], "FOREGROUND_SHARE is 0.7, but it is read with FOREGROUND"),
        (["FOREGROUND_SCORE", 0.7, *OBJECTS], "FOREGROUND_SCORE is 0.7, .* FOREGROUND 'teacher'"),
    ],
)
def test_options_that_do_not_go_together(make_cfg, opts, message):
    with pytest.raises(ValueError, match=message):
        validate(make_cfg("mokd", [f"MOKD.FEATURES.{opts[0]}", *opts[1:]]))


METHODS = {
    "pkd": ["LOSS", "pkd", *LINEAR],
    "cwd": ["LOSS", "cwd", *LINEAR, "MOKD.FEATURES.TEMPERATURE", 4.0],
    "mgd": [
        *("LOSS", "squared_sum", "MOKD.FEATURES.DIM", 0),
        *("MOKD.FEATURES.PROJECTOR", "MaskedGenerator", "MOKD.FEATURES.MASKED", 0.45),
    ],
    "fgd": ["LOSS", "fgd", *LINEAR, *OBJECTS, "MOKD.FEATURES.FOREGROUND_UNIT", "box"],
}


@pytest.mark.parametrize("method", METHODS)
def test_published_methods(make_cfg, method):
    """Their options are valid, reach the objective, and make a step."""
    opts = METHODS[method]
    cfg = make_cfg("mokd", [f"MOKD.FEATURES.{opts[0]}", *opts[1:]])
    validate(cfg)
    objective, value, decision = features_step(cfg)
    assert 0 < value < float("inf") and decision.gram.isfinite().all()
    assert decision.gram[1, 1] > 0
    if method == "cwd":
        assert objective.loss.keywords == {"temperature": 4.0}
    if method == "mgd":
        assert {p.masked for p in objective.projectors.values()} == {0.45}
    assert objective.unit == ("box" if method == "fgd" else "image")


def test_other_channels_need_a_projector(make_cfg):
    """64 in the student, 128 in the teacher."""
    opts = ["MOKD.FEATURES.DIM", 0, "MOKD.FEATURES.PROJECTOR", "none"]
    with pytest.raises(ValueError, match="a level has 64 channels in the student and 128 in the"):
        DistillationTrainer.build_model(make_cfg("mokd", opts))
    cfg = make_cfg("mokd", [*opts, "MODEL.FPN.OUT_CHANNELS", 128])
    objective = DistillationTrainer.build_model(cfg).objectives["features"]
    assert not list(objective.parameters())


def test_a_vector_has_no_positions_to_compare(build):
    opts = ["MOKD.OBJECTIVES", ["features"], "MOKD.FEATURES.DIM", 0, "MOKD.FEATURES.LOSS", "cwd"]
    with pytest.raises(ValueError, match="LOSS is 'cwd', which compares positions, and .'pre_log"):
        build([*opts, "MOKD.FEATURES.PROJECTOR", "Linear"])
