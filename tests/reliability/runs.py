# Copyright (c) The mokd_det authors.
"""Runs of tools/train_net.py in forked processes, which need not import torch again."""

import contextlib
import io
import os
import signal
import sys
import time
import traceback
from unittest import mock

import torch

from mokd_det import files
from mokd_det.commands import train
from mokd_det.engine import BalancedTrainer

from ..conftest import CONFIGS, DIGIT_OPTS, TREE_OPTS

SMALL = ["MOKD.FEATURES.DIM", 32, "INPUT.CLASSIFICATION.SIZE_TRAIN", 32]
STUDENT = "configs/Digits/student_mokd.yaml"


class Runs:
    """
    Attributes:
        folder (Path): of all OUTPUT_DIRs.
        config (str): config file.
        opts (list): overrides.
        logs (Path): where what they print goes.
    """

    def __init__(self, folder, config, opts):
        self.folder, self.config, self.opts, self.logs = folder, config, opts, folder

    def arguments(self, name, *flags):
        opts = [*self.opts, "OUTPUT_DIR", self.folder / name]
        return [*flags, "--config-file", self.config, *map(str, opts)]

    def start(self, name, *flags, prepare=lambda: None):
        """Fork; return the child's id. ``prepare`` is called in the child, before the run."""
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            log = os.open(self.logs / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), write_through=True)
            sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), write_through=True)
            torch.set_num_threads(1)
            prepare()
            with mock.patch.object(sys, "argv", ["train_net.py"]):
                args = train.argument_parser().parse_args(self.arguments(name, *flags))
                train.run(args)
            code = 0
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def run(self, name, *flags, prepare=lambda: None):
        """Start and wait; return the exit code, -9 if it was killed."""
        return code_of(self.start(name, *flags, prepare=prepare))

    def log(self, name):
        return (self.logs / f"{name}.log").read_text()

    def end(self, name):
        """Everything in the last checkpoint but what names the run."""
        path = self.folder / name / "model_final.pth"
        files.check_whole(str(path))
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["run"]
        return checkpoint


def code_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def same(first, second):
    """Whether two nested states are equal, bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(v, second[k]) for k, v in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_write(stage, count):
    """Return what makes a run die in its ``count``-th write (from 1), at a stage of it."""

    def prepare():
        calls = 0

        def counted(function, before=None, after=None):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if before and calls == count:
                    before(*args)
                result = function(*args, **kwargs)
                if after and calls == count:
                    after(*args)
                return result

            return call

        def half(data, file):
            whole = io.BytesIO()
            save(data, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            die()

        save = torch.save
        if stage == "half":
            files.torch.save = counted(save, before=half)
        elif stage == "fsync":
            os.fsync = counted(os.fsync, before=lambda *_: die())
        elif stage == "rename":
            os.replace = counted(os.replace, before=lambda *_: die())
        elif stage == "renamed":
            os.replace = counted(os.replace, after=lambda *_: die())

    return prepare


def signalled(iteration, number):
    """Return what makes a run get a signal within a step."""

    def prepare():
        step = BalancedTrainer.run_step

        def run_step(self):
            if self.iter == iteration:
                os.kill(os.getpid(), number)
            step(self)

        BalancedTrainer.run_step = run_step

    return prepare


def wait_for(path, text, seconds=120):
    """Wait until a file has a text."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            if text in path.read_text():
                return
        time.sleep(0.02)
    raise TimeoutError(f"{path} never had {text!r}")


def digits(folder, teacher, opts=()):
    opts = [*DIGIT_OPTS, *SMALL, "MODEL.DEVICE", "cpu", "MOKD.TEACHER.WEIGHTS", teacher, *opts]
    return Runs(folder, STUDENT, ["DATASETS.TEST", "()", *opts])


def trees(folder, teacher, config, opts=()):
    taught = ["MOKD.ENABLED", True, "MOKD.TEACHER.CONFIG_FILE", CONFIGS["teacher"]]
    taught += ["MOKD.TEACHER.WEIGHTS", teacher, "MODEL.DEVICE", "cpu"]
    return Runs(folder, CONFIGS[config], [*TREE_OPTS, "DATASETS.TEST", "()", *taught, *opts])
