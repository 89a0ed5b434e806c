# Copyright (c) The mokd_det authors.
"""Steps that do not measure: one weighted sum gives what a boundary with these weights gives."""

import pytest
import torch

from mokd_det.balancing import Balancer, build_boundary, build_rule
from mokd_det.balancing.weighted_sum import WeightedSum

from .helpers import MEASURED_AT, gradients_of, net_with_uses_and_data
from .test_extra_parameters import attach, expected_gradient, gradients_of_each


def recorded_series(count):
    """Gram matrices (1, 3, 3) and losses (3,) of ``count`` steps that drift and are noisy."""
    generator = torch.Generator().manual_seed(0)
    base, task = torch.randn(3, 30, generator=generator), torch.randn(30, generator=generator)
    for step in range(count):
        noise = torch.randn(3, 30, generator=generator)
        gradients = (base + task * (1 + step / count) + 0.5 * noise).double()
        losses = torch.rand(3, generator=generator).double() + torch.tensor([2.0, 1.0, 0.5])
        yield gradients @ gradients.T, losses


@pytest.mark.parametrize("interval", [1, 4, 10])
def test_weights_follow_the_running_means_of_the_measured_steps(interval):
    """Against means that are written out: 0.9 a step, however many of them are measured."""
    rule = build_rule("loss_ratio", agreement=0.0, cap=1e9)
    balancer = Balancer(rule, smoothing=0.9, interval=interval, schedule=(1.0, 1.0))
    logs, count, known = torch.zeros(2).double(), 0, None
    for step, (gram, losses) in enumerate(recorded_series(40)):
        is_due = step == 0 or (step + 1) % interval == 0
        assert balancer.due == is_due
        if is_due:
            kept = 0.9 ** (step + 1 - count)
            logs = kept * logs + (1 - kept) * (losses[1:] / losses[0]).log()
            count = step + 1
            known = 4 / (logs / (1 - 0.9**count)).exp()
            decision = balancer.weigh(gram[None], losses)
            assert decision.gram is not None
        else:
            decision = balancer.reuse()
            assert decision.gram is None
        assert torch.allclose(decision.weights[1:], known), step
        balancer.end_step()


def test_measuring_every_fourth_step_ends_near_measuring_each():
    """On one series, with the default's smoothing: a window of as many steps, a quarter seen."""
    weights = {}
    for interval in (1, 4):
        balancer = Balancer(build_rule("loss_ratio"), interval=interval, schedule=(1.0, 1.0))
        for gram, losses in recorded_series(400):
            if balancer.due:
                weights[interval] = balancer.weigh(gram[None], losses).weights
            balancer.end_step()
    assert torch.allclose(weights[1], weights[4], rtol=0.1)


@pytest.mark.parametrize("measure_at", MEASURED_AT)
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    "weights, projectors",
    [
        ([1.0, 0.5, 3.0], None),
        ([2.0, 0.0, 0.5], None),
        ([1.0, 0.0, 2.0], [1.0, 0.7, 0.2]),
        ([1.0, 2.0, 0.0], [1.0, 0.0, 3.0]),
        ([1.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
    ],
)
def test_gradients_are_those_of_a_boundary(measure_at, micro_batches, weights, projectors):
    net, x = net_with_uses_and_data()
    each = [gradients_of_each(net, part) for part in x.chunk(micro_batches)]
    boundary = attach(net, "fixed", measure_at)
    balancer = boundary.balancer
    balancer.step, balancer.weights = 1, torch.tensor(weights, dtype=torch.float64)
    if projectors:
        balancer.projector_weights = torch.tensor(projectors, dtype=torch.float64)
    boundary.start(micro_batches, torch.tensor(8.0))
    assert boundary.measures == (measure_at == "parameters" and weights[0] != 1)
    for part in x.chunk(micro_batches):
        boundary.accumulate(net(part))
    found = boundary.finish(net.parameters())
    assert found.gram is None and found.weights.tolist() == weights
    assert found.losses.shape == (3,) and (found.losses != 0).all()
    for name, gradient in gradients_of(net).items():
        parts = [expected_gradient(name, found, part) for part in each]
        assert torch.allclose(gradient, 8 * sum(parts) / len(parts), rtol=1e-4, atol=1e-6), name


def test_tensors_are_given_on_as_they_are_where_no_factor_is_needed():
    """What two objectives compute from the same tensors can be recognised."""
    net, x = net_with_uses_and_data()
    boundary = build_boundary("fixed", {"weights": [1.0, 0.5, 2.0]}, objectives=3, interval=5)
    boundary.balancer.weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    boundary.start()
    maps = {"map": net.backbone(x)}
    branches = boundary.split(maps, net.uses())
    assert all(branch.features["map"] is maps["map"] for branch in branches.values())
    assert all(copy is p for branch in branches.values() for p, copy in branch.parameters.items())
    assert isinstance(boundary._known, WeightedSum)


def test_a_sum_of_weights_one_is_the_plain_sum_bit_for_bit():
    net, x = net_with_uses_and_data()
    sum(net(x).values()).backward()
    plain = gradients_of(net)
    net.zero_grad()
    boundary = attach(net, "fixed", "features")
    boundary.balancer.weights = torch.ones(3, dtype=torch.float64)
    boundary.start()
    found = boundary.backward(net(x), net.parameters())
    assert found.gram is None
    for name, gradient in gradients_of(net).items():
        assert torch.equal(gradient, plain[name]), name


def test_a_state_may_be_loaded_before_the_first_step():
    """Into a new boundary: its first step measures where the uninterrupted one's does."""
    net, x = net_with_uses_and_data()
    first = attach(net, "loss_ratio", "features", schedule=(1.0, 1.0))
    boundary = first
    for step in range(4):
        if step == 2:
            boundary = attach(net, "loss_ratio", "features", schedule=(1.0, 1.0))
            boundary.balancer.load_state_dict(first.balancer.state_dict())
        decision = boundary.backward(net(x))
        assert (decision.gram is None) == (step > 0), step
