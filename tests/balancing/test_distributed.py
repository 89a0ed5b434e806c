# Copyright (c) The mokd_det authors.
"""Two processes take the step of one on the joined batch: both places, all rules."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from mokd_det.balancing import BALANCERS, build_boundary
from mokd_det.subspace.projector import standardise

from .test_boundary import Net
from .test_parameters import Shared


class Model(Net):
    """Both objectives in one forward, as DistributedDataParallel wants it."""

    def __init__(self, standardised):
        super().__init__()
        self.standardised = standardised
        self.boundary = None

    def forward(self, x, target):
        features = self.features(x)
        task, shared = self.boundary.split(features, 2) if self.boundary else [features] * 2
        if self.standardised:  # over the joined batch
            shared = [standardise(f) for f in shared]
        return [self.task(task), self.distill(shared, target)]


def cases():
    """{name: (options of the boundary, micro-batches of two ranks, of one, standardised)}"""
    result = {}
    for place in ("features", "parameters"):
        for rule in sorted(BALANCERS):
            if (place, rule) != ("features", "look_ahead"):
                result[f"{place} {rule}"] = ({"place": place, "rule": rule}, 1, 1, True)
        options = {"place": place, "rule": "protected_min_norm"}
        result[f"{place} smoothed"] = ({**options, "smoothing": 0.5}, 1, 1, True)
        result[f"{place} interval"] = ({**options, "interval": 2}, 1, 1, True)
    # One rank's two micro-batches are the two ranks' batches.
    options = {"place": "parameters", "rule": "anchored"}
    result["parameters layers"] = ({**options, "layers": ["down"]}, 1, 1, True)
    result["parameters signal"] = ({**options, "gram": "signal"}, 1, 2, False)
    signal = {**options, "gram": "signal", "layers": ["stem"], "smoothing": 0.5}
    result["parameters signal of layers"] = (signal, 1, 2, False)
    # Four groups of samples on both sides: 2 ranks x 2 and 1 x 4, in the same order.
    result["parameters accumulated"] = ({**options, "gram": "signal"}, 2, 4, False)
    return result


def train(options, micro_batches, standardised, x, target, wrap=lambda model: model, count=3):
    """Return (weights of each step, the model's state, bytes of each of our all-reduces)."""
    torch.manual_seed(0)
    model = Model(standardised)
    boundary = build_boundary(shared=Shared(model), steps=count, weights=[0.5, 2.0], **options)
    model.boundary = boundary
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    weights, sent = [], []
    all_reduce = dist.all_reduce
    for _ in range(count):
        optimizer.zero_grad()
        second_forward = boundary.balancer.needs_second_forward
        boundary.start(micro_batches)
        parts = list(zip(x.chunk(micro_batches), target.chunk(micro_batches)))
        for i, part in enumerate(parts):
            manual = boundary.reduces_gradients or i < len(parts) - 1
            if wrapped is not model and manual:
                with wrapped.no_sync():
                    losses = wrapped(*part)
            else:
                losses = wrapped(*part)
            dist.all_reduce = lambda t, *a, **k: (
                sent.append(t.numel() * t.element_size()),
                all_reduce(t, *a, **k),
            )
            boundary.accumulate(losses)
        decided = boundary.finish(model.parameters())
        dist.all_reduce = all_reduce
        optimizer.step()
        weights.append(decided.weights)
        if second_forward:
            with torch.no_grad():
                after = torch.stack([torch.stack(model(*part)) for part in parts]).mean(0)
            if wrapped is not model:
                all_reduce(after)
                after /= 2
            boundary.balancer.rule.update(decided.losses, after.double())
    return torch.stack(weights), model.state_dict(), sent


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 8, 8, generator=generator)
    return x, torch.randn(8, 6, 8, 8, generator=generator)


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    x, target = (part.chunk(2)[rank] for part in data())
    results = {
        name: train(options, micro, standardised, x, target, DistributedDataParallel)
        for name, (options, micro, _, standardised) in cases().items()
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", cases())
def test_two_ranks_equal_one(two_ranks, name):
    options, _, micro, standardised = cases()[name]
    weights, state, _ = train(options, micro, standardised, *data())
    first, second = (results[name] for results in two_ranks)
    assert torch.equal(first[0], second[0])  # identical weights at every step
    assert torch.allclose(first[0], weights, rtol=1e-3, atol=1e-6)
    for key, value in state.items():
        assert torch.equal(first[1][key], second[1][key]), key
        assert torch.allclose(first[1][key], value, rtol=1e-4, atol=1e-5), key


def test_bytes_are_those_of_the_documentation(two_ranks):
    sent = {name: result[2] for name, result in two_ranks[0].items()}
    parts, count = 2, 2
    net = Model(True)
    # First the backward pass through the standardisation of the one distilled map.
    standardised = 8 * (2 * net.stem.out_channels + 1)
    assert sent["features anchored"] == 3 * [standardised, 4 * (parts * count**2 + count)]
    shared = [p for module in (net.stem, net.down) for p in module.parameters()]
    others = [p for n, p in net.named_parameters() if not n.startswith(("stem", "down"))]
    size, other = sum(p.numel() for p in shared), sum(p.numel() for p in others)
    tensors = len(shared) + len(others)
    both = 4 * (count * size + other + tensors + count)
    assert sent["parameters anchored"] == 3 * [standardised, both]
    plain = 4 * (size + other + tensors + count)
    assert sent["parameters interval"][:4] == [standardised, both, standardised, plain]
    layer = 4 * (count * sum(p.numel() for p in net.down.parameters()) + 2 + count)
    assert sent["parameters layers"] == 3 * [standardised, layer, plain]
    signal = 4 * (count * size + other + tensors + count + count**2)
    assert sent["parameters signal"] == 3 * [signal]
