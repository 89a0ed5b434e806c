# Copyright (c) The mokd_det authors.
"""Two processes: one Gram matrix, and the step of one process on the joined batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from mokd_det.balancing import FeatureBoundary, build_rule

from .test_boundary import Net


class Model(Net):
    """Both objectives in one forward, as DistributedDataParallel wants it."""

    def __init__(self, boundary):
        super().__init__()
        self.boundary = boundary

    def forward(self, x, target):
        task, shared = self.boundary.split(self.features(x), 2)
        return [self.task(task), self.distill(shared, target)]


def steps(model, boundary, x, target, count=3):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    weights = []
    for _ in range(count):
        optimizer.zero_grad()
        boundary.backward(model(x, target))
        optimizer.step()
        weights.append(boundary.last.weights)
    return torch.stack(weights)


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    return x, torch.randn(4, 6, 8, 8, generator=generator)


def make(name):
    torch.manual_seed(0)
    boundary = FeatureBoundary(build_rule(name, "none", weights=[0.5, 2.0]))
    return Model(boundary), boundary


def worker(rank, folder, name):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, boundary = make(name)
    x, target = data()
    mine = slice(2 * rank, 2 * rank + 2)
    weights = steps(DistributedDataParallel(model), boundary, x[mine], target[mine])
    torch.save([weights, model.state_dict()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["fixed", "min_norm", "protected_min_norm", "anchored"])
def test_two_ranks_equal_one(tmp_path, name):
    mp.spawn(worker, args=(str(tmp_path), name), nprocs=2)
    model, boundary = make(name)
    weights = steps(model, boundary, *data())
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(ranks[0][0], ranks[1][0])
    assert torch.allclose(ranks[0][0], weights, rtol=1e-4)
    for key, value in model.state_dict().items():
        assert torch.equal(ranks[0][1][key], ranks[1][1][key]), key
        assert torch.allclose(ranks[0][1][key], value, atol=1e-5), key
