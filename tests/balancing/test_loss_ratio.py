# Copyright (c) The mokd_det authors.
"""Rule ``loss_ratio``: sums of logarithms, frozen numbers, and the projectors' own factors."""

import pytest
import torch

from mokd_det.balancing import Balancer, FeatureBoundary, Parameters, build_rule, cosine

from .helpers import (
    UNSMOOTHED,
    EqualLengths,
    agreeing_gradients,
    decide,
    random_gradients,
    weigh,
    weights_of,
)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_loss_ratio_adds_logarithms_of_losses_that_agree_with_the_task(count):
    for seed in range(200):
        gradients, losses = random_gradients(seed, count)
        weights = weights_of("loss_ratio", gradients, losses, ratio=2.0, cap=1e9)
        norms = gradients.norm(dim=1)
        cosines = gradients[1:] @ gradients[0] / norms[1:] / norms[0]
        trust = ((cosines - 0.05) / 0.05).clamp(0, 1)
        logs = gradients / losses[:, None]
        update = losses[0] * (logs[0] + 2 * trust @ logs[1:])
        assert torch.allclose(weights @ gradients, update)
        assert update @ gradients[0] >= gradients[0] @ gradients[0] * (1 - 1e-9)


def test_loss_ratio_frozen_numbers():
    # Cosines 0.6 and 0.075, so trust 1 and 0.5; losses 2 and 10 beside the task's 1.
    gradients = torch.eye(3)[[2, 0, 1]].double()
    gradients[0] = torch.tensor([0.6, 0.075, (1 - 0.6**2 - 0.075**2) ** 0.5])
    losses = torch.tensor([1.0, 2.0, 10.0]).double()
    weights = weights_of("loss_ratio", gradients, losses)
    assert weights.tolist() == pytest.approx([1.0, 4 / 2, 0.5 * 4 / 10], rel=1e-5)
    # A cosine of 0.05 is not trusted at all.
    gradients = torch.tensor([[0.05, (1 - 0.05**2) ** 0.5], [4.0, 0.0]]).double()
    weights = weights_of("loss_ratio", gradients, torch.ones(2))
    assert weights.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    # Conflict: the task alone, and one that agrees is not held back by another that conflicts.
    gradients = torch.tensor([[2.0, 0.0], [-1.0, 1.0]]).double()
    assert weights_of("loss_ratio", gradients, torch.ones(2)).tolist() == [1.0, 0.0]
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [1.0, 1.0]]).double()
    assert weights_of("loss_ratio", gradients, torch.ones(3)).tolist() == [1.0, 0.0, 4.0]
    # A loss of next to nothing would have a weight of a million: ten times the task's gradient.
    gradients = torch.tensor([[3.0, 4.0], [0.002, 0.0]]).double()
    weights = weights_of("loss_ratio", gradients, torch.tensor([4.0, 1.6e-5]).double())
    assert weights.tolist() == pytest.approx([1.0, 10 * 5 / 0.002])


def test_agreement_zero_trusts_every_objective():
    gradients = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, 1.0]]).double()
    losses = torch.tensor([1.0, 2.0, 4.0]).double()
    weights = weights_of("loss_ratio", gradients, losses, agreement=0.0)
    assert weights.tolist() == [1.0, 2.0, 1.0]


def test_objectives_are_trusted_together():
    """As the one that agrees most, also where that is not at all."""
    gradients = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.15, 2.0]]).double()
    losses = torch.tensor([1.0, 2.0, 4.0]).double()
    half = 2 * 0.15 / (0.15**2 + 4) ** 0.5 / 0.1 - 1
    assert 0 < half < 1
    weights = weights_of("loss_ratio", gradients, losses)
    assert weights.tolist() == pytest.approx([1.0, 0.0, half])
    weights = weights_of("loss_ratio", gradients, losses, together=[1, 2])
    assert weights.tolist() == pytest.approx([1.0, 2 * half, half])
    gradients[2, 0] *= -1
    weights = weights_of("loss_ratio", gradients, losses, together=[1, 2])
    assert weights.tolist() == [1.0, 0.0, 0.0]


