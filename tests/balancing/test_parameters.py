# Copyright (c) The mokd_det authors.
"""Place ``parameters``: against gradients taken in separate runs, one for each objective."""

import pytest
import torch

from mokd_det.balancing import Balancer, ParameterBoundary, balance, build_boundary, build_rule
from mokd_det.balancing.gram import gram_matrix, signal_gram

from .test_boundary import Net


class Shared(torch.nn.Module):
    """The shared part of ``Net`` as a module of its own, as a detector's backbone is."""

    def __init__(self, net):
        super().__init__()
        self.stem, self.down = net.stem, net.down


@pytest.fixture
def setting():
    torch.manual_seed(0)
    net = Net()
    return net, Shared(net), torch.randn(4, 3, 8, 8), torch.randn(4, 6, 8, 8)


def losses_of(net, boundary, x, target):
    task, shared = boundary.split(net.features(x), 2)
    return [net.task(task), net.distill(shared, target)]


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


RULES = [
    "constant_dominance",
    "loss_ratio",
    "aligned",
    "fixed",
    "min_norm",
    "protected_min_norm",
    "anchored",
    "imtl_g",
    "cosine_gate",
]
RULES += ["famo"]


@pytest.mark.parametrize("layers", [(), ("down",), ("stem.weight", "down")])
@pytest.mark.parametrize("name", RULES)
def test_equals_the_brute_force_reference(setting, name, layers):
    net, shared, x, target = setting
    gradients, rest = reference(net, shared, x, target)
    measured = [
        i
        for i, (n, _) in enumerate(shared.named_parameters())
        if not layers or any(n == layer or n.startswith(f"{layer}.") for layer in layers)
    ]
    boundary = build_boundary(
        name,
        place="parameters",
        shared=shared,
        layers=layers,
        smoothing=0,
        schedule=(1.0, 1.0),
        weights=[0.7, 2.0],
    )
    losses = losses_of(net, boundary, x, target)
    boundary.backward(losses, net.parameters())

    rule = build_rule(name, weights=[0.7, 2.0])
    gram = gram_matrix([[g[i] for i in measured] for g in gradients])
    expected = balance(rule, gram, torch.stack(losses).detach())
    assert torch.allclose(boundary.last.gram, expected.gram, rtol=1e-5)
    assert torch.allclose(boundary.last.weights, expected.weights, rtol=1e-4)
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

    def losses(first, second, part_target):
        return [net.task([first, net.down(first)]), net.distill([second], part_target)]

    gradients = []
    for objective in range(2):
        net.zero_grad()
        first = torch.relu(net.stem(x))
        losses(first, first, target)[objective].backward()
        gradients.append([p.grad for p in shared.parameters()])
    boundary = build_boundary(
        *("fixed", "parameters", shared), layers=layers, interval=2, weights=[0.7, 2.0]
    )
    for reused in (False, True):
        net.zero_grad()
        boundary.start(count)
        for part, part_target in zip(x.chunk(count), target.chunk(count)):
            copies = boundary.split([torch.relu(net.stem(part))], 2)
            boundary.accumulate(losses(copies[0][0], copies[1][0], part_target))
        found = boundary.finish(net.parameters())
        assert (found.gram is None) == reused
        for parameter, task, distillation in zip(shared.parameters(), *gradients):
            wanted = 0.7 * task + (0 if distillation is None else 2 * distillation)
            assert torch.allclose(parameter.grad, wanted, rtol=1e-4, atol=1e-6)


def parts_of(boundary, net, x, target, count):
    """One step over ``count`` micro-batches."""
    net.zero_grad()
    boundary.start(count)
    for part, part_target in zip(x.chunk(count), target.chunk(count)):
        boundary.accumulate(losses_of(net, boundary, part, part_target))
    return boundary.finish(net.parameters())


@pytest.mark.parametrize("layers", [(), ("down",)])
def test_accumulation_equals_the_big_batch(setting, layers):
    net, shared, x, target = setting
    results = []
    for count in (1, 2, 4):
        boundary = build_boundary(
            "protected_min_norm", place="parameters", shared=shared, layers=layers
        )
        decided = parts_of(boundary, net, x, target, count)
        results.append([decided.weights, decided.gram, *(p.grad for p in net.parameters())])
    for other in results[1:]:
        for first, second in zip(results[0], other):
            assert torch.allclose(first, second, rtol=1e-4, atol=1e-6)


