# Copyright (c) The mokd_det authors.
"""Weights of the positions that objects cover."""

import pytest
import torch

from mokd_det.objectives.foreground import foreground_weights


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
