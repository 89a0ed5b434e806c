# Copyright (c) The mokd_det authors.
"""Files that were damaged are found, and full disks do not damage any."""

import os
import random
import shutil
import subprocess

import pytest

from mokd_det.engine import find_checkpoint

from .runs import digits, same

OPTS = ["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_teacher_weights):
    runs = digits(tmp_path_factory.mktemp("trained"), digits_teacher_weights, OPTS)
    assert runs.run("whole") == 0, runs.log("whole")
    return runs


def flip(content, draw):
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def cut(content, draw):
    del content[draw.randrange(len(content)) :]


def zeros(content, draw):
    """A block that never reached the disk."""
    start = draw.randrange(len(content) - 4096)
    content[start : start + 4096] = bytes(4096)


def swap(content, draw):
    a, b = sorted(draw.sample(range(0, len(content) - 4096, 4096), 2))
    content[a : a + 4096], content[b : b + 4096] = content[b : b + 4096], content[a : a + 4096]


def longer(content, draw):
    content += bytes(draw.randrange(1, 5000))


def empty(content, draw):
    content.clear()


def other(content, draw):
    content[:] = b"<html>404</html>" * draw.randrange(1, 100)


@pytest.mark.parametrize(
    "damage, times",
    [(flip, 80), (cut, 30), (zeros, 20), (swap, 20), (longer, 10), (empty, 1), (other, 5)],
)
def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path, trained, count, damage, times):
    folder = tmp_path / "run"
    shutil.copytree(trained.folder / "whole", folder)
    (folder / "model_0000003.pth").unlink()
    path = folder / "model_final.pth"
    whole = path.read_bytes()
    for seed in range(times):
        content = bytearray(whole)
        damage(content, random.Random(seed))
        if content == whole:  # equal blocks were swapped
            continue
        path.write_bytes(content)
        found = find_checkpoint(str(folder))
        count("corruption", found.endswith("model_0000001.pth"), f"seed {seed}: {found}")


@pytest.mark.parametrize("damage", [flip, cut, empty])
def test_the_run_goes_on_from_the_one_before(trained, count, damage):
    name = f"run_{damage.__name__}"
    shutil.copytree(trained.folder / "whole", trained.folder / name)
    for file in ("model_final.pth", "model_0000003.pth"):
        path = trained.folder / name / file
        content = bytearray(path.read_bytes())
        damage(content, random.Random(0))
        path.write_bytes(content)
    assert trained.run(name, "--resume") == 0, trained.log(name)
    assert "goes on from model_0000001.pth, at iteration 2" in trained.log(name)
    count("resume", same(trained.end(name), trained.end("whole")))


@pytest.mark.parametrize("megabytes", [1, 4, 5, 7, 8, 11])
def test_full_disks(tmp_path, digits_teacher_weights, trained, count, megabytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        runs = digits(disk, digits_teacher_weights, [*OPTS, "SOLVER.CHECKPOINT_PERIOD", 1])
        runs.logs = tmp_path
        code = runs.run("run")
        log = runs.log("run")
        one = code == 1 and "Traceback" not in log
        sentence = [line for line in log.splitlines() if "could not be written" in line]
        whole = megabytes < 4 or find_checkpoint(str(disk / "run"))
        count("full disk", one and len(sentence) == 1 and whole, log[-4000:])
        subprocess.run(["mount", "-o", "remount,size=90m", str(disk)], check=True)
        assert runs.run("run", "--resume") == 0, runs.log("run")[-3000:]
        count("resume", same(runs.end("run"), trained.end("whole")))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