def test_accumulation_at_features_balances_each_micro_batch(setting):
    """The documented difference: the mean of the micro-batches' own balanced gradients."""
    net, _, x, target = setting
    boundary = build_boundary("anchored")
    total, weights = 0, []
    for part, part_target in zip(x.chunk(2), target.chunk(2)):
        net.zero_grad()
        boundary.backward(losses_of(net, boundary, part, part_target))
        total = total + net.stem.weight.grad / 2
        weights.append(boundary.last.weights)
    decided = parts_of(boundary, net, x, target, 2)
    assert torch.allclose(net.stem.weight.grad, total, rtol=1e-5, atol=1e-7)
    assert torch.allclose(decided.weights, torch.stack(weights).mean(0))


def test_signal_from_micro_batches(setting):
    net, shared, x, target = setting
    balancer = Balancer(build_rule("anchored"))
    boundary = ParameterBoundary(balancer, shared, signal=True)
    seen = []
    balancer.balance = lambda parts, losses, signal, *rest: (
        seen.append((parts[0], signal)) or Balancer.balance(balancer, parts, losses, signal)
    )
    parts_of(boundary, net, x, target, 4)
    own, mean = [], 0
    for part, part_target in zip(x.chunk(4), target.chunk(4)):
        gradients, _ = reference(net, shared, part, part_target)
        flat = torch.stack([torch.cat([g.flatten() for g in parts]) for parts in gradients])
        own.append(flat @ flat.T)
        mean = mean + flat / 4
    batch, signal = seen[0]
    assert torch.allclose(batch, mean @ mean.T, rtol=1e-4)
    assert torch.allclose(signal, signal_gram(mean @ mean.T, sum(own), 4), rtol=1e-3, atol=1e-6)
    assert boundary.last.seen is not None and not torch.equal(boundary.last.seen, batch.double())


def test_weights_are_reused_between_intervals(setting):
    """In between one backward pass with the last weights, and no Gram matrix."""
    net, shared, x, target = setting
    boundary = build_boundary("anchored", place="parameters", shared=shared, interval=2)
    first = boundary.backward(losses_of(net, boundary, x, target), net.parameters())
    wanted = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    second = boundary.backward(losses_of(net, boundary, x, target), net.parameters())
    assert first.gram is not None and second.gram is None
    assert torch.equal(first.weights, second.weights)
    for parameter, gradient in zip(net.parameters(), wanted):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("place", ["features", "parameters"])
@pytest.mark.parametrize("name", ["anchored", "min_norm", "famo"])
def test_loss_scaling_changes_gradients_and_nothing_else(setting, place, name):
    net, shared, x, target = setting
    boundary = build_boundary(name, place=place, shared=shared, steps=10)
    results = []
    for scale in (None, torch.tensor(1024.0)):
        net.zero_grad()
        boundary.start(2, scale)
        for part, part_target in zip(x.chunk(2), target.chunk(2)):
            boundary.accumulate(losses_of(net, boundary, part, part_target))
        decided = boundary.finish(net.parameters())
        results.append((decided, [p.grad.clone() for p in net.parameters()]))
    (plain, gradients), (scaled, scaled_gradients) = results
    assert torch.allclose(plain.gram, scaled.gram, rtol=1e-5)
    assert torch.allclose(plain.weights, scaled.weights, rtol=1e-5)
    for first, second in zip(gradients, scaled_gradients):
        assert torch.allclose(first * 1024, second, rtol=1e-4, atol=1e-4)


def test_look_ahead_runs_at_parameters_and_on_named_layers(setting):
    net, shared, x, target = setting
    for layers, size in (
        ((), sum(p.numel() for p in shared.parameters())),
        (
            ("stem",),
            sum(p.numel() for p in net.stem.parameters()),
        ),
    ):
        boundary = build_boundary("look_ahead", place="parameters", shared=shared, layers=layers)
        for _ in range(3):
            net.zero_grad()
            boundary.backward(losses_of(net, boundary, x, target), net.parameters())
        state = boundary.balancer.state_dict()["rule"]
        assert [len(g) for g in state["previous"]] == [size, size] and state["count"] == 2


