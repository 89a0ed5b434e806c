# Copyright (c) The mokd_det authors.
"""Losses between two feature maps, and maps of other resolutions on one grid."""

import pytest
import torch

from mokd_det.objectives import FEATURE_LOSSES, align_resolution


def test_losses_frozen_numbers():
    student = torch.tensor([[[[3.0]], [[0.0]]]])
    teacher = torch.tensor([[[[0.0]], [[0.5]]]])
    assert FEATURE_LOSSES.get("smooth_l1")(student, teacher).item() == (2.5 + 0.125) / 2
    assert FEATURE_LOSSES.get("mse")(student, teacher).item() == (9 + 0.25) / 2
    assert FEATURE_LOSSES.get("cosine")(student, teacher).item() == 1
    assert FEATURE_LOSSES.get("cosine")(student, 2 * student).item() == pytest.approx(0)


@pytest.mark.parametrize("name", ["smooth_l1", "mse", "cosine"])
def test_losses_vanish_for_equal_features(name):
    x = torch.randn(2, 5, 3, 3)
    assert FEATURE_LOSSES.get(name)(x, x.clone()).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["smooth_l1", "mse", "cosine"])
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


def test_align_equal_strides_crops_the_padding():
    student, teacher = torch.randn(1, 2, 8, 8), torch.randn(1, 3, 10, 7)
    s, t = align_resolution(student, teacher, 8, 8)
    assert torch.equal(s, student[..., :8, :7]) and torch.equal(t, teacher[..., :8, :7])


def image_ramp(height, width, stride):
    """A map whose value is the horizontal centre of each cell in pixels."""
    centres = (torch.arange(width) + 0.5) * stride
    return centres.expand(1, 1, height, width)


@pytest.mark.parametrize("student_stride, teacher_stride", [(16, 8), (8, 16), (16, 4), (8, 32)])
def test_align_strides_keeps_positions(student_stride, teacher_stride):
    student = image_ramp(128 // student_stride, 128 // student_stride, student_stride)
    # The teacher pads 32 pixels more.
    teacher = image_ramp(160 // teacher_stride, 160 // teacher_stride, teacher_stride)
    s, t = align_resolution(student, teacher, student_stride, teacher_stride)
    assert s.shape == t.shape == student.shape
    # Interpolation to a finer grid is flat beyond the outermost centres.
    inner = slice(teacher_stride // student_stride // 2, -(teacher_stride // student_stride // 2))
    inner = inner if teacher_stride > student_stride else slice(None)
    assert torch.allclose(s[..., inner], t[..., inner])


def test_align_without_a_common_cell_is_an_error():
    with pytest.raises(ValueError, match="share no cell of 64 pixels"):
        align_resolution(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1), 16, 64)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="MOKD.FEATURES.LOSS is 'l3'.*'cosine', 'cwd', 'fgd', 'mse'"):
        FEATURE_LOSSES.get("l3")
