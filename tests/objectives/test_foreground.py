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


def test_weights_of_boxes_by_hand():
    """
    FGD, Eq. 4 to 6. A big box of 3 x 4 cells, a small one of 2 x 1 that shares a cell with it, and
    background of 24 - 13 cells: 1/12, 1/2 (also of the shared cell) and 1/11, times the shares.
    """
    big, small = [0.0, 0.0, 32.0, 24.0], [9.0, 17.0, 15.0, 31.0]
    expected = torch.full((4, 6), 0.25 / 11)
    expected[0:3, 0:4] = 0.75 / 12
    expected[2:4, 1] = 0.75 / 2
    for boxes in ([big, small], [small, big], [small, big, big]):
        weights = foreground_weights([torch.tensor(boxes)], (4, 6), 8, 0.75, unit="box")
        assert weights.shape == (1, 1, 4, 6) and torch.allclose(weights[0, 0], expected)


def test_each_box_has_the_share_and_all_background_the_rest():
    """Published: alpha is twice beta, so 2/3."""
    apart = torch.tensor([[0.0, 0.0, 8.0, 8.0], [16.0, 16.0, 48.0, 32.0]])
    images = [
        apart,
        torch.zeros(0, 4),  # nothing in it: all cells are background
        torch.tensor([[900.0, 900.0, 950.0, 950.0]]),  # in the padding only: the same
        torch.tensor([[-5.0, -5.0, 500.0, 500.0]]),  # all cells, and no background
        torch.tensor([[33.0, 33.0, 34.0, 34.0], [900.0, 900.0, 950.0, 950.0]]),
    ]
    weights = foreground_weights(images, (8, 8), 8, 2 / 3, unit="box")
    sums = [2 * 2 / 3 + 1 / 3, 1 / 3, 1 / 3, 2 / 3, 1.0]
    assert torch.allclose(weights.sum((1, 2, 3)), torch.tensor(sums))
    assert torch.allclose(weights[0, 0, 2:4, 2:6], torch.tensor(2 / 3 / 8))
    assert torch.allclose(weights[1:3], torch.tensor(1 / 3 / 64))
    assert torch.allclose(weights[3], torch.tensor(2 / 3 / 64))
    assert weights[4, 0, 4, 4] == pytest.approx(2 / 3)


@pytest.mark.parametrize("share, inside, outside", [(0.0, 0.0, 1 / 60), (1.0, 1 / 4, 0.0)])
def test_a_share_of_all_or_nothing(share, inside, outside):
    boxes = [torch.tensor([[0.0, 0.0, 16.0, 16.0]])]
    weights = foreground_weights(boxes, (8, 8), 8, share, unit="box")[0, 0]
    expected = torch.full((8, 8), outside)
    expected[:2, :2] = inside
    assert torch.allclose(weights, expected)


@pytest.mark.parametrize("unit", ["image", "box"])
def test_rotated_boxes_are_refused(unit):
    with pytest.raises(ValueError, match="FOREGROUND takes boxes of 4 numbers, not rotated"):
        foreground_weights([torch.zeros(1, 5)], (4, 6), 8, 0.5, unit)


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
