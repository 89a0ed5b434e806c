# Copyright (c) The mokd_det authors.
"""Signals, disks that are full and folders that are gone."""

import errno
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from detectron2.utils.env import seed_all_rng

from mokd_det.engine import build_trainer

from .test_checkpoints import DIGITS, assert_same_end, train

QUIET = [*DIGITS, "SOLVER.CHECKPOINT_PERIOD", 100]


def stopped(cfg, send, code, resume=False):
    """Train until ``send(trainer)``, called within each step, has stopped the run with a code."""
    seed_all_rng(cfg.SEED)
    trainer = build_trainer(cfg)
    trainer.resume_or_load(resume)
    step = trainer._trainer.run_step

    def run_step():
        send(trainer)
        step()

    trainer._trainer.run_step = run_step
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == code
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    return trainer


def at(iteration, number):
    def send(trainer):
        if trainer.iter == iteration:
            os.kill(os.getpid(), number)

    return send


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGINT", 130)])
def test_a_signal_saves_after_the_step_and_stops(make_digits_cfg, caplog, capfd, name, code):
    cfg = make_digits_cfg(QUIET, "stopped")
    stopped(cfg, at(1, getattr(signal, name)), code)
    assert f"{name}: the run stops after this step" in capfd.readouterr().err
    assert f"Stopped by {name} after iteration 1, which is saved. To go on: the sa" in caplog.text
    assert [p.name for p in Path(cfg.OUTPUT_DIR).glob("*.pth")] == ["model_0000001.pth"]
    stopped(cfg, at(4, getattr(signal, name)), code, resume=True)  # in the last step
    whole = make_digits_cfg(QUIET, "whole")
    train(whole)
    assert_same_end(whole, cfg)
    lines = Path(cfg.OUTPUT_DIR, "balance.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 4]  # nothing unwritten is lost


def test_a_signal_during_evaluation_stops_it(make_digits_cfg):
    opts = ["DATASETS.TEST", ("tests_digits_val",), "TEST.EVAL_PERIOD", 2]
    cfg = make_digits_cfg([*QUIET, *opts], "stopped")
    evaluations = []

    def send(trainer):
        def test(*args):
            evaluations.append(trainer.iter)
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("it went on")

        trainer.test = test

    stopped(cfg, send, 143)
    assert evaluations == [1]
    assert Path(cfg.OUTPUT_DIR, "last_checkpoint").read_text() == "model_0000001.pth"
    cfg.TEST.EVAL_PERIOD = 0
    stopped(cfg, send, 143, resume=True)  # in the evaluation at the end
    assert evaluations == [1, 5]
    whole = make_digits_cfg(QUIET, "whole")
    train(whole)
    assert_same_end(whole, cfg)
    # What is left to do is to evaluate.
    assert train(cfg, resume=True)._last_eval_results["classification"]["images"] == 40


def test_an_error_in_a_step_saves_nothing(make_digits_cfg):
    cfg = make_digits_cfg(QUIET)
    trainer = build_trainer(cfg)

    def run_step():
        os.kill(os.getpid(), signal.SIGTERM)
        raise FloatingPointError

    trainer._trainer.run_step = run_step
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert not list(Path(cfg.OUTPUT_DIR).glob("*.pth"))


# TensorBoard's thread, if the folder is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "break_it, message",
    [
        ("full", "'.*model_0000002.pth' could not be written .No space left on device.*--resume"),
        ("gone", "'.*stopped/.*' could not be written .No such file or directory"),
    ],
)
def test_a_folder_that_fails_stops_the_run_with_one_sentence(
    make_digits_cfg, monkeypatch, caplog, break_it, message
):
    cfg = make_digits_cfg(DIGITS, "stopped")
    seed_all_rng(cfg.SEED)
    trainer = build_trainer(cfg)
    replace = os.replace

    def full(source, target):
        if "model_0000002" in target:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    step = trainer._trainer.run_step

    def run_step():
        step()
        if trainer.iter == 2 and break_it == "gone":
            shutil.rmtree(cfg.OUTPUT_DIR)

    trainer._trainer.run_step = run_step
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=message):
        if break_it == "full":
            patch.setattr(os, "replace", full)
        trainer.train()
    assert "Traceback" not in caplog.text and "Exception during training" not in caplog.text
    if break_it == "full":
        assert not list(Path(cfg.OUTPUT_DIR).glob("*.tmp"))
        whole = make_digits_cfg(DIGITS, "whole")
        train(whole)
        assert train(cfg, resume=True).start_iter == 2
        assert_same_end(whole, cfg)


def test_workers_leave_signals_to_the_run(make_digits_cfg):
    cfg = make_digits_cfg([*QUIET, "DATALOADER.NUM_WORKERS", 1], "stopped")
    sent = []

    def send(trainer):
        if trainer.iter == 1:
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            for child in map(int, children):
                if b"multiprocessing" not in Path(f"/proc/{child}/cmdline").read_bytes():
                    sent.append(child)
                    for name in ("TERM", "INT", "USR1"):  # from others: it obeys its parent
                        subprocess.run(["kill", f"-{name}", str(child)], check=True)
            os.kill(os.getpid(), signal.SIGTERM)

    stopped(cfg, send, 143)
    assert len(sent) == 1
    assert torch.load(f"{cfg.OUTPUT_DIR}/model_0000001.pth", weights_only=True)["iteration"] == 1