def test_others_have_to_agree_by_themselves():
    """Objectives 1 and 3 together, 2 alone; and as many of them as do not vanish."""
    gradients = torch.tensor([[2.0, 0.0], [1.0, 0.0], [-1.0, 1.0], [0.0, 1.0]]).double()
    losses = torch.ones(4).double()
    options = {"together": [3, 1], "cap": 1e9}
    weights = weights_of("loss_ratio", gradients, losses, **options)
    assert weights.tolist() == [1.0, 4.0, 0.0, 4.0]
    gradients[1] = 0  # so that nothing vouches for the third
    assert weights_of("loss_ratio", gradients, losses, **options).tolist() == [1.0, 0.0, 0.0, 0.0]
    weights = weights_of("loss_ratio", gradients, losses, trusted=[3], cap=1e9)
    assert weights.tolist() == [1.0, 0.0, 0.0, 4.0]


def test_projectors_learn_at_the_tasks_pace():
    rule = build_rule("loss_ratio")
    # In conflict or not: |g_task| / |g_k|.
    gradients = torch.tensor([[3.0, 4.0], [-1.0, 0.0], [0.0, 20.0]]).double()
    found = decide(rule, gradients @ gradients.T, torch.ones(3))
    assert found.weights[1] == 0
    assert found.projector_weights.tolist() == [1.0, 5.0, 0.25]
    assert [found.factors(i, True) for i in range(3)] == [1.0, 5.0, 0.25]
    assert [found.factors(i, False) for i in range(3)] == found.weights.tolist()
    # One that vanished has none; with a gradient that is not finite, the plain sum.
    gradients[1] = 0
    found = decide(rule, gradients @ gradients.T, torch.ones(3))
    assert found.projector_weights.tolist() == [1.0, 0.0, 0.25]
    gradients[1] = float("nan")
    found = decide(rule, gradients @ gradients.T, torch.ones(3))
    assert [found.factors(i, True) for i in range(3)] == [1.0, 1.0, 1.0]
    # Other rules: the weights.
    gradients, losses = random_gradients(0, 3)
    found = decide(EqualLengths(), gradients @ gradients.T, losses)
    assert found.projector_weights is None
    assert [found.factors(i, True) for i in range(3)] == found.weights.tolist()


def test_projector_weights_are_neither_scheduled_nor_rescaled():
    rule = build_rule("loss_ratio")
    gradients, losses = agreeing_gradients(0)
    plain = weigh(Balancer(rule, steps=5), gradients, losses)
    off = weigh(Balancer(rule, "convex", schedule=(0.0, 1.0), steps=5), gradients, losses)
    assert off.weights[1:].tolist() == [0.0, 0.0]
    assert torch.equal(off.projector_weights, plain.projector_weights)


def test_the_ratio_rises_from_a_fifth_to_nine_fifths():
    balancer = Balancer(build_rule("loss_ratio"), smoothing=0.0, steps=5)
    gradients = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    ratios = []
    for _ in range(5):
        ratios.append(weigh(balancer, gradients, torch.ones(2)).weights[1].item())
        balancer.end_step()
    assert ratios == pytest.approx([0.8, 2.4, 4.0, 5.6, 7.2])
    with pytest.raises(ValueError, match=r"schedule \[0.2, 1.8\] needs the number of all steps"):
        Balancer(build_rule("loss_ratio"))


@pytest.mark.parametrize(
    "option, value",
    [
        *[("ratio", value) for value in (0.0, float("nan"), float("inf"))],
        ("cap", -1.0),
        *[("agreement", value) for value in (-0.1, 1.5)],
    ],
)
def test_bad_options_name_themselves(option, value):
    with pytest.raises(ValueError, match=f"MOKD.BALANCING.LOSS_RATIO.{option.upper()} is {value}"):
        build_rule("loss_ratio", **{option: value})


def test_trust_is_asked_on_the_support_of_the_tasks_gradient():
    """A dense gradient that agrees where the task looks is trusted, one that does not is not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(1, 4, 16, 16, requires_grad=True)
    task = torch.zeros(1, 4, 16, 16)
    task[..., 5, 5] = torch.tensor([1.0, -1.0, 1.0, 1.0])
    noise = torch.randn(1, 4, 16, 16, generator=generator)
    for sign, trusted in ((1.0, True), (-1.0, False)):
        rule = build_rule("loss_ratio", cap=1e9)
        boundary = FeatureBoundary(Balancer(rule, **UNSMOOTHED))
        branches = boundary.split({"p": x * 1}, {"task": Parameters(), "dense": Parameters()})
        given = torch.where(task == 0, noise, sign * task)
        losses = {
            name: (branches[name].features["p"] * g).sum() + 1
            for name, g in (("task", task), ("dense", given))
        }
        decision = boundary.backward(losses)
        assert abs(cosine(decision.gram, 1, 0)) < 0.1
        assert decision.weights.tolist() == [1.0, 4.0 if trusted else 0.0]
