# Copyright (c) The mokd_det authors.
"""Losses between two detectors' outputs at the same boxes and anchors."""

import pytest
import torch
import torch.nn.functional as F

from mokd_det.objectives.output_losses import box_loss, class_loss, rpn_losses
from mokd_det.readers import AnchorOutputs, BoxOutputs


def outputs(logits, exclusive, boxes=None):
    logits = torch.as_tensor(logits, dtype=torch.float32)
    if boxes is None:
        boxes = torch.tensor([0.0, 0.0, 10.0, 10.0]).expand(len(logits), 1, 4)
    return BoxOutputs(logits, exclusive, boxes)


def random_logits(rows, columns, seed, scale=3.0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_class_loss_of_two_softmaxes_is_hintons(temperature):
    student, teacher = random_logits(6, 4, 0), random_logits(6, 4, 1)
    p = F.softmax(teacher / temperature, 1)
    expected = (p * (p.log() - F.log_softmax(student / temperature, 1))).sum(1).mean()
    loss = class_loss(outputs(student, True), outputs(teacher, True), temperature)
    assert torch.allclose(loss, expected * temperature**2, atol=1e-6)


def test_class_loss_of_two_families_compares_each_class():
    """A softmax of 3 classes and background against 3 sigmoids, both ways."""
    softmax, sigmoid = random_logits(6, 4, 0), random_logits(6, 3, 1)
    p, q = F.softmax(softmax, 1)[:, :3], torch.sigmoid(sigmoid)

    def divergence(p, q):
        both = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        return both.sum(1).mean()

    a, b = outputs(softmax, True), outputs(sigmoid, False)
    assert torch.allclose(class_loss(a, b), divergence(q, p), atol=1e-5)
    assert torch.allclose(class_loss(b, a), divergence(p, q), atol=1e-5)


def test_frozen_values_of_classes_and_boxes():
    teacher = outputs([[2.0, 0.0, -1.0], [0.0, 0.0, 3.0]], True)
    student = outputs([[0.0, 1.0], [-2.0, 0.5]], False)
    assert class_loss(student, teacher).item() == pytest.approx(0.9519, abs=1e-4)
    box = torch.tensor([[[0.0, 0.0, 5.0, 10.0]]]).expand(2, 1, 4)
    student = outputs([[0.0, 1.0], [-2.0, 0.5]], False, box)
    # GIoU of a half of the box is 1/2; the weights are 0.8438 and 0.0453.
    assert box_loss(student, teacher).item() == pytest.approx((0.8438 + 0.0453) / 4, abs=1e-4)


@pytest.mark.parametrize("exclusive", [True, False])
def test_equal_predictions_at_boxes_have_no_loss_and_no_gradient(exclusive):
    logits = random_logits(6, 4, 0).requires_grad_()
    # Of tens of pixels: torchvision adds 1e-7 to areas, which counts for boxes below a pixel.
    sides = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(0))
    boxes = (10 + 90 * sides).cumsum(2).requires_grad_()
    student = BoxOutputs(logits, exclusive, boxes[:, :1])
    teacher = BoxOutputs(logits.detach(), exclusive, boxes[:, :1].detach())
    loss = class_loss(student, teacher) + box_loss(student, teacher)
    assert abs(loss.item()) < 1e-6
    loss.backward()
    assert logits.grad.abs().max() < 1e-6 and boxes.grad.abs().max() < 1e-6


def test_boxes_count_where_the_teacher_sees_an_object():
    background = outputs([[-20.0, -20.0, 20.0]], True)
    far = outputs([[0.0, 0.0, 0.0]], True, torch.tensor([[[50.0, 50.0, 60.0, 60.0]]]))
    assert box_loss(far, background) < 1e-6


def test_no_boxes_give_zero():
    empty = outputs(torch.zeros(0, 4), True)
    assert class_loss(empty, empty) == 0 and box_loss(empty, empty) == 0


def at_anchors(logits, deltas):
    """One level of two anchors at one position of one image."""
    logits = torch.tensor(logits).view(1, 2, 1, 1)
    return AnchorOutputs([logits], [torch.tensor(deltas).view(1, 2, 4, 1, 1)])


