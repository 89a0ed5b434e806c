# Copyright (c) The mokd_det authors.
"""Which levels of two pyramids are matched."""

import pytest
from detectron2.layers import ShapeSpec

from mokd_det.tasks import build_level_map

SHAPES = {
    "p3": ShapeSpec(channels=8, stride=8),
    "p4": ShapeSpec(channels=8, stride=16),
}
OTHER = {"p4": ShapeSpec(channels=16, stride=16), "p5": ShapeSpec(channels=16, stride=32)}


def test_by_names():
    assert build_level_map(SHAPES, OTHER) == {"p4": "p4"}
    assert build_level_map(SHAPES, OTHER, ["p3", "p4"], ["p5", "p4"]) == {"p3": "p5", "p4": "p4"}
    assert build_level_map(SHAPES, SHAPES, ["p3"]) == {"p3": "p3"}


def test_by_strides_where_no_name_is_common():
    """But not where a side has two levels of a stride."""
    ours = {"res3": SHAPES["p3"], "res4": SHAPES["p4"], "x": ShapeSpec(channels=8, stride=32)}
    assert build_level_map(ours, OTHER) == {"res4": "p4", "x": "p5"}
    assert build_level_map({**ours, "y": ours["x"]}, OTHER) == {"res4": "p4"}


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        (["p3"], [], r"MOKD.FEATURES.TEACHER has \['p3'\].*p4 \(stride 16, 16 ch"),
        (["p6"], ["p4"], r"MOKD.FEATURES.STUDENT has \['p6'\].*p3 \(stride 8, 8 ch"),
        (["p3", "p4"], ["p4"], "must have the same length"),
        ([], ["p4"], "MOKD.FEATURES.STUDENT is empty"),
        (["p4", "p4"], ["p4", "p5"], "names a level twice"),
    ],
)
def test_lists_that_cannot_be(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        build_level_map(SHAPES, OTHER, student, teacher)


def test_nothing_in_common_needs_an_explicit_map():
    with pytest.raises(ValueError, match="share neither a feature name nor a stride"):
        build_level_map({"res3": SHAPES["p3"]}, OTHER)
