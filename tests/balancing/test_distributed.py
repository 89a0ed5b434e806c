# Copyright (c) The mokd_det authors.
"""Two processes take the step of one on the joined batch, wherever it is measured, by any rule."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from mokd_det.balancing import build_boundary
from mokd_det.objectives import standardise

from .helpers import (
    MEASURED_AT,
    RULE_NAMES,
    UNSMOOTHED,
    Net,
    Shared,
    features_of,
    gradients_of,
    net_with_uses_and_data,
    with_weights,
)


class Model(Net):
    """Both objectives in one forward, as DistributedDataParallel wants it."""

    def __init__(self, standardised):
        super().__init__()
        self.standardised = standardised
        self.boundary = None

    def forward(self, x, target):
        task, distill = features_of(self.boundary, self.features(x))
        if self.standardised:  # over the joined batch
            distill = {name: standardise(f) for name, f in distill.items()}
        return {"task": self.task(task), "distill": self.distill(distill, target)}


def cases():
    """{name: (options of the boundary, micro-batches of two ranks, of one, standardised)}"""
    names = list(RULE_NAMES)
    if names[-1].startswith("torchjd"):
        names.append("torchjd.Random")  # all ranks draw the same numbers
    result = {}
    for measure_at in MEASURED_AT:
        for rule in names:
            options = {"rule": rule, "options": with_weights(rule, [0.5, 2.0])}
            result[f"{measure_at} {rule}"] = ({"measure_at": measure_at, **options}, 1, 1, True)
        options = {"measure_at": measure_at, "rule": "min_norm"}
        result[f"{measure_at} interval"] = ({**options, "interval": 3}, 1, 1, True)
        # It has running means of the losses as well, and wants features that agree.
        options["rule"] = "loss_ratio"
        smoothed = {**options, "smoothing": 0.5}
        result[f"{measure_at} smoothed"] = ({**smoothed, "interval": 1}, 1, 1, False)
        result[f"{measure_at} smoothed interval"] = ({**smoothed, "interval": 3}, 1, 1, False)
    options = {"measure_at": "parameters", "rule": "min_norm"}
    result["parameters layers"] = ({**options, "layers": ["stem"]}, 1, 1, True)
    options = {"measure_at": "parameters", "rule": "loss_ratio", "smoothing": 0, "interval": 1}
    # One rank's two micro-batches are the two ranks' batches.
    result["parameters halves"] = (options, 1, 2, False)
    # Four groups of samples on both sides: 2 ranks x 2 and 1 x 4, in the same order.
    result["parameters quarters"] = (options, 2, 4, False)
    return result


def train(options, micro_batches, standardised, x, target, wrap=lambda model: model, count=3):
    """Return (weights of each step, the model's state, bytes of each of our all-reduces)."""
    torch.manual_seed(0)
    model = Model(standardised)
    boundary = build_boundary(objectives=2, shared=Shared(model), steps=count, **options)
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
                again = [torch.stack(list(model(*part).values())) for part in parts]
            after = torch.stack(again).mean(0)
            if wrapped is not model:
                all_reduce(after)
                after /= 2
            boundary.balancer.rule.update(decided.losses, after.double())
    return torch.stack(weights), model.state_dict(), sent


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 8, 8, generator=generator)
    return x, torch.randn(8, 6, 8, 8, generator=generator)


RULES_FOR_USES = ["loss_ratio", "famo"]


def gradients_with_uses(rule, measure_at, rank=None):
    """Of one step of a network whose objectives use further parameters; rank None: alone."""
    net, x = net_with_uses_and_data()
    net.boundary = build_boundary(
        rule, objectives=3, measure_at=measure_at, shared=net.backbone, **UNSMOOTHED
    )
    if rank is None:
        losses = net(x)
    else:
        wrapped, part = DistributedDataParallel(net), x.chunk(2)[rank]
        if net.boundary.reduces_gradients:
            with wrapped.no_sync():
                losses = wrapped(part)
        else:
            losses = wrapped(part)
    found = net.boundary.backward(losses, net.parameters())
    assert found.weights[2] > 0
    return gradients_of(net)


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    x, target = (part.chunk(2)[rank] for part in data())
    results = {
        name: train(options, micro, standardised, x, target, DistributedDataParallel)
        for name, (options, micro, _, standardised) in cases().items()
    }
    for rule in RULES_FOR_USES:
        for measure_at in MEASURED_AT:
            results[rule, measure_at] = gradients_with_uses(rule, measure_at, rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The results of all cases on each of two ranks: starting processes is what takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", cases())
def test_two_ranks_equal_one(two_ranks, name):
    options, _, micro, standardised = cases()[name]
    weights, state, _ = train(options, micro, standardised, *data())
    first, second = (results[name] for results in two_ranks)
    assert torch.equal(first[0], second[0])  # identical weights at every step
    if options["rule"] not in name:  # a case of its own, which is to mean something
        assert (weights > 0).all()
    assert torch.allclose(first[0], weights, rtol=1e-3, atol=1e-6)
    for key, value in state.items():
        assert torch.equal(first[1][key], second[1][key]), key
        assert torch.allclose(first[1][key], value, rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("measure_at", MEASURED_AT)
@pytest.mark.parametrize("rule", RULES_FOR_USES)
def test_two_ranks_equal_one_with_further_parameters(two_ranks, rule, measure_at):
    first, second = (results[rule, measure_at] for results in two_ranks)
    for name, gradient in gradients_with_uses(rule, measure_at).items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], gradient, rtol=1e-4, atol=1e-7), name


def test_bytes_are_those_of_the_documentation(two_ranks):
    sent = {name: result[2] for name, result in two_ranks[0].items() if isinstance(name, str)}
    parts, count = 2, 2
    net = Model(True)
    # First the backward pass through the standardisation of the one distilled map.
    standardised = 8 * (2 * net.stem.out_channels + 1)
    assert sent["features min_norm"] == 3 * [standardised, 4 * (parts * count**2 + count)]
    shared = [p for module in (net.stem, net.down) for p in module.parameters()]
    others = [p for n, p in net.named_parameters() if not n.startswith(("stem", "down"))]
    size, other = sum(p.numel() for p in shared), sum(p.numel() for p in others)
    tensors = len(shared) + len(others)
    both = 4 * (count * size + other + tensors + count)
    assert sent["parameters min_norm"] == 3 * [standardised, both]
    plain = 4 * (size + other + tensors + count)
    assert sent["parameters interval"][:4] == [standardised, both, standardised, plain]
    layer = 4 * (count * sum(p.numel() for p in net.stem.parameters()) + 2 + count)
    assert sent["parameters layers"] == 3 * [standardised, layer, plain]
