# Copyright (c) The mokd_det authors.
"""Rule ``famo``: its formulas by hand, and its state."""

import pytest
import torch

from mokd_det.balancing import build_rule


def test_famo_frozen_numbers():
    """By hand: xi = 0; delta = log before - log after; xi falls along p * (delta - p @ delta)."""
    rule = build_rule("famo")
    losses = torch.tensor([2.0, 1.0], dtype=torch.float64)
    first = rule.weights(torch.eye(2), losses)
    assert torch.allclose(first, torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    # The first fell by 10 %, the second by 5 %: the second gets more. Adam's first step is lr.
    rule.update(losses, torch.tensor([1.8, 0.95], dtype=torch.float64))
    assert torch.allclose(rule.xi.detach(), torch.tensor([-0.025, 0.025], dtype=torch.float64))
    # p = softmax(-0.025, 0.025) = (0.4875026, 0.5124974); weights p / L, divided by their sum.
    raw = torch.tensor([0.4875026 / 2, 0.5124974], dtype=torch.float64)
    assert torch.allclose(rule.weights(torch.eye(2), losses), raw / raw.sum(), atol=1e-7)
    # Second step, by Adam's formulas with weight decay 0.01.
    shares = raw * losses
    delta = torch.tensor([2.0 / 1.8, 1.0 / 0.95], dtype=torch.float64).log()
    first = 0.5 * (delta - delta.mean())
    delta = torch.tensor([2.0 / 1.5, 1.0 / 1.1], dtype=torch.float64).log()
    second = shares * (delta - shares @ delta) + 0.01 * torch.tensor([-0.025, 0.025])
    mean = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
    square = (0.999 * 0.001 * first**2 + 0.001 * second**2) / (1 - 0.999**2)
    wanted = torch.tensor([-0.025, 0.025]) - 0.025 * mean / square.sqrt()
    rule.update(losses, torch.tensor([1.5, 1.1], dtype=torch.float64))
    assert torch.allclose(rule.xi.detach(), wanted, atol=1e-6)


def test_famo_ignores_the_scale_of_a_loss_and_its_state_goes_round():
    losses = torch.tensor([2.0, 1.0], dtype=torch.float64)
    factor = torch.tensor([1.0, 1e3], dtype=torch.float64)
    first, second = build_rule("famo"), build_rule("famo")
    for step in range(5):
        after = losses * torch.tensor([0.9, 0.99 - 0.1 * step], dtype=torch.float64)
        update = first.weights(torch.eye(2), losses)
        scaled = second.weights(torch.eye(2), losses * factor) * factor
        assert torch.allclose(update / update.sum(), scaled / scaled.sum())
        first.update(losses, after)
        second.update(losses * factor, after * factor)
    third = build_rule("famo")
    third.load_state_dict(first.state_dict())
    for rule in (first, third):
        rule.update(losses, losses * torch.tensor([0.5, 0.9]))
    assert torch.equal(first.weights(torch.eye(2), losses), third.weights(torch.eye(2), losses))


def test_a_first_step_without_weights_teaches_nothing():
    rule = build_rule("famo")
    rule.update(torch.ones(2), torch.ones(2) / 2)
    assert rule.state_dict() == {}


def test_options_of_famo_are_the_configs_after_loading():
    losses = torch.tensor([2.0, 1.0], dtype=torch.float64)
    first = build_rule("famo")
    first.weights(torch.eye(2), losses)
    first.update(losses, losses / 2)
    second = build_rule("famo", lr=0.5)
    second.load_state_dict(first.state_dict())
    assert second.optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("option, value", [("lr", 0.0), ("weight_decay", -1.0)])
def test_bad_options_name_themselves(option, value):
    with pytest.raises(ValueError, match=f"MOKD.BALANCING.FAMO.{option.upper()} is {value}"):
        build_rule("famo", **{option: value})
