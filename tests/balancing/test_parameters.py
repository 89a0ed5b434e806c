# Copyright (c) The mokd_det authors.
"""At parameters: against gradients taken in separate runs. Then what holds at features, too."""

import pytest
import torch

from mokd_det.balancing import build_boundary, build_rule, gram_matrix

from .helpers import (
    MEASURED_AT,
    RULE_NAMES,
    UNSMOOTHED,
    Shared,
    decide,
    features_of,
    losses_of,
    net_and_data,
    step,
    with_weights,
)


@pytest.fixture
def setting():
    net, x, target = net_and_data()
    return net, Shared(net), x, target


def at_parameters(name, shared, options=None, objectives=2, **others):
    return build_boundary(
        name, options, objectives=objectives, measure_at="parameters", shared=shared, **others
    )


def reference(net, shared, x, target):
    """Each objective's gradient by a run of its own: (shared gradients, gradients of the rest)."""
    gradients, rest = [], {}
    for objective in range(2):
        net.zero_grad()
        features = net.features(x)
        [net.task(features), net.distill(features, target)][objective].backward()
        gradients.append(
            [torch.zeros_like(p) if p.grad is None else p.grad for p in shared.parameters()]
        )
        for name, parameter in net.named_parameters():
            if not name.startswith(("stem", "down")) and parameter.grad is not None:
                rest[name] = parameter.grad.clone()
    net.zero_grad()
    return gradients, rest


@pytest.mark.parametrize("layers", [(), ("down",), ("stem",), ("stem.weight", "down")])
@pytest.mark.parametrize("name", RULE_NAMES)
def test_equals_the_brute_force_reference(setting, name, layers):
    net, shared, x, target = setting
    gradients, rest = reference(net, shared, x, target)
    measured = [
        i
        for i, (n, _) in enumerate(shared.named_parameters())
        if not layers or any(n == layer or n.startswith(f"{layer}.") for layer in layers)
    ]
    options = with_weights(name, [0.7, 2.0])
    boundary = at_parameters(name, shared, options, layers=layers, **UNSMOOTHED)
    losses = losses_of(net, boundary, x, target)
    boundary.backward(losses, net.parameters())

    gram = gram_matrix([[g[i] for i in measured] for g in gradients])
    values = torch.stack(list(losses.values())).detach()
    expected = decide(build_rule(name, **options), gram, values)
    assert torch.allclose(boundary.last.gram, expected.gram, rtol=1e-5)
    assert torch.allclose(boundary.last.weights, expected.weights, rtol=1e-4)
    assert boundary.last.fallback == expected.fallback
    weights = expected.weights.tolist()
    for parameter, *parts in zip(shared.parameters(), *gradients):
        wanted = sum(w * g for w, g in zip(weights, parts))
        assert torch.allclose(parameter.grad, wanted, rtol=1e-4, atol=1e-6)
    for parameter_name, parameter in net.named_parameters():
        if parameter_name in rest:
            assert torch.allclose(parameter.grad, rest[parameter_name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("layers", [(), ("stem",), ("down",)])
def test_layers_behind_the_last_feature_train_with_the_tasks_gradient(setting, layers, count):
    """A tap in the middle of a classifier: what follows it is shared as well, but for the head."""
    net, shared, x, target = setting

    def losses(task, distill, part_target):
        return {
            "task": net.task({**task, "down": net.down(task["stem"])}),
            "distill": net.distill(distill, part_target),
        }

    gradients = []
    for objective in ("task", "distill"):
        net.zero_grad()
        features = {"stem": torch.relu(net.stem(x))}
        losses(features, features, target)[objective].backward()
        gradients.append([p.grad for p in shared.parameters()])
    boundary = at_parameters("fixed", shared, {"weights": [0.7, 2.0]}, layers=layers, interval=3)
    for reused in (False, True):
        net.zero_grad()
        boundary.start(count)
        for part, part_target in zip(x.chunk(count), target.chunk(count)):
            copies = features_of(boundary, {"stem": torch.relu(net.stem(part))})
            boundary.accumulate(losses(*copies, part_target))
        found = boundary.finish(net.parameters())
        assert (found.gram is None) == reused
        for parameter, task, distillation in zip(shared.parameters(), *gradients):
            wanted = 0.7 * task + (0 if distillation is None else 2 * distillation)
            assert torch.allclose(parameter.grad, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layers", [(), ("stem",), ("down",)])
def test_accumulation_equals_the_big_batch(setting, layers):
    net, shared, x, target = setting
    results = []
    for count in (1, 2, 4):
        boundary = at_parameters("loss_ratio", shared, layers=layers, **UNSMOOTHED)
        found = step(boundary, net, x, target, count)
        assert (found.weights[1] > 0) == (layers != ("down",))  # no distillation reaches it
        results.append([found.weights, found.gram, *(p.grad for p in net.parameters())])
    for other in results[1:]:
        for first, second in zip(results[0], other):
            assert torch.allclose(first, second, rtol=1e-4, atol=1e-6)


def test_weights_are_reused_between_intervals(setting):
    """
    In between one backward pass with the last weights, and no Gram matrix. (The projector of this
    network is not declared as the objective's own, so nothing is promised for it.)
    """
    net, shared, x, target = setting
    boundary = at_parameters("loss_ratio", shared, **{**UNSMOOTHED, "interval": 3})
    first = step(boundary, net, x, target)
    declared = [p for n, p in net.named_parameters() if not n.startswith("projector")]
    wanted = [p.grad.clone() for p in declared]
    second = step(boundary, net, x, target)
    assert first.gram is not None and second.gram is None
    assert torch.equal(first.weights, second.weights) and (first.weights > 0).all()
    for parameter, gradient in zip(declared, wanted):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_unused_and_frozen_parameters(setting):
    net, shared, x, target = setting
    net.down.bias.requires_grad_(False)
    net.extra = torch.nn.Linear(2, 2)
    shared.extra = torch.nn.Linear(2, 2)
    step(at_parameters("loss_ratio", shared, **UNSMOOTHED), net, x, target)
    assert net.down.bias.grad is None and net.extra.weight.grad is None
    assert net.stem.weight.grad is not None
    assert shared.extra.weight.grad is None  # no objective reaches it: not a zero


def test_layers_that_no_objective_reaches_are_an_error(setting):
    net, shared, x, target = setting
    shared.extra = torch.nn.Linear(2, 2)
    boundary = at_parameters("min_norm", shared, layers=["extra"])
    with pytest.raises(ValueError, match="with MOKD.BALANCING.LAYERS name layers that the feature"):
        step(boundary, net, x, target)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"measure_at": "heads"}, "MOKD.BALANCING.MEASURE_AT is 'heads'"),
        ({"layers": ["down"]}, "MOKD.BALANCING.LAYERS is .*but features have no layers"),
        ({"measure_at": "parameters", "shared": None}, "'shared', the module that makes features"),
        ({"measure_at": "parameters", "shared": torch.nn.ReLU()}, "all of it is frozen"),
        (
            {"measure_at": "parameters", "layers": ["dawn"]},
            "LAYERS has 'dawn'.*It has: stem, down",
        ),
    ],
)
def test_options_that_exclude_each_other(setting, options, message):
    with pytest.raises(ValueError, match=message):
        build_boundary(**{"objectives": 2, "shared": setting[1], "steps": 10, **options})


