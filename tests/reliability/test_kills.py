# Copyright (c) The mokd_det authors.
"""Runs that are killed again and again end as the one that was not, bit for bit."""

import os
import random
import signal
import time

import pytest

from .runs import code_of, digits, killed_in_write, same, wait_for

OPTS = ["SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 1]
KEEP = ["SOLVER.KEEP_CHECKPOINTS", 2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits_teacher_weights):
    runs = digits(tmp_path_factory.mktemp("whole"), digits_teacher_weights, OPTS)
    assert runs.run("whole") == 0, runs.log("whole")
    return runs.end("whole")


# A checkpoint is two files, each written, synced (and its folder), renamed: odd calls are of the
# checkpoint, even ones of last_checkpoint.
@pytest.mark.parametrize("extra", [[], KEEP], ids=["keep all", "keep 2"])
@pytest.mark.parametrize(
    "stage, counts",
    [
        ("half", (1, 2, 1, 3)),
        ("fsync", (1, 2, 3, 4, 5)),
        ("rename", (1, 2, 3, 4)),
        ("renamed", (1, 2, 3, 4)),
    ],
)
def test_kills_during_a_write(tmp_path, digits_teacher_weights, whole, count, stage, counts, extra):
    runs = digits(tmp_path, digits_teacher_weights, [*OPTS, *extra])
    for number, call in enumerate(counts):
        flags = ["--resume"] if number else []
        assert runs.run("run", *flags, prepare=killed_in_write(stage, call)) == -9, runs.log("run")
    code = runs.run("run", "--resume")
    survived = code == 0 and same(runs.end("run"), whole)
    for _ in counts:
        count("kill in a write", survived, runs.log("run")[-3000:])
        count("kill", survived)


@pytest.mark.parametrize("seed", range(5))
def test_kills_at_random_times(tmp_path, digits_teacher_weights, whole, count, seed):
    runs = digits(tmp_path, digits_teacher_weights, OPTS)
    pause = random.Random(seed)
    kills = 0
    for number in range(6):
        pid = runs.start("run", *(["--resume"] if number else []))
        wait_for(tmp_path / "run.log", "Starting training", 120) if not number else time.sleep(1)
        time.sleep(pause.uniform(0, 1.2))
        os.kill(pid, signal.SIGKILL)
        kills += code_of(pid) == -9
    assert kills, "every run ended before it was killed"
    code = runs.run("run", "--resume")
    survived = code == 0 and same(runs.end("run"), whole)
    for _ in range(kills):
        count("kill", survived, runs.log("run")[-3000:])


@pytest.mark.parametrize("call", [1, 2])
def test_a_finished_run_that_is_extended_and_killed_while_its_end_is_written(
    tmp_path, digits_teacher_weights, count, call
):
    opts = ["SOLVER.CHECKPOINT_PERIOD", 100, "SOLVER.MAX_ITER"]
    whole = digits(tmp_path, digits_teacher_weights, [*opts, 3])
    assert whole.run("run") == 0
    first = whole.end("run")
    longer = digits(tmp_path, digits_teacher_weights, [*opts, 5])
    assert longer.run("run", "--resume", prepare=killed_in_write("half", 1)) == -9
    kept = same(whole.end("run"), first)
    code = longer.run("run", "--resume")
    held = kept and code == 0 and longer.end("run")["iteration"] == 4
    count("kill in a write", held, longer.log("run")[-3000:])
    count("kill", held)
