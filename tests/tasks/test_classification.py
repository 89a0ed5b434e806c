# Copyright (c) The mokd_det authors.
"""Pairs of classifiers: which features are matched, and what is shared."""

import pytest

from mokd_det.engine import validate


@pytest.mark.parametrize(
    "opts, message",
    [
        (["STUDENT", ["stage4"]], "MOKD.FEATURES.TEACHER has 'stage4', which ResNet"),
        (
            ["STUDENT", ["stage4"], "MOKD.FEATURES.TEACHER", ["layer4", "layer3"]],
            "must be lists of the same length",
        ),
        (
            ["STUDENT", ["stage4"] * 2, "MOKD.FEATURES.TEACHER", ["layer4", "layer3"]],
            "no tap of the student may come twice",
        ),
        (["STUDENT", ["stage9"]], "MOKD.FEATURES.STUDENT has 'stage9'"),
    ],
)
def test_features_that_cannot_be_matched(build, opts, message):
    with pytest.raises(ValueError, match=message):
        build([f"MOKD.FEATURES.{opts[0]}", *opts[1:]])


def test_options_of_detectors(make_digits_cfg):
    for option, value in (
        ("MOKD.FEATURES.LEVEL_WEIGHTS", "positions"),
        ("MODEL.BACKBONE.COMPILE", "eager"),
    ):
        with pytest.raises(ValueError, match=f"{option} is '{value}', but .* for detection only"):
            validate(make_digits_cfg([option, value]))


def test_all_but_the_head_is_shared(build):
    model = build()
    shared = model.task.shared_part(model.student)
    names = [name for name, _ in shared.named_parameters()]
    heads = ["fc.weight", "fc.bias"]
    assert [*names, *heads] == [name for name, _ in model.student.network.named_parameters()]
    assert not shared.state_dict()  # it is no module besides the student
