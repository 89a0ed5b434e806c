# Copyright (c) The mokd_det authors.
"""Loading weights so that all of them fit, or none are used."""

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
        """
        Args:
            option: the config key of the weights, for the message. Others: Detectron2's.
        """
        super().__init__(model, *args, **kwargs)
        self.option = option

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._path = path
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint):
        given = dict(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        misshaped = [key for key, _, _ in incompatible.incorrect_shapes]
        problems = {
            "missing": [key for key in incompatible.missing_keys if key not in misshaped],
            # Buffers of older checkpoints; the config says them now.
            "unexpected": [
                key
                for key in incompatible.unexpected_keys
                if key not in ("pixel_mean", "pixel_std") or not self._is_equal(given[key], key)
            ],
            "of another shape": [
                f"{key} (file {tuple(found)}, model {tuple(expected)})"
                for key, found, expected in incompatible.incorrect_shapes
            ],
        }
        if any(problems.values()):
            lines = [f"  {what}: {_shortened(keys)}" for what, keys in problems.items() if keys]
            raise ValueError(
                f"{self.option} '{self._path}' does not fit the model of its config:\n"
                + "\n".join(lines)
                + "\nGive the weights that were trained with this config, or the config that "
                "these weights were trained with."
            )
        return incompatible

    def _is_equal(self, given, key):
        mine = getattr(self.model, key, None)
        given = torch.as_tensor(given, dtype=torch.float32).flatten()
        return mine is not None and torch.allclose(mine.cpu().flatten(), given)


def _shortened(keys, most=8):
    rest = f", ... ({len(keys)} in all)" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest
