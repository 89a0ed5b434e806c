# Copyright (c) The mokd_det authors.
"""Losses between two feature maps, and maps of other resolutions on one grid."""

from math import log

import pytest
import torch

from mokd_det.objectives import FEATURE_LOSSES, align_resolution, onto_grid

LOSSES = ["smooth_l1", "mse", "cosine", "squared_sum", "pkd", "cwd", "fgd"]


def loss_of(name, student, teacher):
    """The loss; of one that must have weights, with ones."""
    weights = [torch.ones_like(student[:, :1])] if name == "fgd" else []
    return FEATURE_LOSSES.get(name)(student, teacher, *weights)


def test_losses_frozen_numbers():
    student = torch.tensor([[[[3.0]], [[0.0]]]])
    teacher = torch.tensor([[[[0.0]], [[0.5]]]])
    assert FEATURE_LOSSES.get("smooth_l1")(student, teacher).item() == (2.5 + 0.125) / 2
    assert FEATURE_LOSSES.get("mse")(student, teacher).item() == (9 + 0.25) / 2
    assert FEATURE_LOSSES.get("cosine")(student, teacher).item() == 1
    assert FEATURE_LOSSES.get("cosine")(student, 2 * student).item() == pytest.approx(0)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_vanish_for_equal_features(name):
    x, y = torch.randn(2, 5, 3, 3).requires_grad_(), torch.randn(2, 5, 3, 3)
    loss = loss_of(name, x, x.detach().clone())
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert x.grad.abs().max() < 1e-6
    loss = loss_of(name, x, y)
    loss.backward()
    assert loss > 0 and x.grad.isfinite().all() and x.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["squared_sum", "cwd", "fgd"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_that_sum_are_of_float32_in_half_precision(name, dtype):
    """Squares of 400 have no number in float16, and sums of thousands only a coarse one."""
    student, teacher = ((200 * torch.randn(2, 4, 5, 5)).to(dtype) for _ in range(2))
    student.requires_grad_()
    loss = loss_of(name, student, teacher)
    expected = loss_of(name, student.detach().float(), teacher.float())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert student.grad.isfinite().all()


def test_squared_sum_by_hand():
    """MGD, Eq. 5: (1 + 4 + 9 + 0) and (0 + 4 + 4 + 0), the mean of 14 and 8."""
    student = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[0.0, 3.0], [1.0, 1.0]]]])
    teacher = torch.tensor([[[[0.0, 0.0], [0.0, 4.0]]], [[[0.0, 1.0], [-1.0, 1.0]]]])
    loss = FEATURE_LOSSES.get("squared_sum")
    assert loss(student, teacher).item() == (14 + 8) / 2
    # The second channel is equal, so only positions count: 1 + 2 * 4 + 0 * 9 and 2 * 4 + 0 * 4.
    weights = torch.tensor([[[[1.0, 2.0], [0.0, 5.0]]]]).repeat(2, 1, 1, 1)
    pair = (torch.cat([x, torch.ones_like(x)], dim=1) for x in (student, teacher))
    assert loss(*pair, weights).item() == (9 + 8) / 2


def test_pkd_by_hand():
    """
    From their means: (-1.5, -0.5, 0.5, 1.5) and (-1.5, 0.5, -0.5, 1.5), r = 4 / 5; and r = -1. So
    0.2 and 2, with a mean of 1.1. The variance of 1.25 has an epsilon of 1e-5.
    """
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    student = torch.stack([x, x])[None]
    teacher = torch.stack([torch.tensor([[1.0, 3.0], [2.0, 4.0]]), 9 - 2 * x])[None]
    loss = FEATURE_LOSSES.get("pkd")
    assert loss(student, teacher).item() == pytest.approx(1.1, abs=1e-4)
    scale, shift = (
        torch.tensor([7.0, 0.5])[:, None, None],
        torch.tensor([-3.0, 40.0])[:, None, None],
    )
    assert loss(scale * student + shift, teacher).item() == pytest.approx(1.1, abs=1e-4)
    # The same positions as two images: channels are standardised over the batch.
    images = [x.view(2, 2, 1, 2).transpose(0, 1) for x in (student[0], teacher[0])]
    assert loss(*images).item() == pytest.approx(1.1, abs=1e-4)


