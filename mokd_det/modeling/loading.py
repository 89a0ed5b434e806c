# Copyright (c) The mokd_det authors.
"""Loading weights so that all of them fit, or none are used."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn


class StrictCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer, for which a missing, unexpected or mis-shaped key is an error that
    lists them. Detectron2 only warns, and a half-random model then ruins a run silently.
    """

    def __init__(self, model: nn.Module, *args: Any, option: str = "MODEL.WEIGHTS", **kwargs: Any):
        """``option``: the config key of the weights, for the message. Others: Detectron2's."""
        super().__init__(model, *args, **kwargs)
        self.option = option

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._path = path
        return super().load(path, *args, **kwargs)

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
                f"{self.option} '{self._path}' does not fit the model of its config:\n"
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
        return torch.allclose(mine.cpu().flatten(), value)


def shortened(names: Sequence[str], most: int = 8) -> str:
    rest = f", ... ({len(names)} in all)" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + rest
