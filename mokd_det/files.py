# Copyright (c) The mokd_det authors.
"""
Files that are whole or not there: written beside their place, then renamed into it. Checkpoints
carry their checksum inside: torch writes zip archives, and the SHA-256 of all that comes before is
the archive's comment. Every reader of such files ignores it, and it is copied with them.
"""

import contextlib
import hashlib
import os
import struct
import uuid
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any

import torch

TEMPORARY = ".mokd_det.tmp"  # ends the names of what is being written
_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64
_END = 22  # bytes of a zip archive's last record, with an empty comment


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Within it a file is written. An OSError names it: those of full disks name none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, path) from error


def replace_file(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """
    Call ``write`` with a new file that then takes the place of ``path``. A stop at any time leaves
    the old content or the new one. OSError, which names ``path``: the disk is full, or the folder
    is gone or cannot be written; the old content is kept. Several processes may write it at once.
    """
    temporary = f"{path}.{uuid.uuid4().hex}{TEMPORARY}"
    try:
        with open(temporary, "w+b") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        _sync_folder(os.path.dirname(path) or ".")
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        # torch's writer reports a failed write as a RuntimeError of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, path) from error
        raise


def _sync_folder(folder: str) -> None:
    """The new name itself is on the disk only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(data: dict[str, Any], path: str) -> None:
    """As ``torch.save``, by :func:`replace_file`, and with a checksum for :func:`check_whole`."""

    def write(f):
        torch.save(data, f)
        # The last two bytes are the length of the comment.
        end = f.seek(-2, os.SEEK_END)
        comment = _MARK + _sha256(f, end).encode()
        f.seek(end)
        f.write(struct.pack("<H", len(comment)) + comment)

    replace_file(path, write)


def check_seal(path: str) -> bool:
    """
    Return whether a file has the checksum of :func:`save_checkpoint`. ValueError: it has, and any
    byte was changed since. FileNotFoundError.
    """
    with open(path, "rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(size - _COMMENT - 2, 0))
        tail = f.read()
        if tail[:-64] != struct.pack("<H", _COMMENT) + _MARK:
            return False
        if _sha256(f, size - len(tail)).encode() != tail[-64:]:
            raise ValueError("its checksum does not match its content")
    return True


def check_whole(path: str) -> None:
    """
    Raise ValueError with what is wrong with a file of :func:`save_checkpoint` or ``torch.save``
    (whose archives have checksums of their contents); FileNotFoundError.
    """
    if check_seal(path):
        return
    size = os.path.getsize(path)
    if not size:
        raise ValueError("it is empty")
    with open(path, "rb") as f:
        f.seek(max(size - _END, 0))
        end = f.read()
        if end[:4] != b"PK\x05\x06" or end[-2:] != b"\0\0":  # the comment is gone
            raise ValueError("it is cut off, or is no file of torch.save")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # of many kinds, if headers are damaged
        raise ValueError(f"it cannot be read ({error})") from error
    if damaged:
        raise ValueError(f"the checksum of '{damaged}' inside does not match")


def _sha256(f: IO[bytes], length: int) -> str:
    """Of the first ``length`` bytes of a file."""
    digest = hashlib.sha256()
    f.seek(0)
    while length > 0:
        part = f.read(min(length, 2**20))
        if not part:
            break
        digest.update(part)
        length -= len(part)
    return digest.hexdigest()