def test_unused_and_frozen_parameters(setting):
    net, shared, x, target = setting
    net.down.bias.requires_grad_(False)
    net.extra = torch.nn.Linear(2, 2)
    shared.extra = torch.nn.Linear(2, 2)
    boundary = build_boundary("anchored", place="parameters", shared=shared)
    boundary.backward(losses_of(net, boundary, x, target), net.parameters())
    assert net.down.bias.grad is None and net.extra.weight.grad is None
    assert net.stem.weight.grad is not None
    assert shared.extra.weight.grad is None  # no objective reaches it: not a zero


@pytest.mark.parametrize(
    "options, message",
    [
        ({"place": "heads"}, "MOKD.BALANCING.PLACE is 'heads'"),
        ({"gram": "clean"}, "MOKD.BALANCING.GRAM is 'clean'"),
        ({"gram": "signal"}, "GRAM 'signal' multiplies gradients of different samples"),
        ({"layers": ["down"]}, "MOKD.BALANCING.LAYERS is .*but features have no layers"),
        ({"rule": "look_ahead"}, "set MOKD.BALANCING.PLACE to 'parameters'"),
        ({"place": "parameters", "shared": None}, "needs 'shared'"),
        ({"place": "parameters", "shared": torch.nn.ReLU()}, "all of it is frozen"),
        ({"place": "parameters", "layers": ["dawn"]}, "LAYERS has 'dawn'.*It has: stem, down"),
    ],
)
def test_options_that_exclude_each_other(setting, options, message):
    with pytest.raises(ValueError, match=message):
        build_boundary(**{"shared": setting[1], "steps": 10, **options})


def test_layers_that_no_objective_reaches_are_an_error(setting):
    net, shared, x, target = setting
    shared.extra = torch.nn.Linear(2, 2)
    boundary = build_boundary("anchored", "parameters", shared, layers=["extra"])
    with pytest.raises(ValueError, match="with MOKD.BALANCING.LAYERS name layers that the feature"):
        boundary.backward(losses_of(net, boundary, x, target), net.parameters())


def test_losses_that_miss_the_boundary_are_an_error(setting):
    net, shared, x, target = setting
    boundary = build_boundary("min_norm", place="parameters", shared=shared)
    features = net.features(x)
    boundary.split(features, 2)
    with pytest.raises(RuntimeError, match="do not depend on the features"):
        boundary.backward([net.task(features), net.distill(features, target)])


@pytest.mark.parametrize("place", ["features", "parameters"])
@pytest.mark.parametrize(
    "name",
    [
        *("constant_dominance", "loss_ratio", "aligned", "anchored"),
        *("protected_min_norm", "min_norm", "famo", "imtl_g"),
    ],
)
def test_bfloat16_is_close_to_float32(setting, place, name):
    net, shared, x, target = setting
    results = []
    for enabled in (False, True):
        boundary = build_boundary(name, place=place, shared=shared, smoothing=0, steps=10)
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = losses_of(net, boundary, x, target)
        decided = boundary.backward(losses, net.parameters())
        results.append((decided, torch.cat([p.grad.flatten() for p in net.parameters()])))
    (exact, gradient), (half, half_gradient) = results
    assert torch.allclose(half.gram, exact.gram, rtol=0.05, atol=0.01 * exact.gram.max().item())
    assert torch.allclose(half.weights, exact.weights, rtol=0.05)
    assert half_gradient.dtype == torch.float32
    assert (half_gradient - gradient).norm() < 0.02 * gradient.norm()


@pytest.mark.parametrize("place", ["features", "parameters"])
@pytest.mark.parametrize(
    "name",
    [
        *("constant_dominance", "loss_ratio", "aligned"),
        *("min_norm", "protected_min_norm", "anchored", "imtl_g"),
    ],
)
def test_three_objectives(setting, place, name):
    net, shared, x, target = setting

    def three(copies):
        first, second, third = copies
        return [net.task(first), net.distill(second, target), third[1].square().mean()]

    boundary = build_boundary(name, place=place, shared=shared, smoothing=0, steps=10)
    losses = three(boundary.split(net.features(x), 3))
    boundary.backward(losses, net.parameters())
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
    if place == "parameters":
        assert torch.allclose(boundary.last.gram.float(), gram_matrix(gradients), rtol=1e-4)
