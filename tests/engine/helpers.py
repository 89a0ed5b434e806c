# Copyright (c) The mokd_det authors.
"""Runs that stop, and runs on two processes."""

import mokd_det.compat  # noqa: F401  (first: the other processes have no conftest)
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from mokd_det.engine import BalancedTrainer, DistillationTrainer, build_trainer
from mokd_det.engine.trainer import wrap_distributed


class Constant:
    """A data loader that has one batch."""

    seed = 0

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        while True:
            yield self.batch


class Stopped(Exception):
    pass


def train(cfg, resume=False):
    """Train a run of ``cfg``, or go on with it, to its end; the trainer."""
    seed_all_rng(cfg.SEED)
    trainer = build_trainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def train_and_stop(cfg, iterations):
    """Train from the start and stop between two steps, as a machine that is switched off."""
    seed_all_rng(cfg.SEED)
    trainer = build_trainer(cfg)
    step = trainer._trainer.run_step

    def run_step():
        if trainer.iter == iterations:
            raise Stopped
        step()

    trainer._trainer.run_step = run_step
    with pytest.raises(Stopped):
        trainer.train()


def balanced_steps(cfg, batch, count=3):
    """Return (weights of the steps, model) of balanced steps on one batch (this rank's part)."""
    model = DistillationTrainer.build_model(cfg)
    optimizer = DistillationTrainer.build_optimizer(cfg, model)
    trainer = BalancedTrainer(wrap_distributed(model), Constant(batch), optimizer, 0)
    decided = []
    with EventStorage(0):
        for trainer.iter in range(count):
            trainer.run_step()
            decided.append(trainer.boundary.last.weights)
    return torch.stack(decided), model


def on_two_ranks(function, folder, *args):
    """
    Call ``function(rank, *args)`` in two processes that form a group.

    Args:
        function (callable): of a module's top level.
        folder (Path): for what they return.

    Returns:
        list: what each returned.
    """
    mp.spawn(_rank, args=(function, str(folder), args), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _rank(rank, function, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(2)
    else:
        comm._LOCAL_PROCESS_GROUP = dist.new_group([0, 1])
    torch.save(function(rank, *args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