@pytest.mark.parametrize("measure_at", MEASURED_AT)
def test_losses_that_miss_the_boundary_are_an_error(setting, measure_at):
    net, shared, x, target = setting
    boundary = build_boundary("min_norm", objectives=2, measure_at=measure_at, shared=shared)
    assert boundary.measured_at == measure_at
    features = net.features(x)
    features_of(boundary, features)
    losses = {"task": net.task(features), "distill": net.distill(features, target)}
    with pytest.raises(RuntimeError, match="do not depend on the features"):
        boundary.backward(losses)


@pytest.mark.parametrize("measure_at", MEASURED_AT)
@pytest.mark.parametrize("name", ["loss_ratio", "min_norm", "famo"])
def test_loss_scaling_changes_gradients_and_nothing_else(setting, measure_at, name):
    net, shared, x, target = setting
    boundary = build_boundary(
        name, objectives=2, measure_at=measure_at, shared=shared, **UNSMOOTHED
    )
    results = []
    for scale in (None, torch.tensor(1024.0)):
        found = step(boundary, net, x, target, 2, scale)
        results.append((found, [p.grad.clone() for p in net.parameters()]))
    (plain, gradients), (scaled, scaled_gradients) = results
    assert torch.allclose(plain.gram, scaled.gram, rtol=1e-5)
    assert torch.allclose(plain.weights, scaled.weights, rtol=1e-5)
    for first, second in zip(gradients, scaled_gradients):
        assert torch.allclose(first * 1024, second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("measure_at", MEASURED_AT)
@pytest.mark.parametrize("name", RULE_NAMES)
def test_bfloat16_is_close_to_float32(setting, measure_at, name):
    net, shared, x, target = setting
    results = []
    for enabled in (False, True):
        boundary = build_boundary(
            name, objectives=2, measure_at=measure_at, shared=shared, smoothing=0, steps=10
        )
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = losses_of(net, boundary, x, target)
        found = boundary.backward(losses, net.parameters())
        results.append((found, torch.cat([p.grad.flatten() for p in net.parameters()])))
    (exact, gradient), (half, half_gradient) = results
    assert torch.allclose(half.gram, exact.gram, rtol=0.05, atol=0.01 * exact.gram.max().item())
    assert torch.allclose(half.weights, exact.weights, rtol=0.05)
    assert half_gradient.dtype == torch.float32
    assert (half_gradient - gradient).norm() < 0.02 * gradient.norm()


@pytest.mark.parametrize("measure_at", MEASURED_AT)
@pytest.mark.parametrize("name", RULE_NAMES)
def test_three_objectives(setting, measure_at, name):
    net, shared, x, target = setting

    def three(copies):
        first, second, third = copies
        return [net.task(first), net.distill(second, target), third["down"].square().mean()]

    names = ("task", "features", "outputs")
    boundary = build_boundary(
        name, objectives=3, measure_at=measure_at, shared=shared, smoothing=0, steps=10
    )
    losses = three(features_of(boundary, net.features(x), names))
    boundary.backward(dict(zip(names, losses)), net.parameters())
    got = [p.grad.clone() for p in shared.parameters()]

    wanted = [torch.zeros_like(g) for g in got]
    gradients = []
    for i, weight in enumerate(boundary.last.weights.tolist()):
        loss = three([net.features(x)] * 3)[i]
        parts = torch.autograd.grad(loss, list(shared.parameters()), allow_unused=True)
        parts = [torch.zeros_like(w) if p is None else p for w, p in zip(wanted, parts)]
        gradients.append(parts)
        wanted = [w + weight * p for w, p in zip(wanted, parts)]
    for first, second in zip(got, wanted):
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-6)
    if measure_at == "parameters":
        assert torch.allclose(boundary.last.gram.float(), gram_matrix(gradients), rtol=1e-4)