def test_pkd_of_a_single_position_is_zero():
    student = torch.randn(1, 3, 1, 1).requires_grad_()
    loss = FEATURE_LOSSES.get("pkd")(student, torch.randn(1, 3, 1, 1))
    loss.backward()
    assert loss == 0 and torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cwd_by_hand(temperature):
    """
    The softmax over positions is 1/6, 1/6, 1/6, 1/2 of the student and 1/4 of the teacher: their
    divergence is 3/4 log(3/2) + 1/4 log(1/2). The second of two channels is equal.
    """
    student, teacher = torch.zeros(3, 2, 2, 2), torch.zeros(3, 2, 2, 2)
    student[:, 0, 1, 1] = temperature * log(3)
    expected = temperature**2 * (0.75 * log(1.5) + 0.25 * log(0.5)) / 2
    loss = FEATURE_LOSSES.get("cwd")
    assert loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert loss(student + 7, teacher - 5, temperature).item() == pytest.approx(expected, rel=1e-4)
    # The other way round: 1/2 log(2/3) + 1/2 log 2.
    expected = temperature**2 * (0.5 * log(2 / 3) + 0.5 * log(2)) / 2
    assert loss(teacher, student, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_fgd_by_hand():
    """
    With L = log(3) / 2 the teacher's means of absolute values are L/2 and 3/2 L, of positions and
    of channels. At the temperature of 0.5 each softmax is 1/4, 3/4, so attentions are 1/2, 3/2; a
    student of zeros has 1, 1. Elements (channel, position) of the teacher have squares
    0, L^2 / L^2, 4 L^2 and attentions 1/4, 3/4 / 3/4, 9/4; positions have weights 1 and 2:

    L^2 (3/4 * 2 + 3/4 * 1 + 9/4 * 4 * 2) = 20.25 L^2.

    Attentions differ by 4 * 1/2, with the weight gamma / (alpha + beta) = 2/3 of the paper.
    """
    length = log(3) / 2
    teacher = torch.tensor([[0.0, length], [length, -2 * length]]).view(1, 2, 2, 1)
    weights = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1)
    student = torch.zeros_like(teacher).requires_grad_()
    loss = FEATURE_LOSSES.get("fgd")
    expected = 20.25 * length**2 + 2 / 3 * 2
    value = loss(student, teacher, weights)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    # At |0| attention has no slope: 2 (0 - t) times attentions and weight is left.
    value.backward()
    slopes = torch.tensor([[0.0, 1.5], [0.75, -2 * 4.5]]).view(1, 2, 2, 1)
    assert torch.allclose(student.grad, -2 * length * slopes, rtol=1e-5)
    # A second image that is equal on both sides: half.
    pair = (torch.cat([x.detach(), teacher]) for x in (student, teacher))
    assert loss(*pair, torch.cat([weights, weights])).item() == pytest.approx(
        expected / 2, rel=1e-5
    )
    # Without weight only attentions are left; they are blind to signs.
    assert loss(student, teacher, 0 * weights).item() == pytest.approx(4 / 3, rel=1e-5)
    assert loss(-teacher, teacher, 0 * weights).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["smooth_l1", "mse", "cosine", "squared_sum", "pkd"])
def test_losses_with_weights(name):
    loss = FEATURE_LOSSES.get(name)
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 4, 6)
    ones = torch.ones(2, 1, 4, 6)
    assert torch.allclose(loss(student, teacher, ones), loss(student, teacher))
    if name == "pkd":  # each side is standardised before
        assert torch.allclose(loss(student, teacher, 3 * ones), 3 * loss(student, teacher))
        return
    half = torch.zeros_like(ones)
    half[..., :3] = 2.0  # all weight on the left half
    expected = loss(student[..., :3].contiguous(), teacher[..., :3].contiguous())
    expected = 2 * expected if name == "squared_sum" else expected  # no mean
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


def test_onto_grid_by_hand():
    """The student comes to the teacher's grid: means of 2 x 2 cells, or a ramp between two."""
    teacher = torch.zeros(1, 3, 2, 2)
    student, same = onto_grid(torch.arange(16.0).view(1, 1, 4, 4), teacher, 8, 16)
    assert same is teacher
    assert torch.equal(student, torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))
    student, _ = onto_grid(torch.tensor([[[[0.0, 1.0]]]]), torch.zeros(1, 3, 2, 4), 16, 8)
    assert torch.equal(student, torch.tensor([0.0, 0.25, 0.75, 1.0]).expand(1, 1, 2, 4))


def test_onto_grid_of_equal_strides_keeps_the_padding():
    student, teacher = torch.randn(1, 2, 8, 8), torch.randn(1, 3, 10, 7)
    s, t = onto_grid(student, teacher, 8, 8)
    assert s is student and t is teacher


@pytest.mark.parametrize("student_stride, teacher_stride", [(16, 8), (8, 16), (16, 4), (8, 32)])
def test_onto_grid_keeps_positions(student_stride, teacher_stride):
    """The student pads 32 pixels more, which are cut; the teacher's map is the same object."""
    student = image_ramp(160 // student_stride, 160 // student_stride, student_stride)
    teacher = image_ramp(128 // teacher_stride, 128 // teacher_stride, teacher_stride)
    student.requires_grad_()
    s, t = onto_grid(student, teacher, student_stride, teacher_stride)
    assert t is teacher and s.shape == teacher.shape
    # Interpolation to a finer grid is flat beyond the outermost centres.
    edge = student_stride // teacher_stride // 2
    inner = slice(edge, -edge) if edge else slice(None)
    assert torch.allclose(s[..., inner], t[..., inner])
    s.sum().backward()
    assert student.grad.isfinite().all() and student.grad.abs().max() > 0


def test_onto_grid_of_a_smaller_student_covers_what_it_has():
    """128 pixels of 160: the last cells of the teacher have no partner."""
    s, t = onto_grid(image_ramp(16, 16, 8), image_ramp(10, 10, 16), 8, 16)
    assert s.shape[-2:] == (8, 8) and torch.equal(s, t[..., :8, :8])


def test_onto_grid_without_a_common_cell_is_an_error():
    with pytest.raises(ValueError, match="share no cell of 64 pixels"):
        onto_grid(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 2, 2), 64, 16)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        ValueError, match="MOKD.FEATURES.LOSS is 'l3'.*'cosine', 'cwd', 'fgd', 'mse'"
    ):
        FEATURE_LOSSES.get("l3")
