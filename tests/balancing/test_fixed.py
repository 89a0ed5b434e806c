# Copyright (c) The mokd_det authors.
"""Rule ``fixed``, and the options that ``cosine_gate`` inherits from it."""

import pytest
import torch

from mokd_det.balancing import build_boundary, build_rule

from .helpers import decide, random_gradients, weights_of


def test_fixed_weights():
    gradients, losses = random_gradients(0)
    assert weights_of("fixed", gradients, losses, weights=[1.0, 0.3]).tolist() == [1.0, 0.3]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_without_weights_it_is_the_plain_sum(count):
    gradients, losses = random_gradients(0, count)
    for options in ({}, {"weights": []}):
        assert weights_of("fixed", gradients, losses, **options).tolist() == [1.0] * count
        build_rule("fixed", **options).check_objectives(count)


@pytest.mark.parametrize("name", ["fixed", "cosine_gate"])
@pytest.mark.parametrize(
    "weights", [[1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], [1.0, float("inf")]]
)
def test_bad_weights_name_their_option(name, weights):
    with pytest.raises(ValueError, match=f"MOKD.BALANCING.{name.upper()}.WEIGHTS is"):
        build_rule(name, weights=weights)


@pytest.mark.parametrize("name", ["fixed", "cosine_gate"])
def test_objectives_without_a_weight_are_an_error(name):
    message = f"{name.upper()}.WEIGHTS has 2 entries for 3 objectives"
    with pytest.raises(ValueError, match=message):
        decide(build_rule(name, weights=[1.0, 2.0]), torch.eye(3), torch.ones(3))
    with pytest.raises(ValueError, match=message):
        build_boundary(name, {"weights": [1.0, 2.0]}, objectives=3)
