# Copyright (c) The mokd_det authors.
"""Checkpoints of a run: how they are written, verified and chosen."""

import contextlib
import functools
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import hooks
from detectron2.utils import comm

from ..files import check_whole, replace_file, save_checkpoint
from ..modeling import SafeCheckpointer
from ..untrusted import read_torch
from .identity import RunIdentity
from .launch import on_main_process

logger = logging.getLogger(__name__)

LAST, FINAL = "last_checkpoint", "model_final"
MISSING, EMPTY = "it is missing", "it is empty"  # what is wrong with LAST
_NAME = re.compile(r"model_(\d+|final|best)\.pth").fullmatch
_NUMBERED = re.compile(r"model_(\d+)\.pth").fullmatch
ANOTHER_RUN = "choose another OUTPUT_DIR, or start anew there with --overwrite"


def checkpoints_in(folder: str) -> list[str]:
    """Return the names of a run's checkpoints, sorted; damaged ones, too."""
    return sorted(path.name for path in Path(folder).glob("model_*.pth") if _NAME(path.name))


def find_checkpoint(folder: str) -> str:
    """
    Return the checkpoint to go on from: that which ``last_checkpoint`` names if it is whole, else
    the newest whole one, with a warning that says what is wrong and where the run goes on. Empty:
    the folder has none. ValueError: it has some, but none of them is whole.
    """
    names = checkpoints_in(folder)
    named, problems = _read_last(folder)
    if not names and not named:
        if problems[LAST] not in (MISSING, EMPTY):  # a first save that was killed leaves it empty
            logger.warning(
                f"OUTPUT_DIR '{folder}' has no checkpoint, so nothing is resumed: the run starts "
                f"anew. {_listed(problems)}"
            )
        return ""
    iterations = {}
    for name in {*names, named} - {""}:
        try:
            iterations[name] = _iteration_of(os.path.join(folder, name))
        except ValueError as error:
            problems[name] = str(error)
    # The named one first: it may have been chosen by hand.
    for name in sorted(iterations, key=lambda n: (n == named, iterations[n]), reverse=True):
        path = os.path.join(folder, name)
        try:
            check_whole(path)
        except ValueError as error:
            problems[name] = str(error)
            continue
        if name != named:
            logger.warning(
                f"\n{'!' * 80}\nThe last checkpoint of this run cannot be used. {_listed(problems)}"
                f"\nThe run goes on from {name}, at iteration {iterations[name] + 1}: steps that "
                f"were made after it are made again.\n{'!' * 80}"
            )
        return path
    raise ValueError(
        f"OUTPUT_DIR '{folder}' has no checkpoint that a run can go on from. {_listed(problems)} "
        f"Restore one, {ANOTHER_RUN}."
    )


def _read_last(folder: str) -> tuple[str, dict[str, str]]:
    """Return the name in last_checkpoint, or "" and what is wrong with it."""
    try:
        name = Path(folder, LAST).read_text(errors="replace").strip()
    except FileNotFoundError:
        return "", {LAST: MISSING}
    if not name:
        return "", {LAST: EMPTY}
    if name != os.path.basename(name) or not name.isprintable() or not name.endswith(".pth"):
        # Neither a file of another folder nor one that would run code.
        return "", {LAST: f"it has {name[:80]!r} instead of the name of a .pth file beside it"}
    return name, {}


def _iteration_of(path: str) -> int:
    """Of a checkpoint that a run can go on from, without reading its tensors; else ValueError."""
    try:
        checkpoint = read_torch(path, "it", mmap=True)
    except FileNotFoundError as error:
        raise ValueError("it does not exist") from error
    except Exception as error:  # damaged files fail in many ways
        with contextlib.suppress(OSError):
            check_whole(path)  # says it better
        raise ValueError(f"it cannot be read ({str(error).rstrip('.')})") from error
    trainer = checkpoint.get("trainer") if isinstance(checkpoint, dict) else None
    iteration = trainer.get("iteration") if isinstance(trainer, dict) else None
    if not isinstance(iteration, int):
        raise ValueError("it has weights only, not the state of a run")
    return iteration


def _listed(problems: dict[str, str]) -> str:
    return " ".join(f"{name}: {problem}." for name, problem in sorted(problems.items()))


