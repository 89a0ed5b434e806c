# Copyright (c) The mokd_det authors.
"""Where data sets live: Detectron2's own rule, as a path prefix for every file in a config."""

import hashlib
import os
from pathlib import Path

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler


def datasets_root() -> Path:
    """Return the folder of all data sets: ``$DETECTRON2_DATASETS``, ``./datasets`` by default."""
    return Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def local_path(path: str) -> str:
    """Return ``path`` as a file of this machine; it may have any prefix that Detectron2 knows."""
    return PathManager.get_local_path(os.path.expanduser(path))


def sha256_of(file: str | Path) -> str:
    """Return the SHA-256, in hexadecimal, of a file or of an address that Detectron2 resolves."""
    digest = hashlib.sha256()
    with open(PathManager.get_local_path(str(file)), "rb") as f:
        while part := f.read(2**20):
            digest.update(part)
    return digest.hexdigest()


class _DatasetsHandler(PathHandler):
    """``datasets://x/y`` is ``x/y`` in :func:`datasets_root`, wherever that is today."""

    PREFIX = "datasets://"

    def _get_supported_prefixes(self):
        return [self.PREFIX]

    def _get_local_path(self, path, **kwargs):
        return str(datasets_root() / path[len(self.PREFIX) :])

    def _open(self, path, mode="r", **kwargs):
        return PathManager.open(self._get_local_path(path), mode, **kwargs)

    def _exists(self, path, **kwargs):
        return os.path.exists(self._get_local_path(path))

    def _isfile(self, path, **kwargs):
        return os.path.isfile(self._get_local_path(path))

    def _isdir(self, path, **kwargs):
        return os.path.isdir(self._get_local_path(path))

    def _ls(self, path, **kwargs):
        return os.listdir(self._get_local_path(path))


PathManager.register_handler(_DatasetsHandler(), allow_override=True)
