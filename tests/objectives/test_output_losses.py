# Copyright (c) The mokd_det authors.
"""Losses between two detectors' outputs at the same boxes and anchors."""

from math import log

import pytest
import torch
import torch.nn.functional as F

from mokd_det.config import get_cfg
from mokd_det.objectives.output_losses import (
    box_loss,
    check_beta,
    class_loss,
    correlation_loss,
    decoupled_kl,
    kl_divergence,
    pearson,
    rpn_losses,
)
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


PAIRS = [(True, "kl"), (True, "dkd"), (True, "dist"), (False, "kl"), (False, "dist")]


def logits_of(*rows, temperature=1.0):
    """Logits whose softmax at a temperature is these rows; each has a constant of its own."""
    shifts = torch.arange(len(rows))[:, None]
    return temperature * torch.tensor(rows).log() + shifts


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_divergence_by_hand(temperature):
    """1/2 log(1/2 / 1/4) + 1/2 log(1/2 / 3/4) = log(4/3) / 2; the second row is equal."""
    student = logits_of([0.25, 0.75], [0.1, 0.9], temperature=temperature)
    teacher = logits_of([0.5, 0.5], [0.1, 0.9], temperature=temperature)
    expected = temperature**2 * log(4 / 3) / 2 / 2
    assert kl_divergence(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-4)


# Of the target and the rest: 0.6, 0.4 and 0.5, 0.5. Of the others: 0.75, 0.25 and 0.5, 0.5.
TARGET = 0.6 * log(0.6 / 0.5) + 0.4 * log(0.4 / 0.5)
OTHERS = 0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5)


@pytest.mark.parametrize("temperature, beta", [(1.0, 1.0), (1.0, 8.0), (4.0, 0.25), (1.0, 0.0)])
def test_decoupled_kl_by_hand(temperature, beta):
    """DKD, Eq. 7. The second row is equal, the third the first with another class as target."""
    student = logits_of([0.5, 0.25, 0.25], [0.2, 0.3, 0.5], [0.25, 0.25, 0.5])
    teacher = logits_of([0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.3, 0.1, 0.6])
    targets = torch.tensor([0, 1, 2])
    student, teacher = temperature * student, temperature * teacher
    loss = decoupled_kl(student, teacher, targets, temperature, beta)
    expected = temperature**2 * 2 * (TARGET + beta * OTHERS) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_decoupled_kl_puts_together_what_kl_does():
    """DKD, Eq. 6: with the teacher's probability of other classes as beta it is the divergence."""
    for row in range(6):
        student, teacher = (random_logits(6, 4, seed)[row : row + 1] for seed in (0, 1))
        beta = 1 - F.softmax(teacher / 2, 1)[0, 2].item()
        loss = decoupled_kl(student, teacher, torch.tensor([2]), 2.0, beta)
        assert loss.item() == pytest.approx(kl_divergence(student, teacher, 2.0).item(), rel=1e-4)


def test_decoupled_kl_where_the_teacher_is_sure():
    """The others have 10^-17 of the probability and less; what is among them counts in full."""
    teacher = torch.tensor([[40.0, log(3.0), 0.0], [200.0, log(3.0), 0.0]])
    student = torch.tensor([[40.0, 0.0, 0.0], [200.0, 0.0, 0.0]]).requires_grad_()
    loss = decoupled_kl(student, teacher, torch.tensor([0, 0]))
    assert loss.item() == pytest.approx(OTHERS, rel=1e-4)
    loss.backward()
    # Of the others' softmax: 1/2 - 3/4 and 1/2 - 1/4, over two rows.
    expected = torch.tensor([0.0, -0.125, 0.125]).expand(2, 3)
    assert torch.allclose(student.grad, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decoupled_kl_of_opposites_is_finite(dtype):
    student = torch.tensor([[100.0, -100.0, 0.0]], dtype=dtype).requires_grad_()
    teacher = torch.tensor([[-100.0, 100.0, 0.0]], dtype=dtype)
    # Of the target log 1 - (-200). Of the others: all is on the last, and log 1 - (-100).
    loss = decoupled_kl(student, teacher, torch.tensor([1]), beta=0.5)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(200 + 0.5 * 100)
    loss.backward()
    assert student.grad.isfinite().all()


def test_pearson_by_hand():
    """From their means (-1, 0, 1) and (-1, 1, 0): 1 / sqrt(2 * 2). Factors are alike."""
    x, y = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 3.0, 2.0]])
    for first, second in ((x, y), (5 * x, 0.01 * y)):
        assert pearson(first, second, 1).item() == pytest.approx(0.5, abs=1e-4)
        assert pearson(first.T, -second.T, 0).item() == pytest.approx(-0.5, abs=1e-4)
    assert pearson(x, torch.full_like(y, 0.5), 1) == 0


def test_the_gradient_near_a_constant_is_bounded():
    """A head of zeros says the same of everything: a correlation is undefined there."""
    logits = torch.zeros(5, 3, requires_grad=True)
    loss = correlation_loss(logits.softmax(1), torch.randn(5, 3).softmax(1))
    loss.backward()
    assert loss.item() == pytest.approx(2.0) and 0.01 < logits.grad.norm() < 10


@pytest.mark.parametrize("temperature", [1.0, 100.0, 1e4])
def test_divergences_are_not_negative_by_rounding(temperature):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randn(8, 10, generator=generator)
        student = teacher + 1e-3 * torch.randn(8, 10, generator=generator)
        targets = torch.arange(8)
        assert kl_divergence(student, teacher, temperature) >= 0
        assert decoupled_kl(student, teacher, targets, temperature) >= 0


