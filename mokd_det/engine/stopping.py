# Copyright (c) The mokd_det authors.
"""A run that is told to stop saves what it has and says how to go on."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from .checkpoints import FINAL

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopOnSignal(HookBase):
    """
    On SIGTERM, SIGUSR1 and SIGINT (Ctrl-C): save a checkpoint at the end of the running step, at
    once if it is evaluation that runs, and end the program with exit code 128 + number of the
    signal. A second SIGINT ends it at once. Several processes stop after the same step, whichever
    of them got the signal.

    It belongs behind the hook that saves checkpoints and before the one that evaluates.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._done = -1  # the last step that is complete, with all that belongs to it
        self._ended = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, the signals are handled (in the main thread; Python allows no other)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def after_step(self) -> None:
        if comm.get_world_size() > 1:
            # 0.2 ms for two processes of a machine; comm.all_gather takes several times as long.
            found = torch.tensor(self._signal)
            dist.all_reduce(found, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
            self._signal = int(found)
        self._done = self.trainer.iter
        if self._signal:
            self._save()
            comm.synchronize()  # until it is saved no process ends
            self._stop()

    def after_train(self) -> None:
        self._ended = True
        if self._signal and self.trainer.iter == self.trainer.max_iter:
            self._stop()  # it came behind the last step

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # The next one is the kernel's, whatever Python waits for. torchrun passes on the one
            # that the terminal has sent to all processes already.
            passed_on = "TORCHELASTIC_RUN_ID" in os.environ
            signal.signal(number, signal.SIG_IGN if passed_on else signal.SIG_DFL)
        if self._signal:
            return
        self._signal = number
        waits = not self._ended and self.trainer.iter != self._done
        if comm.is_main_process():
            # Neither print nor a logger may be entered twice.
            how = "after this step" if waits else "now"
            again = "; Ctrl-C again: at once" if number == signal.SIGINT else ""
            os.write(2, f"\n{_name(number)}: the run stops {how}{again}.\n".encode())
        if not waits:
            self._save()
            self._stop()

    def _save(self) -> None:
        checkpointer, name = self.trainer.checkpointer, f"model_{self._done:07d}"
        # Not in the middle of a step, and not again.
        if self.trainer.iter == self._done and checkpointer.last_saved not in (name, FINAL):
            checkpointer.save(name, iteration=self._done)

    def _stop(self) -> NoReturn:
        logger.warning(
            f"Stopped by {_name(self._signal)} after iteration {self._done}, which is saved. To go "
            "on: the same command with --resume."
        )
        # One of them would evaluate behind the last step.
        kept = [hook for hook in self.trainer._hooks if not isinstance(hook, hooks.EvalHook)]
        self.trainer._hooks[:] = kept
        raise SystemExit(128 + self._signal)


def _name(number: int) -> str:
    return signal.Signals(number).name
