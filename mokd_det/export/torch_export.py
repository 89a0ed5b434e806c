# Copyright (c) The mokd_det authors.
"""
Experimental: torch.export, which replaces TorchScript, for what it takes today. That is a whole
classifier, and of a detector the backbone and the dense head (an R-CNN's RPN head): all its
convolutions but those on RoIs. Decoding and NMS are the caller's.
"""

import copy
import json
from typing import Any

import torch
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import Tensor, nn
from torch.export import Dim

from .metadata import METADATA_FILE, Json


class EverySecondPixel(nn.Module):
    """
    What :class:`LastLevelMaxPool`, a pool over one pixel, does. Traced as a pool, torch 2.11 fixes
    whether the map's height is odd.
    """

    def __init__(self, top_block: LastLevelMaxPool):
        super().__init__()
        self.num_levels, self.in_feature = top_block.num_levels, top_block.in_feature

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x[:, :, ::2, ::2]]


class BackboneAndHead(nn.Module):
    """Backbone and dense head of a detector, with its normalisation."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: Any):
        super().__init__()
        self.backbone = copy.deepcopy(model.backbone)
        top_block = getattr(self.backbone, "top_block", None)
        if isinstance(top_block, LastLevelMaxPool):
            self.backbone.top_block = EverySecondPixel(top_block)
        if isinstance(model, DenseDetector):
            self.head, self.in_features = model.head, list(model.head_in_features)
        else:
            rpn = model.proposal_generator
            self.head, self.in_features = rpn.rpn_head, list(rpn.in_features)
        self.register_buffer("pixel_mean", model.pixel_mean.clone())
        self.register_buffer("pixel_std", model.pixel_std.clone())

    def forward(self, images: Tensor) -> dict[str, Any]:
        """
        Take (N, 3, H, W) float32 images in [0, 255], sides multiples of the backbone's
        ``size_divisibility``, padded with the value of pixel_mean. Return ``features``, dict[str,
        Tensor], and ``head``, what the head returns: a tuple of lists with an (N, ., H / stride,
        W / stride) tensor for each level.
        """
        features = self.backbone((images - self.pixel_mean) / self.pixel_std)
        head = self.head([features[name] for name in self.in_features])
        return {"features": features, "head": head}


def export_program(
    module: nn.Module, images: Tensor, path: str, metadata: Json, multiple: int = 1
) -> None:
    """
    Write a :class:`BackboneAndHead` or a deployed classifier, in eval mode, as a .pt2 file;
    ValueError: torch.export does not take it.

    Args:
        images: (N, 3, H, W) example, N > 1.
        multiple: sides of images are multiples of this; 0: they are fixed.
    """
    sizes = {0: Dim("batch")}
    if multiple:
        # From one multiple above: maps of one pixel are special to torch.export.
        low = images.shape[-1] // multiple // 2 + 1
        sides = (Dim("height", min=low), Dim("width", min=low))
        sizes.update({2: multiple * sides[0], 3: multiple * sides[1]})
    try:
        with torch.no_grad():
            example = (images.to(torch.float32),)
            program = torch.export.export(module, example, dynamic_shapes=(sizes,), strict=False)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"--format torch_export: torch {torch.__version__} does not take this model: "
            f"{str(error).strip()[:2000]}\nUse --format torchscript."
        ) from error
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata, indent=2)})


def load_program(path: str) -> nn.Module:
    """Return the module of a .pt2 file."""
    return torch.export.load(path).module()
