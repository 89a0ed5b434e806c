# Copyright (c) The mokd_det authors.
"""A TorchScript file as the teacher: any network, from any library, that returns feature maps."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import ImageList
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from ..config import is_trusted
from ..untrusted import check_torchscript

PROBE = 256  # pixels


class ScriptedDetector(nn.Module):
    """A detector's parts that a teacher needs, around a module from images to feature maps."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        module: torch.jit.ScriptModule,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int,
        device: str,
    ):
        """
        Pixel values are Detectron2's, in the module's channel order. ValueError if the module does
        not return maps with whole strides.
        """
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.to(device)
        module, channels = module.to(device).eval(), len(pixel_mean)
        self.backbone = _ScriptedBackbone(module, channels, size_divisibility, device)

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """FileNotFoundError, ValueError: no such file, or a second teacher named."""
        teacher = cfg.MOKD.TEACHER
        if teacher.CONFIG_FILE or teacher.WEIGHTS or teacher.OPTS:
            raise ValueError(
                "MOKD.TEACHER.TORCHSCRIPT.FILE and MOKD.TEACHER.CONFIG_FILE, WEIGHTS or OPTS name "
                "two teachers: leave one of them empty."
            )
        file = teacher.TORCHSCRIPT.FILE
        try:
            is_there = PathManager.isfile(file)
        except NotImplementedError as error:  # of an address
            raise ValueError(
                f"MOKD.TEACHER.TORCHSCRIPT.FILE '{file}' is an address: download it, and name the "
                "file."
            ) from error
        if not is_there:
            raise FileNotFoundError(f"MOKD.TEACHER.TORCHSCRIPT.FILE '{file}' does not exist.")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "ScriptedDetector":
        """
        By ``MOKD.TEACHER.TORCHSCRIPT`` of the student's config. Errors are :meth:`check_config`'s,
        and a ValueError if the file is no TorchScript.
        """
        cls.check_config(cfg)
        options = cfg.MOKD.TEACHER.TORCHSCRIPT
        path = PathManager.get_local_path(options.FILE)
        if not is_trusted():
            check_torchscript(path, f"MOKD.TEACHER.TORCHSCRIPT.FILE '{options.FILE}'")
        try:
            module = torch.jit.load(path, map_location="cpu")
            if not module.state_dict():
                # Frozen: its weights are constants, which no later ``to`` moves.
                module = torch.jit.load(path, map_location=cfg.MODEL.DEVICE)
        except RuntimeError as error:
            raise ValueError(
                f"MOKD.TEACHER.TORCHSCRIPT.FILE '{options.FILE}' is no TorchScript file: {error}"
            ) from error
        pixels = options.PIXEL_MEAN, options.PIXEL_STD
        return cls(module, *pixels, options.SIZE_DIVISIBILITY, cfg.MODEL.DEVICE)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """As Detectron2's detectors."""
        images = [x["image"].to(self.device) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)


class _ScriptedBackbone(Backbone):
    def __init__(self, module: nn.Module, channels: int, size_divisibility: int, device: str):
        super().__init__()
        self.module = module
        self._size_divisibility = size_divisibility
        problem = None
        with torch.no_grad():
            try:
                features = module(torch.zeros(1, channels, PROBE, PROBE, device=device))
            except RuntimeError as error:
                problem = f"an image of {channels} x {PROBE} x {PROBE} is an error: {error}"
        if problem is None and not isinstance(features, dict):
            problem = f"it returns a {type(features).__name__}"
        if problem is None:
            self._shapes = {name: _shape(x) for name, x in features.items()}
            wrong = [name for name, shape in self._shapes.items() if shape is None]
            problem = f"{wrong} are no maps whose stride divides {PROBE}" if wrong else None
        if problem:
            raise ValueError(
                "MOKD.TEACHER.TORCHSCRIPT.FILE must map images (N, C, H, W) of any size to "
                f"dict[str, Tensor] of maps (N, C', H / stride, W / stride), but {problem}."
            )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.module(x)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility


def _shape(feature: object) -> ShapeSpec | None:
    if not isinstance(feature, torch.Tensor) or feature.dim() != 4:
        return None
    _, channels, height, width = feature.shape
    is_whole = height == width and PROBE % height == 0
    return ShapeSpec(channels=channels, stride=PROBE // height) if is_whole else None
