# Copyright (c) The mokd_det authors.
"""
Parameters that are not shared: a head that an objective uses besides the task, and a projector that
nothing else uses. What the objective adds to their gradient is weighted, and nothing else is.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from mokd_det.balancing import build_boundary

PLACES = ["features", "parameters"]


class Net(nn.Module):
    """Three objectives: the task, projected features, and another loss of the task's head."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 5, 3))
        self.head = nn.Sequential(nn.Conv2d(5, 4, 1), nn.Tanh(), nn.Conv2d(4, 2, 1))
        self.projector = nn.Conv2d(5, 3, 1)
        self.boundary = None

    def forward(self, x):
        features = self.backbone(x)
        projector, head = (
            dict(self.projector.named_parameters()),
            dict(self.head.named_parameters()),
        )
        if self.boundary is None:
            copies = [[features], [features, *projector.values()], [features, *head.values()]]
        else:
            extra = {1: list(projector.values()), 2: list(head.values())}
            copies = self.boundary.split([features], 3, extra=extra, own=[1])
        (task,), (shared, *of_projector), (outputs, *of_head) = copies
        # In this order: autograd then adds their gradients as a plain sum does, the last one first.
        scores = functional_call(self.head, dict(zip(head, of_head)), (outputs,))
        projected = functional_call(self.projector, dict(zip(projector, of_projector)), (shared,))
        return [
            self.head(task).square().mean(),
            (projected - 1).abs().mean(),
            1 - scores.cos().mean(),
        ]


def net_and_data():
    torch.manual_seed(0)
    return Net(), torch.randn(4, 3, 8, 8)


def gradients(net):
    return {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}


def weighted(weights, parts):
    """The sum, without parts that are None."""
    return sum(w * g for w, g in zip(weights, parts) if g is not None)


def gradients_of_each(net, x):
    result = []
    for i in range(3):
        net.zero_grad()
        net(x)[i].backward()
        result.append(gradients(net))
    net.zero_grad()
    return result


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 0.5, 3.0], [2.0, 1.0, 0.0]])
def test_head_gets_the_task_and_its_share(place, weights):
    net, x = net_and_data()
    task, features, outputs = gradients_of_each(net, x)
    net.boundary = build_boundary("fixed", place, net.backbone, weights=weights)
    balance = net.boundary.backward(net(x), net.parameters())
    assert balance.weights.tolist() == weights
    for name, gradient in gradients(net).items():
        # The head gets the task's gradient as it is.
        of_task = 1.0 if name.startswith("head") else weights[0]
        parts = (task[name], features[name], outputs[name])
        expected = weighted([of_task, *weights[1:]], parts)
        assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_rule_with_weights_for_what_is_an_objectives_own(place, micro_batches):
    """The projector gets those; the backbone and the head, which the task uses, the weights."""
    net, x = net_and_data()
    boundary = build_boundary(
        "constant_dominance", place, net.backbone, smoothing=0, interval=2, schedule=(1.0, 1.0)
    )
    net.boundary = boundary
    for _ in range(2):  # the second step reuses both
        net.zero_grad()
        boundary.start(micro_batches, torch.tensor(64.0))
        decided = []
        for part in x.chunk(micro_batches):
            boundary.accumulate(net(part))
            decided.append(boundary._balances[-1] if place == "features" else None)
        last = boundary.finish(net.parameters())
        found = gradients(net)
        net.boundary = None
        expected = {}
        for part, balance in zip(x.chunk(micro_batches), decided):
            balance = balance or last
            each = gradients_of_each(net, part)
            for name in found:
                own = name.startswith("projector")
                weights = balance.own_weights if own else balance.weights
                total = weighted(weights.tolist(), [g[name] for g in each]) / micro_batches * 64
                expected[name] = expected.get(name, 0) + total
        net.boundary = boundary
        for name, gradient in found.items():
            assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-5), name
        assert last.own is not None and not torch.allclose(last.own, last.weights, rtol=0.1)


