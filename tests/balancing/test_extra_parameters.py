# Copyright (c) The mokd_det authors.
"""
Parameters that are not shared: a head that an objective uses besides the task, and projectors that
nothing else uses. What the objective adds to their gradient is weighted, and nothing else is.
"""

import pytest
import torch

from mokd_det.balancing import Parameters, build_boundary

from .helpers import MEASURED_AT, UNSMOOTHED, called, gradients_of, net_with_uses_and_data

OWN = ("projector", "adapter")


def attach(net, rule, measure_at, options=None, **others):
    net.boundary = build_boundary(
        rule, options, objectives=3, measure_at=measure_at, shared=net.backbone, **others
    )
    return net.boundary


def weighted(weights, parts):
    """The sum, without parts that are None."""
    return sum(w * g for w, g in zip(weights, parts) if g is not None)


def gradients_of_each(net, x):
    """By runs of their own, without a boundary."""
    boundary, net.boundary = net.boundary, None
    result = []
    for name in ("task", "features", "outputs"):
        net.zero_grad()
        net(x)[name].backward()
        result.append(gradients_of(net))
    net.zero_grad()
    net.boundary = boundary
    return result


def expected_gradient(name, decision, each):
    """By the documentation, of a parameter with this name."""
    weights = decision.weights.tolist()
    if name.startswith("head"):
        weights[0] = 1.0  # the task's own gradient is left as it is
    if name.startswith(OWN) and decision.projector_weights is not None:
        weights = decision.projector_weights.tolist()
    return weighted(weights, [gradients[name] for gradients in each])


@pytest.mark.parametrize("measure_at", MEASURED_AT)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 0.5, 3.0], [2.0, 1.0, 0.0]])
def test_head_gets_the_task_and_its_share(measure_at, weights):
    net, x = net_with_uses_and_data()
    each = gradients_of_each(net, x)
    boundary = attach(net, "fixed", measure_at, {"weights": weights})
    found = boundary.backward(net(x), net.parameters())
    assert found.weights.tolist() == weights
    for name, gradient in gradients_of(net).items():
        expected = expected_gradient(name, found, each)
        assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("measure_at", MEASURED_AT)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_rule_with_weights_for_what_is_an_objectives_own(measure_at, micro_batches):
    """Projector and adapter get those; the backbone and the borrowed head, the weights."""
    net, x = net_with_uses_and_data()
    boundary = attach(net, "loss_ratio", measure_at, **{**UNSMOOTHED, "interval": 3})
    for _ in range(2):  # the second step reuses both
        net.zero_grad()
        boundary.start(micro_batches, torch.tensor(64.0))
        for part in x.chunk(micro_batches):
            boundary.accumulate(net(part))
        # At features each micro-batch is balanced for itself.
        decided = list(boundary._decisions) if measure_at == "features" else None
        last = boundary.finish(net.parameters())
        decided = decided or [last] * micro_batches
        found = gradients_of(net)
        each = [gradients_of_each(net, part) for part in x.chunk(micro_batches)]
        for name, gradient in found.items():
            parts = (expected_gradient(name, *both) for both in zip(decided, each))
            expected = sum(parts) / micro_batches * 64
            assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5), name
        assert last.weights[2] > 0
        assert not torch.allclose(last.projector_weights, last.weights, rtol=0.1)


@pytest.mark.parametrize("measure_at", MEASURED_AT)
def test_heads_do_not_count_in_the_measurement(measure_at):
    net, x = net_with_uses_and_data()
    each = gradients_of_each(net, x)
    boundary = attach(net, "loss_ratio", measure_at, **UNSMOOTHED)
    plain = boundary.backward(net(x), net.parameters())
    assert plain.weights[2] > 0
    gradients = gradients_of(net)
    if measure_at == "parameters":
        flat = [
            torch.cat([g.flatten() for n, g in part.items() if n.startswith("backbone")])
            for part in each
        ]
        gram = torch.tensor([[a @ b for a in flat] for b in flat]).double()
        assert torch.allclose(plain.gram, gram, rtol=1e-4)
    # A loss a thousand times as large changes nothing but its weight, in the head neither.
    net.zero_grad()
    losses = net(x)
    losses["outputs"] = losses["outputs"] * 1e3
    scaled = boundary.backward(losses, net.parameters())
    assert torch.allclose(plain.weights[2], scaled.weights[2] * 1e3, rtol=1e-4)
    for name, gradient in gradients_of(net).items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("measure_at", MEASURED_AT)
def test_two_objectives_may_borrow_one_head(measure_at):
    net, x = net_with_uses_and_data()
    weights = [1.0, 0.5, 3.0]
    boundary = attach(net, "fixed", measure_at, {"weights": weights})
    losses = [torch.square, torch.abs, torch.exp]
    features, head = net.backbone(x), list(net.head.parameters())
    each = [torch.autograd.grad(loss(net.head(features)).mean(), head) for loss in losses]
    uses = Parameters(borrowed=head)
    branches = boundary.split(
        {"map": net.backbone(x)}, {"task": Parameters(), "first": uses, "second": uses}
    )
    assert [list(branch.parameters) for branch in branches.values()] == [[], head, head]
    outputs = [called(net.head, b.parameters, b.features["map"]) for b in branches.values()]
    means = [loss(output).mean() for loss, output in zip(losses, outputs)]
    boundary.backward(dict(zip(branches, means)), net.parameters())
    for parameter, *parts in zip(head, *each):
        assert torch.allclose(parameter.grad, weighted(weights, parts), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("measure_at", MEASURED_AT)
def test_weights_one_equal_the_plain_sum_bit_for_bit(measure_at):
    net, x = net_with_uses_and_data()
    sum(net(x).values()).backward()
    plain = gradients_of(net)
    net.zero_grad()
    attach(net, "fixed", measure_at).backward(net(x), net.parameters())
    for name, gradient in gradients_of(net).items():
        close = torch.equal if measure_at == "features" else torch.allclose
        assert close(gradient, plain[name]), name


@pytest.mark.parametrize("measure_at", MEASURED_AT)
@pytest.mark.parametrize("interval", [1, 3])
def test_micro_batches_and_loss_scale(measure_at, interval):
    """Two halves, scaled as by a GradScaler, are the mean of their gradients times the scale."""
    net, x = net_with_uses_and_data()
    boundary = attach(net, "fixed", measure_at, {"weights": [1.0, 0.5, 3.0]}, interval=interval)
    each = [gradients_of_each(net, half) for half in x.chunk(2)]
    for _ in range(2):  # the second step reuses weights if the interval is 3
        net.zero_grad()
        boundary.start(2, torch.tensor(64.0))
        for half in x.chunk(2):
            boundary.accumulate(net(half))
        found = boundary.finish(net.parameters())
        for name, gradient in gradients_of(net).items():
            expected = sum(expected_gradient(name, found, half) for half in each) / 2 * 64.0
            assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("measure_at", MEASURED_AT)
def test_a_forward_pass_for_its_losses_only(measure_at):
    net, x = net_with_uses_and_data()
    boundary = attach(net, "famo", measure_at)
    losses = net(x)
    with torch.no_grad():
        again = net(x)
    assert all(torch.equal(losses[name], again[name]) for name in losses)
    # It may come between a forward pass and its backward pass: nothing of that is lost.
    assert boundary.backward(losses, net.parameters()).gram is not None
