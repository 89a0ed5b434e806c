# Copyright (c) The mokd_det authors.
"""TorchScript files are programs. They reach no Python, but some of their operators write files."""

import re

import torch

from .names import printable

# Operators of torch and torchvision that read or write files by name.
OF_FILES = frozenset(
    ("save", "from_file", "read_file", "write_file", "write_png", "write_jpeg")
    + ("read_video_from_file", "probe_video_from_file")
)


def check_torchscript(path: str, name: str) -> None:
    """
    Raise ValueError if a TorchScript archive names operators that read or write files, or is no
    such archive. Nothing of it is run. ``name``: of the file, for messages.

    It is a guard, no sandbox: SECURITY.md.
    """
    try:
        code = _code_of(path)
    except Exception as error:  # torch's own errors, and others of what it reads
        reason = printable(str(error).split("\n")[0])
        raise ValueError(f"{name} is no TorchScript file: {reason}") from error
    for text in code:
        # Names of any kind: however it is written, none of these is left.
        if found := sorted(OF_FILES & set(re.findall(r"[A-Za-z_]\w*", text))):
            raise ValueError(
                f"{name} is a program that uses '{found[0]}', by which it may read or write files. "
                "If you trust it, add --trust (in Python: mokd_det.config.trust_files())."
            )


def _code_of(path: str) -> list[str]:
    """
    Return the source files in an archive, by torch's own reader: a zip archive can be made in which
    another one finds other files. tools/run_exported.py has the same.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError("it begins as none")  # torch.jit.load also knows another format
    reader = torch._C.PyTorchFileReader(path)
    names = reader.get_all_records()
    for name in names:  # RuntimeError: the reader cut its name
        reader.get_record_size(name)
    if len({name.lower() for name in names}) < len(names):  # to torch, both cases are one
        raise ValueError("two of the files in it have one name")
    return [reader.get_record(name).decode() for name in names if name.lower().endswith(".py")]