# Times 30 and from their means: rows (-4, -1, 5) and (5, -4, -1), r = -21 / 42; the second is
# equal, r = 1: (1.5 + 0) / 2. Columns: (0.2, 0.5) and (0.5, 0.5), which does not vary, so r = 0;
# (0.3, 0.3) does not either; (0.5, 0.2) and (0.3, 0.2), r = 1: (1 + 1 + 0) / 3.
FIRST, SECOND = ([0.2, 0.3, 0.5], [0.5, 0.3, 0.2]), ([0.5, 0.2, 0.3], [0.5, 0.3, 0.2])
CORRELATION = 0.75 + 2 / 3


def test_correlation_loss_by_hand():
    """DIST, Eq. 8 and 9."""
    student, teacher = torch.tensor(FIRST), torch.tensor(SECOND)
    assert correlation_loss(student, teacher).item() == pytest.approx(CORRELATION, abs=1e-5)
    # Three rows, of which the teacher's are the student's in another order: r = -1/2 everywhere.
    student = torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.2, 0.3], [0.3, 0.5, 0.2]])
    assert correlation_loss(student, student.roll(1, 0)).item() == pytest.approx(3.0, abs=1e-5)
    assert correlation_loss(student, student).item() == pytest.approx(0.0, abs=1e-5)


def test_correlation_loss_of_one_row():
    """One row has no correlation over rows: a constant, without gradient."""
    logits = random_logits(1, 4, 0).requires_grad_()
    loss = correlation_loss(logits.softmax(1), logits.detach().softmax(1))
    assert loss.item() == pytest.approx(1.0, abs=1e-5)
    loss.backward()
    assert logits.grad.abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_class_loss_dist_of_softmaxes_and_sigmoids(temperature):
    """Two softmaxes have a background; of one it is left out where the other has none."""
    student, teacher = (logits_of(*x, temperature=temperature) for x in (FIRST, SECOND))
    pair = outputs(student, True), outputs(teacher, True)
    expected = pytest.approx(temperature**2 * CORRELATION, rel=1e-3)
    assert class_loss(*pair, temperature, "dist").item() == expected
    sigmoids = outputs(temperature * torch.logit(torch.tensor(FIRST)), False)
    # Half of the probability is background's, which changes no correlation.
    halves = [[x / 2 for x in row] + [0.5] for row in SECOND]
    softmax = outputs(logits_of(*halves, temperature=temperature), True)
    assert class_loss(sigmoids, softmax, temperature, "dist").item() == expected
    assert class_loss(softmax, sigmoids, temperature, "dist").item() == expected


def test_class_loss_dkd_has_the_teachers_class_as_target():
    """
    Also where that is the background, the last; the student's would be the second. Of target and
    rest 0.6, 0.4 and 0.25, 0.75; of the others 3/4, 1/4 and 2/3, 1/3.
    """
    student = logits_of([0.25, 0.5, 0.25], [0.5, 0.25, 0.25], temperature=2.0)
    teacher = logits_of([0.6, 0.3, 0.1], [0.3, 0.1, 0.6], temperature=2.0)
    loss = class_loss(outputs(student, True), outputs(teacher, True), 2.0, "dkd", 0.25)
    target = 0.6 * log(0.6 / 0.25) + 0.4 * log(0.4 / 0.75)
    others = 0.75 * log(3 / 4 * 3 / 2) + 0.25 * log(1 / 4 * 3)
    assert loss.item() == pytest.approx(4 * (target + 0.25 * others), rel=1e-4)


@pytest.mark.parametrize("exclusive, loss", PAIRS)
def test_class_losses_of_equal_and_of_half_predictions(exclusive, loss):
    values = random_logits(6, 4, 0).half().requires_grad_()
    boxes = torch.zeros(6, 1, 4)

    def against(teacher):
        pair = BoxOutputs(values, exclusive, boxes), BoxOutputs(teacher, exclusive, boxes)
        return class_loss(*pair, 2.0, loss)

    assert against(values.detach()).item() == pytest.approx(0, abs=1e-5)
    teacher = random_logits(6, 4, 1).half()
    result = against(teacher)
    pair = outputs(values.detach().float(), exclusive), outputs(teacher.float(), exclusive)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(class_loss(*pair, 2.0, loss).item(), rel=1e-6)
    result.backward()
    assert values.grad.isfinite().all() and values.grad.abs().max() > 0


@pytest.mark.parametrize("loss", ["kl", "dist"])
def test_a_beta_that_is_not_read(loss):
    node = get_cfg().MOKD.OUTPUTS
    check_beta("MOKD.X", node)
    node.LOSS, node.DKD_BETA = loss, 8.0
    with pytest.raises(ValueError, match=f"is read with LOSS 'dkd' only, and LOSS is '{loss}'"):
        check_beta("MOKD.X", node)


def test_boxes_count_where_the_teacher_sees_an_object():
    background = outputs([[-20.0, -20.0, 20.0]], True)
    far = outputs([[0.0, 0.0, 0.0]], True, torch.tensor([[[50.0, 50.0, 60.0, 60.0]]]))
    assert box_loss(far, background) < 1e-6


@pytest.mark.parametrize("exclusive, loss", PAIRS)
def test_no_boxes_give_zero(exclusive, loss):
    """With a path for gradients: other processes may have boxes, and wait for this one."""
    empty = outputs(torch.zeros(0, 4), exclusive)
    assert box_loss(empty, empty) == 0
    logits = torch.zeros(0, 4).requires_grad_()
    value = class_loss(outputs(logits, exclusive), empty, loss=loss)
    assert value == 0
    value.backward()
    assert logits.grad.shape == (0, 4)


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
