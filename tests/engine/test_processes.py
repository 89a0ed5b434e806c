# Copyright (c) The mokd_det authors.
"""Two processes of torchrun, one of which dies or hangs."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ..conftest import DIGIT_OPTS, ROOT

pytestmark = pytest.mark.slow
CONFIG = ["tools/train_net.py", "--config-file", "configs/Digits/student_mokd.yaml"]
OPTS = [*DIGIT_OPTS, "MODEL.DEVICE", "cpu", "SOLVER.CHECKPOINT_PERIOD", 5, "DATASETS.TEST", ()]
LONG = ["SOLVER.MAX_ITER", 100_000]
PATIENCE = 240  # seconds; the machine may be busy


@contextlib.contextmanager
def torchrun(folder, weights, *, flags=(), launcher=(), opts=()):
    """Start training on two processes: (the launcher, function that waits for a checkpoint)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *launcher]
    command += [*CONFIG, *flags, *map(str, [*OPTS, *opts])]
    command += ["MOKD.TEACHER.WEIGHTS", weights, "OUTPUT_DIR", str(folder)]
    said = folder.with_suffix(".txt")
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(said, "w") as output:
        job = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=output, stderr=output)
    try:
        yield job, said
    finally:
        for pid in workers(job):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.kill()
        job.wait()


def workers(job):
    """The processes that train, in the order in which they were started."""
    with contextlib.suppress(FileNotFoundError):
        return [
            int(x) for x in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        ]
    return []


def wait_for(condition, job, said):
    end = time.time() + PATIENCE
    while not condition():
        assert job.poll() is None and time.time() < end, said.read_text()[-4000:]
        time.sleep(0.2)


def hit(job, said, folder, name):
    """Send the second process a signal once there is a checkpoint; return the time."""
    wait_for(lambda: (folder / "last_checkpoint").is_file(), job, said)
    os.kill(workers(job)[1], name)
    return time.time()


def test_a_dead_process_ends_the_job(tmp_path, digits_teacher_weights):
    folder = tmp_path / "run"
    with torchrun(folder, digits_teacher_weights, opts=LONG) as (job, said):
        start = hit(job, said, folder, signal.SIGKILL)
        assert job.wait(PATIENCE) != 0
    assert time.time() - start < 60
    assert "Signal 9 (SIGKILL)" in said.read_text()


def test_a_stopped_process_ends_the_job_after_the_timeout(tmp_path, digits_teacher_weights):
    folder = tmp_path / "run"
    # The launcher gives a process 30 seconds to end, which a stopped one cannot use.
    flags = ["--timeout", "0.2"]
    with torchrun(folder, digits_teacher_weights, flags=flags, opts=LONG) as (job, said):
        start = hit(job, said, folder, signal.SIGSTOP)
        assert job.wait(PATIENCE) != 0
    assert time.time() - start < 12 + 30 + 60
    text = said.read_text()
    assert "has not answered for 0.2 minutes (--timeout)" in text


def test_restarted_by_torchrun_it_goes_on_from_the_last_checkpoint(
    tmp_path, digits_teacher_weights
):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    opts = ["SOLVER.MAX_ITER", 60]
    with torchrun(whole, digits_teacher_weights, opts=opts) as (job, said):
        assert job.wait(PATIENCE) == 0, said.read_text()[-4000:]
    again = {"flags": ["--resume"], "launcher": ["--max-restarts", "1"], "opts": opts}
    with torchrun(folder, digits_teacher_weights, **again) as (job, said):
        hit(job, said, folder, signal.SIGKILL)
        assert job.wait(PATIENCE) == 0, said.read_text()[-4000:]
    text = said.read_text()
    assert text.count("Starting training from iteration") == 2
    models = (
        torch.load(x / "model_final.pth", weights_only=True)["model"] for x in (whole, folder)
    )
    first, second = models
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_restarted_without_resume_it_is_refused(tmp_path, digits_teacher_weights):
    folder = tmp_path / "run"
    launcher = ["--max-restarts", "1"]
    with torchrun(folder, digits_teacher_weights, launcher=launcher, opts=LONG) as (job, said):
        hit(job, said, folder, signal.SIGKILL)
        assert job.wait(PATIENCE) != 0
    assert said.read_text().count("without --resume it would begin anew: add --resume") == 1
