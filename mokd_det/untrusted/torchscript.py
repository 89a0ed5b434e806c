# Copyright (c) The mokd_det authors.
"""TorchScript files are programs. They reach no Python, but some of their operators write files."""

import re
import zipfile

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
        with zipfile.ZipFile(path) as archive:
            code = [archive.read(n).decode() for n in archive.namelist() if n.endswith(".py")]
    except Exception as error:  # zipfile's own errors, and others of what it reads
        raise ValueError(f"{name} is no TorchScript file: {error}") from error
    for text in code:
        # Names of any kind: however it is written, none of these is left.
        if found := sorted(OF_FILES & set(re.findall(r"[A-Za-z_]\w*", text))):
            raise ValueError(
                f"{name} is a program that uses '{found[0]}', by which it may read or write files. "
                "If you trust it, add --trust (in Python: mokd_det.config.trust_files())."
            )
