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

from .metadata import Json
from .parity import DEFAULT_TOLERANCE, Compare, parity
from .torchscript import freeze, load_torchscript, save_torchscript


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How to write a file, and how far it may differ."""

    format: str = "torchscript"  # a key of FORMATS
    method: str = ""  # of TorchScript, one of METHODS; "": the exporter's default_method
    half: bool = False  # float16 for a detector's backbone, or a classifier's network
    freeze: bool = False  # weights as constants, BatchNorm folded
    tolerance: float = DEFAULT_TOLERANCE  # see parity


class Exporter(abc.ABC):
    """Writes trained models of one kind, and says what goes into and comes out of the files."""

    default_method = "tracing"  # of TorchScript

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg

    @abc.abstractmethod
    def check(self, model: nn.Module, options: ExportOptions) -> None:
        """Raise ValueError or ImportError if the model cannot be written so."""

    @abc.abstractmethod
    def metadata(self, model: nn.Module) -> Json:
        """Return what the file says of classes, input and outputs; data sets are registered."""

    @abc.abstractmethod
    def to_tensor(self, image: np.ndarray) -> Tensor:
        """
        Return an (H, W, 3) uint8 RGB image as (3, H', W') uint8, resized (and cropped) as for
        evaluation, in ``INPUT.FORMAT``.
        """

    @abc.abstractmethod
    def write(
        self, model: Any, pictures: list[Tensor], path: str, metadata: Json, options: ExportOptions
    ) -> Json:
        """
        Write a model in eval mode, without gradients, read the file again, and compare both on
        pictures of :meth:`to_tensor`. The metadata, completed here, goes into the file. Return
        what :func:`mokd_det.export.parity.parity` says.
        """

    @abc.abstractmethod
    def eager_input(self, image: Tensor) -> Any:
        """Return what the model itself takes for an image of :meth:`to_tensor`."""

    @abc.abstractmethod
    def exported_input(self, image: Tensor) -> Tensor:
        """Return what a written file takes for an image of :meth:`to_tensor`."""


def differences(expected: list, found: list, compare: Compare) -> Json:
    """What float16 costs: for information, so without a tolerance."""
    result = parity(expected, found, [], float("inf"), compare)
    kept = ("unmatched", "detections")
    return {k: v for k, v in result.items() if "difference" in k or k in kept}


def save_and_load(
    module: torch.jit.ScriptModule, path: str, metadata: Json, frozen: bool, device: torch.device
) -> torch.jit.ScriptModule:
    """Write a TorchScript module, and return it as it is read again."""
    save_torchscript(freeze(module) if frozen else module, path, metadata)
    # Not by ``to``, which leaves constants where they are: those of a frozen file are its weights.
    return load_torchscript(path, device)[0]


def stack(pictures: list[Tensor], height: int, width: int) -> Tensor:
    """Three of the pictures (again, if they are fewer), float32 at one size."""
    pictures = [pictures[i % len(pictures)].to(torch.float32) for i in range(3)]
    return torch.stack([F.interpolate(p[None], (height, width))[0] for p in pictures])
