# Copyright (c) The mokd_det authors.
"""Augmentation for classification, by torchvision's transforms."""

import functools
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

INTERPOLATIONS = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
CROPS = ("resized", "padded")
AUTO_AUGMENTS = ("", "autoaugment", "randaugment", "trivialaugment", "augmix")


def build_transform(cfg: CfgNode, is_train: bool) -> nn.Module:
    """
    Return the transform to a (3, S, S) uint8 tensor: in training from a (3, H, W) uint8 tensor,
    which is faster to crop; in evaluation from an RGB PIL image. Evaluation computes what
    torchvision's presets for its weights do, up to their normalisation.
    """
    options = cfg.INPUT.CLASSIFICATION
    interpolation = INTERPOLATIONS[options.INTERPOLATION]
    if not is_train:
        resized = [v2.Resize(options.RESIZE_TEST, interpolation), v2.CenterCrop(options.SIZE_TEST)]
        return v2.Compose([*resized, v2.PILToTensor()])
    mean = [round(value) for value in cfg.MODEL.PIXEL_MEAN]
    size = options.SIZE_TRAIN
    steps: list[nn.Module]
    # Antialiased as by PIL.
    if options.CROP == "resized":
        ranges = tuple(options.SCALE), tuple(options.RATIO)
        steps = [v2.RandomResizedCrop(size, *ranges, interpolation, antialias=True)]
    else:
        steps = [v2.Resize(size, interpolation, antialias=True)]
        steps.append(v2.RandomCrop(size, options.PADDING))
    if cfg.INPUT.RANDOM_FLIP != "none":
        flips = {"horizontal": v2.RandomHorizontalFlip, "vertical": v2.RandomVerticalFlip}
        steps.append(flips[cfg.INPUT.RANDOM_FLIP]())
    if options.AUTO_AUGMENT:
        steps += _automatic(options, interpolation)
    if options.ERASING:
        steps.append(v2.RandomErasing(options.ERASING, value=mean))
    return v2.Compose(steps)


def _automatic(options: CfgNode, interpolation: InterpolationMode) -> list[Any]:
    ways = {
        "autoaugment": v2.AutoAugment,
        "randaugment": functools.partial(v2.RandAugment, magnitude=options.MAGNITUDE),
        "trivialaugment": v2.TrivialAugmentWide,
        "augmix": v2.AugMix,
    }
    way = ways[options.AUTO_AUGMENT](interpolation=interpolation)
    if options.AUTO_AUGMENT == "augmix":
        return [way]
    # The warps of the others take PIL a fraction of the time that they take torch.
    return [v2.ToPILImage(), way, v2.PILToTensor()]


class BatchMixing(nn.Module):
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), one of them for each batch."""

    def __init__(self, mixup: float, cutmix: float, num_classes: int):
        """
        Args:
            mixup, cutmix: parameters of their Beta distributions; 0 is off, negative a ValueError.
            num_classes: of the probabilities that labels become; ValueError: fewer than two.
        """
        super().__init__()
        ways = [
            way(alpha=alpha, num_classes=num_classes)
            for way, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
            if alpha
        ]
        self.way = v2.RandomChoice(ways) if ways else None

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """
        Return (N, 3, H, W) uint8 images and (N,) labels as they are if both are off; else float32
        images and (N, C) probabilities.
        """
        if self.way is None:
            return images, labels
        return self.way(images.to(torch.float32), labels)
