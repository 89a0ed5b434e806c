# Copyright (c) The mokd_det authors.
"""A resumed RetinaNet is the uninterrupted one, each part of a run in a process of its own."""

import multiprocessing
import os
import types
from pathlib import Path

import mokd_det.compat  # noqa: F401  (first: the other processes have no conftest)
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling.meta_arch import fcos, retinanet
from detectron2.utils.env import seed_all_rng
from fvcore.nn import sigmoid_focal_loss

from mokd_det.config import load_config
from mokd_det.engine import build_trainer

from .test_step import BF16, FAMO, PARAMETERS, build
from .test_trainer import assert_equal_states

STEPS = 5


class Death(HookBase):
    """After the checkpoint's hook, and without a word."""

    def __init__(self, iteration):
        self.iteration = iteration

    def after_step(self):
        if self.trainer.iter == self.iteration:
            os._exit(9)


def run(config_file, resume, last):
    torch.set_num_threads(1)
    cfg = load_config(config_file)
    seed_all_rng(cfg.SEED)
    trainer = build_trainer(cfg)
    trainer.resume_or_load(resume)
    assert (trainer.start_iter > 0) == resume
    if last is not None:
        trainer.register_hooks([Death(last)])
    trainer.train()


def in_new_process(*args):
    process = multiprocessing.get_context("spawn").Process(target=run, args=args)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed, stop, opts",
    [
        (1, 1, []),
        (2, 2, ["MOKD.OBJECTIVES", ["features", "outputs"]]),
        (3, 3, FAMO),
        (4, 1, [*PARAMETERS, "MOKD.BALANCING.RULE", "min_norm"]),
        (5, 2, BF16),
        (6, 1, ["SOLVER.MICRO_BATCHES", 2, "SOLVER.EMA_DECAY", 0.9, "DATALOADER.NUM_WORKERS", 2]),
        (7, 1, ["MOKD.ENABLED", False, "DATALOADER.RESUMABLE", True]),
        (8, 4, ["MOKD.ENABLED", False, "DATALOADER.RESUMABLE", True]),
    ],
)
def test_a_resumed_retinanet_is_the_uninterrupted_one(make_cfg, seed, stop, opts):
    opts = ["MOKD.ENABLED", True, "SEED", seed, "SOLVER.MAX_ITER", STEPS, *opts]
    states = []
    for name in ("whole", "stopped"):
        cfg = make_cfg("retinanet", [*opts, "SOLVER.CHECKPOINT_PERIOD", stop], name)
        config = Path(cfg.OUTPUT_DIR) / "run.yaml"
        config.write_text(cfg.dump())
        if name == "stopped":
            assert in_new_process(str(config), False, stop) == 9
        assert in_new_process(str(config), name == "stopped", None) == 0
        path = f"{cfg.OUTPUT_DIR}/model_final.pth"
        states.append(torch.load(path, weights_only=True))
    whole, resumed = states
    for entry in whole.keys() - {"trainer", "iteration", "run"}:
        assert_equal_states(whole[entry], resumed[entry])
    momentum = [x["trainer"]["_trainer"]["optimizer"]["state"] for x in states]
    for key, state in momentum[0].items():
        assert torch.equal(state["momentum_buffer"], momentum[1][key]["momentum_buffer"])


def in_new_state(function):
    """Return a copy of it, compiled as at the start of a process."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, argdefs=function.__defaults__
    )
    copy.__annotations__ = function.__annotations__
    return torch.jit.script(copy)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("module", [retinanet, fcos])
def test_the_focal_loss_of_a_step_never_changes(make_cfg, module):
    """It is the plain function's, whatever ran before; of Detectron2's own step nothing changes."""
    trainer = build(make_cfg("faster_rcnn", ["DATALOADER.RESUMABLE", True]))._trainer
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2000, 20, generator=generator)
    targets = (torch.rand(2000, 20, generator=generator) < 0.1).float()

    def gradient(function):
        inputs = logits.clone().requires_grad_()
        loss = function(inputs, targets, alpha=0.25, gamma=2.0, reduction="sum")
        (loss / 17.3).backward()
        return inputs.grad

    plain = gradient(sigmoid_focal_loss)
    compiled = in_new_state(sigmoid_focal_loss)
    module.sigmoid_focal_loss_jit, stock = compiled, module.sigmoid_focal_loss_jit
    try:
        for _ in range(3):
            with trainer.forward_context():
                assert torch.equal(gradient(module.sigmoid_focal_loss_jit), plain)
            assert module.sigmoid_focal_loss_jit is compiled
            changed = not torch.equal(gradient(compiled), plain)
        assert changed
        with pytest.raises(KeyError), trainer.forward_context():
            raise KeyError
        assert module.sigmoid_focal_loss_jit is compiled
    finally:
        module.sigmoid_focal_loss_jit = stock