@pytest.mark.parametrize("place", PLACES)
def test_heads_do_not_count_in_the_measurement(place):
    net, x = net_and_data()
    each = gradients_of_each(net, x)
    net.boundary = build_boundary("protected_min_norm", place, net.backbone)
    balance = net.boundary.backward(net(x), net.parameters())
    if place == "parameters":
        flat = [
            torch.cat([g.flatten() for n, g in part.items() if n.startswith("backbone")])
            for part in each
        ]
        gram = torch.tensor([[a @ b for a in flat] for b in flat]).double()
        assert torch.allclose(balance.gram, gram, rtol=1e-4)
    scaled, _ = net_and_data()
    with torch.no_grad():
        scaled.load_state_dict(net.state_dict())
    scaled.boundary = build_boundary("protected_min_norm", place, scaled.backbone)
    losses = scaled(x)
    balance_scaled = scaled.boundary.backward([losses[0], losses[1], losses[2] * 1e3])
    # A loss a thousand times as large changes nothing, in the head neither.
    assert torch.allclose(balance.weights[2], balance_scaled.weights[2] * 1e3, rtol=1e-4)
    net.zero_grad(), scaled.zero_grad()
    net.boundary.backward(net(x), net.parameters())
    losses = scaled(x)
    losses = [losses[0], losses[1], losses[2] * 1e3]
    scaled.boundary.backward(losses, scaled.parameters())
    for (name, a), b in zip(gradients(net).items(), gradients(scaled).values()):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("place", PLACES)
def test_weights_one_equal_the_plain_sum_bit_for_bit(place):
    net, x = net_and_data()
    sum(net(x)).backward()
    plain = gradients(net)
    net.zero_grad()
    net.boundary = build_boundary("fixed", place, net.backbone, weights=[1.0, 1.0, 1.0])
    net.boundary.backward(net(x), net.parameters())
    for name, gradient in gradients(net).items():
        close = torch.equal if place == "features" else torch.allclose
        assert close(gradient, plain[name]), name


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("interval", [1, 2])
def test_micro_batches_and_loss_scale(place, interval):
    """Two halves, scaled as by a GradScaler, are the mean of their gradients times the scale."""
    net, x = net_and_data()
    weights = [1.0, 0.5, 3.0]
    expected = {}
    for half in x.chunk(2):
        task, features, outputs = gradients_of_each(net, half)
        for name in gradients(net):
            found = (g[name] for g in (task, features, outputs))
            expected[name] = expected.get(name, 0) + weighted(weights, found) / 2 * 64.0
    net.boundary = build_boundary("fixed", place, net.backbone, weights=weights, interval=interval)
    for _ in range(2):  # the second step reuses weights if the interval is 2
        net.zero_grad()
        net.boundary.start(2, torch.tensor(64.0))
        for half in x.chunk(2):
            net.boundary.accumulate(net(half))
        net.boundary.finish(net.parameters())
        for name, gradient in gradients(net).items():
            assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("place", PLACES)
def test_a_forward_pass_for_its_losses_only(place):
    net, x = net_and_data()
    net.boundary = build_boundary("famo", place, net.backbone)
    losses = net(x)
    with torch.no_grad():
        again = net(x)
    assert all(torch.equal(a, b) for a, b in zip(losses, again))


def worker(rank, rule, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for place in PLACES:
        net, x = net_and_data()
        net.boundary = build_boundary(rule, place, net.backbone, smoothing=0, steps=10)
        wrapped = DistributedDataParallel(net)
        if net.boundary.reduces_gradients:
            with wrapped.no_sync():
                losses = wrapped(x.chunk(2)[rank])
        else:
            losses = wrapped(x.chunk(2)[rank])
        net.boundary.backward(losses, net.parameters())
        results[place] = gradients(net)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("rule", ["anchored", "constant_dominance", "loss_ratio"])
def test_two_ranks_equal_one(rule, tmp_path):
    mp.spawn(worker, args=(rule, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for place in PLACES:
        net, x = net_and_data()
        net.boundary = build_boundary(rule, place, net.backbone, smoothing=0, steps=10)
        net.boundary.backward(net(x), net.parameters())
        assert net.boundary.last.weights[2] > 0
        for name, gradient in gradients(net).items():
            assert torch.equal(first[place][name], second[place][name]), (place, name)
            assert torch.allclose(first[place][name], gradient, rtol=1e-4, atol=1e-7), (place, name)
