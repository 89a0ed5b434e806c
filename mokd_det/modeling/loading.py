# Copyright (c) The mokd_det authors.
"""Loading weights without running what is in the file; all of them fit, or none are used."""

import http.client
import os
import urllib.error
import urllib.parse
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import Detectron2Handler, PathManager
from torch import nn

from ..untrusted import printable, read_checkpoint
from .torchvision_resnet import for_detectron2

NO_DOWNLOAD = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def is_file(weights: str) -> bool:
    """Return whether weights are named by a file or an address, and not as a library calls them."""
    try:
        return bool(weights) and PathManager.isfile(weights)
    except NotImplementedError:  # of addresses nobody knows before the download
        return True


def local_file(weights: str, option: str) -> str:
    """
    Return the path of a file of weights, which is downloaded if it is an address. ValueError: it
    cannot be; ``option`` is where it was named.
    """
    try:
        return PathManager.get_local_path(weights)
    except NO_DOWNLOAD as error:
        raise not_downloaded(weights, option, error) from error


def not_downloaded(weights: str, option: str, error: Exception) -> ValueError:
    """Return the error for an address: what to do on a machine without internet."""
    prefix, url = Detectron2Handler.PREFIX, weights
    if weights.startswith(prefix):
        url = Detectron2Handler.S3_DETECTRON2_PREFIX + weights.removeprefix(prefix)
    return ValueError(
        f"{option} '{weights}' cannot be downloaded ({getattr(error, 'reason', error)}). Download "
        f"{url} on a machine that can, copy it here, and set {option} to the path of that file."
    )


class SafeCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer, which reads files by :func:`mokd_det.untrusted.read_checkpoint`:
    Detectron2's own runs the code that a .pkl holds. A ResNet may come from torchvision's file.
    """

    def __init__(self, model: nn.Module, *args: Any, option: str = "MODEL.WEIGHTS", **kwargs: Any):
        """``option``: the config key of the weights, for messages. Others: Detectron2's."""
        super().__init__(model, *args, **kwargs)
        self.option = option
        self._name = ""

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """
        As Detectron2's. ValueError, FileNotFoundError: a file that is no checkpoint, or an address
        from which there is none.
        """
        what = "The checkpoint to resume from," if checkpointables is None else self.option
        self._name = f"{what} '{path}'"
        try:
            return super().load(path, checkpointables)
        except NO_DOWNLOAD as error:
            raise not_downloaded(path, self.option, error) from error

    def get_checkpoint_file(self) -> str:
        """As Detectron2's; ValueError if the folder's ``last_checkpoint`` leads out of it."""
        path = super().get_checkpoint_file()
        name = path.removeprefix(os.path.join(self.save_dir, ""))
        if path and os.path.basename(name) != name or name in (".", ".."):
            raise ValueError(
                f"{os.path.join(self.save_dir, 'last_checkpoint')} names '{printable(name)}': "
                "expected a file of its own folder. To go on from another folder's checkpoint, "
                "name it in MODEL.WEIGHTS."
            )
        return path

    def _load_file(self, filename):
        # Of upstream's main: the query of an address is no part of the file's name.
        address = getattr(self, "_parsed_url_during_load", None)
        query = urllib.parse.parse_qs(address.query) if address else {}
        checkpoint = read_checkpoint(filename, self._name)
        if query.get("matching_heuristics") == ["True"]:
            checkpoint["matching_heuristics"] = True
        return for_detectron2(checkpoint, self.model, self._name)


class StrictCheckpointer(SafeCheckpointer):
    """
    A checkpointer for which a missing, unexpected or mis-shaped key is an error that lists them.
    Detectron2 only warns, and a half-random model then ruins a run silently.
    """

    def _load_model(self, checkpoint):
        given = dict(checkpoint["model"])
        found = super()._load_model(checkpoint)
        misshaped = {
            key: f"{key} (file {tuple(theirs)}, model {tuple(mine)})"
            for key, theirs, mine in found.incorrect_shapes
        }
        problems = {
            "missing": [key for key in found.missing_keys if key not in misshaped],
            "unexpected": [k for k in found.unexpected_keys if not self._is_config(given, k)],
            "of another shape": list(misshaped.values()),
        }
        if any(problems.values()):
            lines = [f"  {what}: {shortened(keys)}\n" for what, keys in problems.items() if keys]
            raise ValueError(
                f"{self._name} does not fit the model of its config:\n"
                f"{''.join(lines)}Give the weights that were trained with this config, or the "
                "config that these weights were trained with."
            )
        return found

    def _is_config(self, given, key):
        """Of a buffer of older checkpoints, which the config says now: whether it says the same."""
        mine = getattr(self.model, key, None)
        if mine is None or key not in ("pixel_mean", "pixel_std"):
            return False
        value = torch.as_tensor(given[key], dtype=torch.float32).flatten()
        mine = mine.cpu().flatten()
        return mine.shape == value.shape and torch.allclose(mine, value)


def shortened(names: Sequence[str], most: int = 8) -> str:
    rest = f", ... ({len(names)} in all)" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + rest
