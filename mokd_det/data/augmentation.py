# Copyright (c) The mokd_det authors.
"""Detectron2's training augmentation, with colour jitter where the config asks for it."""

import numpy as np
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from fvcore.transforms.transform import BlendTransform

__all__ = ["RandomChannelGain", "build_train_mapper"]


class RandomChannelGain(T.Augmentation):
    """Multiplies each channel by a number of its own: another sun, another camera."""

    def __init__(self, low, high):
        """
        Args:
            low, high (float): the factors are uniform in this range.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image):
        gain = np.random.uniform(self.low, self.high, size=image.shape[-1])
        return BlendTransform(src_image=0, src_weight=0, dst_weight=gain)


def build_train_mapper(cfg):
    """
    Args:
        cfg (CfgNode): ``INPUT.LSJ``, ``INPUT.COLOR_JITTER`` and what Detectron2's mapper reads.

    Returns:
        DatasetMapper: Detectron2's own. With large-scale jitter it resizes and crops accordingly;
        for a positive colour jitter j the image's contrast and each channel's brightness are
        multiplied by random factors in [1 - j, 1 + j] first.

    Raises:
        ValueError: an option out of its range, or options that exclude each other.
    """
    jitter = cfg.INPUT.COLOR_JITTER
    if not 0 <= jitter < 1:
        raise ValueError(f"INPUT.COLOR_JITTER is {jitter}: expected 0 (off) or more, below 1.")
    options = DatasetMapper.from_config(cfg, is_train=True)
    if cfg.INPUT.LSJ.ENABLED:
        options["augmentations"] = _large_scale_jitter(cfg)
        options["recompute_boxes"] = cfg.MODEL.MASK_ON
    if jitter > 0:
        colour = [
            T.RandomContrast(1 - jitter, 1 + jitter),
            RandomChannelGain(1 - jitter, 1 + jitter),
        ]
        options["augmentations"] = [*colour, *options["augmentations"]]
    return DatasetMapper(**options)


def _large_scale_jitter(cfg):
    size, scale = cfg.INPUT.LSJ.SIZE, cfg.INPUT.LSJ.SCALE
    if size < 1:
        raise ValueError(f"INPUT.LSJ.SIZE is {size}: expected a number of pixels > 0.")
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ValueError(
            f"INPUT.LSJ.SCALE is {list(scale)}: expected [low, high] with 0 < low <= high."
        )
    if cfg.INPUT.CROP.ENABLED:
        raise ValueError("INPUT.LSJ.ENABLED and INPUT.CROP.ENABLED exclude each other.")
    low, high = scale
    augmentations = [T.ResizeScale(low, high, size, size), T.FixedSizeCrop((size, size))]
    flip = cfg.INPUT.RANDOM_FLIP
    if flip != "none":
        augmentations.append(
            T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")
        )
    return augmentations
