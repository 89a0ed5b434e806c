# Copyright (c) The mokd_det authors.
"""OUTPUT_DIR belongs to one run: one at a time, and a new one does not mix with an old one."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..files import TEMPORARY
from ..tasks import task_of
from .checkpoints import LAST, checkpoints_in
from .launch import on_main_process
from .tracking import EVENTS
from .tracking import FILES as TRACKING_FILES

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
LOCK = ".lock"
APPENDED = ("metrics.json", "balance.json")
CONFIG, OPTIONS = "config.yaml", "options.yaml"  # the latter of Python configs
# What a run appends to, or would leave behind if it stopped before it is written again.
LOGS = (*APPENDED, OPTIONS, "results.json", EVENTS, *TRACKING_FILES)
# What a run writes before its first step.
STARTED = (LOCK, CONFIG, "log.txt*", *LOGS)
_locks: dict[str, IO[str]] = {}


class FolderBefore:
    """What was in a folder before a run began to write there."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self._files = self._of_a_start()
        config = self.folder / CONFIG
        self._config = config.read_bytes() if config.is_file() else None

    def _of_a_start(self) -> set[Path]:
        return {path for pattern in STARTED for path in self.folder.glob(pattern)}

    @contextlib.contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """
        Within it a run is made ready. An error takes back what it wrote: a failed start leaves no
        files, and an earlier run's config as it was. To be entered by all processes.
        """
        try:
            yield
        except BaseException:
            if comm.is_main_process():
                self._restore()
            raise

    def keep_config(self) -> None:
        """Write the config that was there again, for an evaluation is not the folder's run."""
        if self._config is not None and comm.is_main_process():
            (self.folder / CONFIG).write_bytes(self._config)

    def _restore(self) -> None:
        with contextlib.suppress(OSError):  # the error that is on its way says more
            try:
                _lock(str(self.folder))
            except ValueError:
                return  # a run is at work there: what is new may be its own
            release_folder(str(self.folder))
            for path in self._of_a_start() - self._files:
                path.unlink()
            self.keep_config()
            for path in self._made:
                path.rmdir()


def claim_folder(cfg: CfgNode, resume: bool, overwrite: bool = False) -> None:
    """
    Make ``OUTPUT_DIR`` this run's own until its main process ends, or :func:`release_folder`. To be
    called by all processes.

    ValueError: another process trains there, it has checkpoints of an earlier run (unless one of
    the two flags is set) or, with ``overwrite``, which :func:`replacing_run` follows, some that the
    new run needs, or it cannot be written.
    """
    on_main_process(_claim, cfg, resume, overwrite)


def _claim(cfg: CfgNode, resume: bool, overwrite: bool) -> None:
    folder = cfg.OUTPUT_DIR
    try:
        os.makedirs(folder, exist_ok=True)
        _lock(folder)
        names = checkpoints_in(folder)
        if overwrite and not resume:
            _check_not_needed(cfg, [Path(folder, name) for name in names])
        elif names and not resume:
            raise ValueError(
                f"OUTPUT_DIR '{folder}' has checkpoints of an earlier run ({', '.join(names[:3])}"
                f"{', ...' if names[3:] else ''}): go on with it by --resume, choose another "
                "OUTPUT_DIR, or remove them and start anew by --overwrite."
            )
        for path in Path(folder).glob(f"*{TEMPORARY}"):  # of runs that were killed
            path.unlink()
    except OSError as error:
        raise ValueError(
            f"OUTPUT_DIR '{folder}' cannot be written ({error.strerror}): expected a folder of "
            "this machine in which a run can keep its files."
        ) from error


def _lock(folder: str) -> None:
    """
    Lock the folder for this process; its end, whatever ends it, unlocks it. A lock of POSIX's kind:
    workers of a loader, which may live on for seconds, do not inherit it.
    """
    path = os.path.realpath(os.path.join(folder, LOCK))
    if path in _locks:
        return
    file = open(path, "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            file.close()
            logger.warning(
                f"OUTPUT_DIR '{folder}' cannot be locked ({error.strerror}): see to it that no "
                "second run uses it."
            )
            return
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ValueError(
            f"OUTPUT_DIR '{folder}' is in use by another run ({holder}): wait for its end, stop "
            "it, or choose another OUTPUT_DIR."
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _locks[path] = file


def release_folder(folder: str) -> None:
    """Let other processes train in a folder; this one may claim it again."""
    if file := _locks.pop(os.path.realpath(os.path.join(folder, LOCK)), None):
        file.close()


def _check_not_needed(cfg: CfgNode, old: list[Path]) -> None:
    configs = [cfg]
    if cfg.MOKD.ENABLED and not cfg.MOKD.TEACHER.TORCHSCRIPT.FILE:
        configs.append(task_of(cfg).teacher_config(cfg))
    # Whatever option names them.
    needed = {os.path.realpath(os.path.expanduser(text)) for text in _texts(configs)}
    if used := [path for path in old if os.path.realpath(path) in needed]:
        raise ValueError(
            f"--overwrite would remove '{used[0]}', which the new run starts from or is taught by: "
            "move it, or choose another OUTPUT_DIR."
        )


def _texts(value: Any) -> Iterator[str]:
    """Yield every str in nested dicts, lists and tuples."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


@contextlib.contextmanager
def replacing_run(folder: str, overwrite: bool) -> Iterator[None]:
    """
    Within it a new run is made ready for its first step. At the end ``overwrite`` removes the
    checkpoints and logs that were there before; after an error they still are. To be entered by all
    processes.
    """
    old = on_main_process(_files_of_run, folder) if overwrite else []
    yield
    if overwrite:
        on_main_process(_remove, folder, old)


def _files_of_run(folder: str) -> list[Path]:
    logs = [path for pattern in LOGS for path in Path(folder).glob(pattern)]
    return [*(Path(folder, name) for name in [*checkpoints_in(folder), LAST]), *logs]


def _remove(folder: str, files: list[Path]) -> None:
    names = ", ".join(path.name for path in files if path.suffix == ".pth")
    if names:
        logger.warning(f"Removing the earlier run in {folder}: {names}")
    for path in files:
        if path.name in APPENDED:
            os.truncate(path, 0)  # the new run's writer has it open
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def output_errors(folder: str) -> Iterator[None]:
    """
    Within it, an OSError because the folder is gone, full or cannot be written ends the program
    with one sentence, exit code 1. A file that is missing in a folder that is not was to be read.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (*FULL, errno.EROFS, errno.EFBIG, errno.EIO)
        path = os.fsdecode(error.filename) if error.filename else folder
        inside = os.path.abspath(path).startswith(os.path.abspath(folder) + os.sep)
        was_read = isinstance(error, FileNotFoundError) and os.path.isdir(folder)
        if was_read or not (full or inside):
            raise
        remedy = "make room there" if error.errno in FULL else "solve that"
        raise SystemExit(
            f"The run stopped since '{path}' could not be written "
            f"({error.strerror}). Checkpoints from before are whole: {remedy} and go on with "
            "--resume."
        ) from error
