# Copyright (c) The mokd_det authors.
"""What writes models of one kind for deployment."""

import abc
import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn

from .parity import DEFAULT_TOLERANCE, Compare, parity
from .torchscript import freeze, load_torchscript, save_torchscript


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """
    Attributes:
        format: a key of ``FORMATS``.
        method: one of ``METHODS``.
        half: float16 for a detector's backbone, or a classifier's network.
        freeze: weights as constants, BatchNorm folded.
        tolerance: see :mod:`mokd_det.export.parity`.
    """

    format: str = "torchscript"
    method: str = "tracing"
    half: bool = False
    freeze: bool = False
    tolerance: float = DEFAULT_TOLERANCE


class Exporter(abc.ABC):
    """Writes trained models of one kind, and says what goes into and comes out of the files."""

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: of the model.
        """
        self.cfg = cfg

    @abc.abstractmethod
    def check(self, model: nn.Module, options: ExportOptions) -> None:
        """Raise ValueError or ImportError if the model cannot be written so."""

    @abc.abstractmethod
    def metadata(self, model: nn.Module) -> dict[str, Any]:
        """Return what the file says of classes, input and outputs; data sets are registered."""

    @abc.abstractmethod
    def to_tensor(self, image: np.ndarray) -> Tensor:
        """
        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            (3, H', W') uint8, resized (and cropped) as for evaluation, in ``INPUT.FORMAT``.
        """

    @abc.abstractmethod
    def write(
        self,
        model: nn.Module,
        pictures: list[Tensor],
        path: str,
        metadata: dict[str, Any],
        options: ExportOptions,
    ) -> dict[str, Any]:
        """
        Write the file, read it again, and compare it with the model.

        Args:
            model: in eval mode, without gradients.
            pictures: of :meth:`to_tensor`.
            path: of the file.
            metadata: goes into it; completed here.

        Returns:
            What :func:`mokd_det.export.parity.parity` says.
        """

    @abc.abstractmethod
    def eager_input(self, image: Tensor) -> Any:
        """Return what the model itself takes for an image of :meth:`to_tensor`."""

    @abc.abstractmethod
    def exported_input(self, image: Tensor) -> Tensor:
        """Return what a written file takes for an image of :meth:`to_tensor`."""


def differences(expected: list, found: list, compare: Compare) -> dict[str, Any]:
    """What float16 costs: for information, so without a tolerance."""
    result = parity(expected, found, [], float("inf"), compare)
    return {
        k: v for k, v in result.items() if "difference" in k or k in ("unmatched", "detections")
    }


def save_and_load(
    module: torch.jit.ScriptModule,
    path: str,
    metadata: dict[str, Any],
    frozen: bool,
    device: torch.device,
) -> torch.jit.ScriptModule:
    """Write a TorchScript module, and return it as it is read again."""
    save_torchscript(freeze(module) if frozen else module, path, metadata)
    # Not by ``to``, which leaves constants where they are: those of a frozen file are its weights.
    return load_torchscript(path, device)[0]


def stack(pictures: list[Tensor], height: int, width: int) -> Tensor:
    """Three of the pictures (again, if they are fewer), float32 at one size."""
    pictures = [pictures[i % len(pictures)].to(torch.float32) for i in range(3)]
    return torch.stack([F.interpolate(p[None], (height, width))[0] for p in pictures])