class RunCheckpointer(SafeCheckpointer):
    """
    Detectron2's checkpointer with files that are whole or not there, and with a check on resume
    that the checkpoint is whole and of this run.

    Attributes:
        last_saved: name of the last checkpoint of this process; "" before.
    """

    def __init__(self, model: torch.nn.Module, save_dir: str, run: RunIdentity, **others: Any):
        """``others``: what is saved besides the model."""
        super().__init__(model, save_dir, run=run, **others)
        self._resumes = False
        self._newest: str | None = None
        self.last_saved = ""

    def save(self, name: str, **kwargs: Any) -> None:
        """Raise OSError, see :func:`mokd_det.files.replace_file`; earlier ones are kept then."""
        if path := self.keep(name, **kwargs):
            self.tag_last_checkpoint(f"{name}.pth")
            self._newest, self.last_saved = path, name

    def keep(self, name: str, **kwargs: Any) -> str:
        """As :meth:`save`, but not as the one to go on from; return its path ("" elsewhere)."""
        if not self.save_dir or not self.save_to_disk:
            return ""
        data = {"model": self.model.state_dict()}
        data |= {key: value.state_dict() for key, value in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        save_checkpoint({**data, **kwargs}, path)
        return path

    def copy(self, name: str, other: str) -> None:
        """Make a checkpoint that was saved the one of another name, too."""
        if self.save_dir and self.save_to_disk:
            source, path = (os.path.join(self.save_dir, f"{n}.pth") for n in (name, other))
            with open(source, "rb") as file:
                replace_file(path, functools.partial(shutil.copyfileobj, file))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, LAST)
        replace_file(path, lambda f: f.write(last_filename_basename.encode()))

    def finish(self) -> None:
        """Make the checkpoint of the last step, which the run was resumed from, the final one."""
        last, final = self.get_checkpoint_file(), os.path.join(self.save_dir, f"{FINAL}.pth")
        if last == final:
            return
        with open(last, "rb") as source:
            replace_file(final, functools.partial(shutil.copyfileobj, source))
        self.tag_last_checkpoint(f"{FINAL}.pth")
        self._newest, self.last_saved = final, FINAL

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """As :func:`find_checkpoint`, which looks once."""
        if self._newest is None:
            self._newest = find_checkpoint(self.save_dir)
        return self._newest

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """
        As Detectron2's, with the same checkpoint on all processes. ValueError: none is whole, not
        every process can read it, or it is of another run.
        """
        if resume:
            self._newest = on_main_process(find_checkpoint, self.save_dir)
        if not resume or not self._newest:
            return self.load(path, checkpointables=[])
        if not all(comm.all_gather(os.path.isfile(self._newest))):
            raise ValueError(
                f"OUTPUT_DIR '{self.save_dir}' has a checkpoint, but not for every process: all "
                "machines need the same folder."
            )
        return self.load(self._newest)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        self._resumes = checkpointables is None
        return super().load(path, checkpointables)

    def _load_model(self, checkpoint):
        if not self._resumes:
            return super()._load_model(checkpoint)
        # First: its messages name options.
        self.checkpointables["run"].load_state_dict(checkpoint.pop("run", {}))
        found = super()._load_model(checkpoint)
        shapes = [name for name, *_ in found.incorrect_shapes]
        names = sorted({*found.missing_keys, *found.unexpected_keys, *shapes})
        if names:
            raise ValueError(
                f"The checkpoint to resume from is of another architecture: {len(names)} weights "
                f"are missing or differ in shape ({', '.join(names[:3])}, ...). Set MODEL as it "
                f"was, {ANOTHER_RUN}."
            )
        return found


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """
    Detectron2's hook that keeps the newest N, also those from before the run was resumed. Later
    steps, of a run that went on from an earlier checkpoint, are not its own yet: they stay.
    """

    def __init__(self, checkpointer: RunCheckpointer, period: int, keep: int):
        """``keep``: N; 0 keeps all. ``model_final.pth`` is always kept."""
        super().__init__(checkpointer, period)
        self.keep = keep

    def before_train(self) -> None:
        super().before_train()
        # Killed between the checkpoint of the last step and its copy under the final name.
        if self.trainer.start_iter == self.trainer.max_iter:
            self.checkpointer.finish()

    def step(self, iteration: int, **kwargs: Any) -> None:
        super().step(iteration, **kwargs)
        if self.keep and (iteration + 1) % self.period == 0:
            folder = self.checkpointer.save_dir
            names = {int(m[1]): m[0] for m in map(_NUMBERED, checkpoints_in(folder)) if m}
            for number in sorted(n for n in names if n <= iteration)[: -self.keep]:
                os.unlink(os.path.join(folder, names[number]))
