# Copyright (c) The mokd_det authors.
"""Runs that are stopped by a signal and resumed end as the one that was not, bit for bit."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ..conftest import ROOT
from .runs import digits, same, signalled, trees, wait_for

OPTS = ["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 100]
BF16 = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"]
FP16 = ["SOLVER.AMP.ENABLED", True]
RULE = "MOKD.BALANCING.RULE"
CLASSIFIER = {
    **{rule: [RULE, rule] for rule in ("loss_ratio", "fixed", "cosine_gate", "min_norm", "famo")},
    "torchjd.UPGrad": [RULE, "torchjd.UPGrad"],
    "bfloat16": BF16,
    "float16": FP16,
    "EMA": ["SOLVER.EMA_DECAY", 0.9],
    "micro-batches": ["SOLVER.MICRO_BATCHES", 2],
    "at parameters": ["MOKD.BALANCING.MEASURE_AT", "parameters"],
    "2 workers": ["DATALOADER.NUM_WORKERS", 2],
    "4 workers": ["DATALOADER.NUM_WORKERS", 4],
    "AdamW": ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 0.001],
    "no teacher": ["MOKD.ENABLED", False],
    "all": [RULE, "famo", *BF16, "SOLVER.EMA_DECAY", 0.9, "DATALOADER.NUM_WORKERS", 2],
}
DETECTOR = {
    "R-CNN": ("mokd", []),
    "R-CNN, EMA, micro-batches": ("mokd", ["SOLVER.EMA_DECAY", 0.9, "SOLVER.MICRO_BATCHES", 2]),
    "R-CNN, outputs": ("mokd", ["MOKD.OBJECTIVES", ["features", "outputs"]]),
    "R-CNN, bfloat16, 2 workers": ("mokd", [*BF16, "DATALOADER.NUM_WORKERS", 2]),
    "R-CNN, float16, famo": ("mokd", [*FP16, RULE, "famo"]),
    "R-CNN, no teacher": ("mokd", ["MOKD.ENABLED", False, "DATALOADER.RESUMABLE", True]),
    "RetinaNet": ("retinanet", []),
    "RetinaNet, EMA, outputs": (
        "retinanet",
        ["SOLVER.EMA_DECAY", 0.9, "MOKD.OBJECTIVES", ["features", "outputs"]],
    ),
}


def check(runs, count, number=signal.SIGTERM):
    assert runs.run("whole") == 0, runs.log("whole")[-3000:]
    stopped = runs.run("run", prepare=signalled(1, number)) == 128 + number
    saved = (runs.folder / "run/last_checkpoint").read_text() == "model_0000001.pth"
    count("stop", stopped and saved, runs.log("run")[-3000:])
    code = runs.run("run", "--resume")
    count("resume", code == 0 and same(runs.end("run"), runs.end("whole")), runs.log("run")[-3000:])


@pytest.mark.parametrize("name", CLASSIFIER)
def test_classifiers(tmp_path, digits_teacher_weights, count, name):
    check(digits(tmp_path, digits_teacher_weights, [*OPTS, *CLASSIFIER[name]]), count)


@pytest.mark.parametrize("name", DETECTOR)
def test_detectors(tmp_path, teacher_weights, count, name):
    config, opts = DETECTOR[name]
    check(trees(tmp_path, teacher_weights, config, [*OPTS, *opts]), count, signal.SIGUSR1)


def command(runs, name, *flags, ranks=1):
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(runs.folder / f"{name}.log", "a") as log:
        return subprocess.Popen(
            [*launcher, "tools/train_net.py", *runs.arguments(name, *flags)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop(runs, name, send, ranks=1):
    """
    Start a run, send it a signal during its steps; return (exit code, seconds until it was saved
    and said so). On a busy machine Python's own end takes seconds more.
    """
    process = command(runs, name, ranks=ranks)
    wait_for(runs.folder / name / "metrics.json", "iteration")
    start = time.monotonic()
    send(process.pid)
    wait_for(runs.folder / name / "log.txt", "To go on: the same command with --resume")
    seconds = time.monotonic() - start
    return process.wait(120), seconds


LONG = ["SOLVER.MAX_ITER", 60, "SOLVER.CHECKPOINT_PERIOD", 1000, "MODEL.CLASSIFIER.NAME"]
LONG += ["squeezenet1_1", "MODEL.CLASSIFIER.OPTIONS", "{dropout: 0.0}", "SOLVER.BASE_LR", 0.005]


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_stops_within_five_seconds(tmp_path, digits_teacher_weights, count, workers):
    runs = digits(tmp_path, digits_teacher_weights, [*LONG, "DATALOADER.NUM_WORKERS", workers])
    # As a terminal: to all processes of the group.
    code, seconds = stop(runs, "run", lambda pid: os.killpg(pid, signal.SIGINT))
    count(
        "stop", code == 130 and seconds < 5, f"{code}, {seconds:.1f} s: {runs.log('run')[-2000:]}"
    )
    assert command(runs, "run", "--resume").wait(300) == 0, runs.log("run")[-2000:]
    assert command(runs, "whole").wait(300) == 0
    count("resume", same(runs.end("run"), runs.end("whole")))


@pytest.mark.parametrize(
    "send",
    [
        lambda pid: os.kill(pid, signal.SIGTERM),
        lambda pid: os.killpg(pid, signal.SIGTERM),
        lambda pid: os.killpg(pid, signal.SIGINT),
    ],
    ids=["SIGTERM to torchrun", "SIGTERM to all", "Ctrl-C"],
)
def test_two_ranks(tmp_path, digits_teacher_weights, count, send):
    runs = digits(tmp_path, digits_teacher_weights, LONG)
    code, seconds = stop(runs, "run", send, ranks=2)
    log = runs.log("run")
    count("stop", code != 0 and seconds < 5, f"{code}, {seconds:.1f} s: {log[-3000:]}")
    assert command(runs, "run", "--resume", ranks=2).wait(300) == 0, runs.log("run")[-2000:]
    assert "Starting training from iteration 0" not in runs.log("run").split("To go on")[-1]
    assert command(runs, "whole", ranks=2).wait(300) == 0
    count("resume", same(runs.end("run"), runs.end("whole")))