def random_outputs(seed, *sizes):
    generator = torch.Generator().manual_seed(seed)
    return AnchorOutputs(
        [torch.randn(2, 3, *size, generator=generator) for size in sizes],
        [torch.randn(2, 3, 4, *size, generator=generator) for size in sizes],
    )


def test_frozen_values_of_rpns():
    student = at_anchors([0.0, 2.0], [[0.5, 0.0, 0.0, -0.5], [1.0, 1.0, 1.0, 1.0]])
    teacher = at_anchors([3.0, -3.0], [[0.0, 0.0, 0.0, 0.0]] * 2)
    # p = 0.9526 and 0.0474, the student's 0.5 and 0.8808: weights 0.9526 and 0.8808. Divergences
    # 0.5023 and 1.8412; distances 2 (0.5 - 1/18) and 4 (1 - 1/18).
    objectness, boxes = rpn_losses(student, teacher)
    expected = (0.9526 * 0.5023 + 0.8808 * 1.8412) / (0.9526 + 0.8808)
    assert objectness.item() == pytest.approx(expected, abs=2e-4)
    assert boxes.item() == pytest.approx(
        (0.9526 * 0.8889 + 0.0474 * 3.7778) / (0.9526 + 0.8808), abs=2e-4
    )


def test_background_of_both_sides_does_not_count():
    """Thousands of anchors on which nobody sees an object change nothing."""
    few = random_outputs(0, (2, 2)), random_outputs(1, (2, 2))
    empty = AnchorOutputs([torch.full((2, 3, 40, 40), -30.0)], [torch.ones(2, 3, 4, 40, 40)])
    many = [AnchorOutputs(x.logits + empty.logits, x.deltas + empty.deltas) for x in few]
    for one, other in zip(rpn_losses(*few), rpn_losses(*many)):
        assert torch.allclose(one, other, rtol=1e-5)


def test_equal_rpns_have_no_loss_and_no_gradient():
    teacher, student = random_outputs(0, (3, 4), (2, 2)), random_outputs(0, (3, 4), (2, 2))
    values = [x.requires_grad_() for x in (*student.logits, *student.deltas)]
    objectness, boxes = rpn_losses(student, teacher)
    assert abs(objectness) < 1e-6 and boxes == 0
    (objectness + boxes).backward()
    assert max(x.grad.abs().max() for x in values) < 1e-7


def test_an_image_without_objects_counts_little():
    nothing = at_anchors([-200.0, -200.0], [[0.0] * 4] * 2)
    assert rpn_losses(nothing, nothing) == (0, 0)
    unsure = at_anchors([-5.0, -5.0], [[1.0] * 4] * 2), at_anchors([-5.0, -5.0], [[0.0] * 4] * 2)
    objectness, boxes = rpn_losses(*unsure)
    assert objectness == 0 and boxes.item() == pytest.approx(2 * 3.7778 * 0.0067, abs=1e-3)


def test_images_count_alike():
    """So two processes with an image each have the loss of one with both."""
    student, teacher = random_outputs(0, (3, 4), (2, 2)), random_outputs(1, (3, 4), (2, 2))
    split = [
        [AnchorOutputs([v[i : i + 1] for v in x.logits], [v[i : i + 1] for v in x.deltas])]
        for x in (student, teacher)
        for i in range(2)
    ]
    first, second = rpn_losses(*split[0], *split[2]), rpn_losses(*split[1], *split[3])
    for one, other, both in zip(first, second, rpn_losses(student, teacher)):
        assert torch.allclose((one + other) / 2, both)


def test_the_gradient_leads_to_the_teacher():
    teacher = random_outputs(0, (3, 4))
    student = random_outputs(1, (3, 4))
    values = [*student.logits, *student.deltas]
    optimizer = torch.optim.SGD([v.requires_grad_() for v in values], lr=5.0)
    first = sum(rpn_losses(student, teacher))
    for _ in range(100):
        optimizer.zero_grad()
        sum(rpn_losses(student, teacher)).backward()
        optimizer.step()
    assert sum(rpn_losses(student, teacher)) < 0.5 * first
