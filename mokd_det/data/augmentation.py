# Copyright (c) The mokd_det authors.
"""Detectron2's training augmentation, with colour jitter where the config asks for it."""

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from fvcore.transforms.transform import BlendTransform


class RandomChannelGain(T.Augmentation):
    """Multiplies each channel by a uniform number of its own: another sun, another camera."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        gain = np.random.uniform(self.low, self.high, size=image.shape[-1])
        return BlendTransform(src_image=0, src_weight=0, dst_weight=gain)


def check_augmentation(cfg: CfgNode) -> None:
    """Raise ValueError for options of ``INPUT`` out of their range, or that exclude each other."""
    jitter, options = cfg.INPUT.COLOR_JITTER, cfg.INPUT.LSJ
    if not 0 <= jitter < 1:
        raise ValueError(f"INPUT.COLOR_JITTER is {jitter}: expected 0 (off) or more, below 1.")
    if not options.ENABLED:
        return
    if options.SIZE < 1:
        raise ValueError(f"INPUT.LSJ.SIZE is {options.SIZE}: expected a number of pixels > 0.")
    if len(options.SCALE) != 2 or not 0 < options.SCALE[0] <= options.SCALE[1]:
        raise ValueError(
            f"INPUT.LSJ.SCALE is {list(options.SCALE)}: expected [low, high] with 0 < low <= high."
        )
    if cfg.INPUT.CROP.ENABLED:
        raise ValueError("INPUT.LSJ.ENABLED and INPUT.CROP.ENABLED exclude each other.")


def build_train_mapper(cfg: CfgNode) -> DatasetMapper:
    """
    Return Detectron2's own mapper. With ``INPUT.LSJ`` it resizes and crops accordingly; for a
    positive ``INPUT.COLOR_JITTER`` j the image's contrast and each channel's brightness are
    multiplied by random factors in [1 - j, 1 + j] first. ValueError: :func:`check_augmentation`.
    """
    check_augmentation(cfg)
    jitter = cfg.INPUT.COLOR_JITTER
    options = DatasetMapper.from_config(cfg, is_train=True)
    if cfg.INPUT.LSJ.ENABLED:
        options["augmentations"] = _large_scale_jitter(cfg)
        options["recompute_boxes"] = cfg.MODEL.MASK_ON
    if jitter > 0:
        colour = [make(1 - jitter, 1 + jitter) for make in (T.RandomContrast, RandomChannelGain)]
        options["augmentations"] = [*colour, *options["augmentations"]]
    return DatasetMapper(**options)


def _large_scale_jitter(cfg: CfgNode) -> list[T.Augmentation]:
    size, (low, high) = cfg.INPUT.LSJ.SIZE, cfg.INPUT.LSJ.SCALE
    augmentations = [T.ResizeScale(low, high, size, size), T.FixedSizeCrop((size, size))]
    flip = cfg.INPUT.RANDOM_FLIP
    if flip != "none":
        augmentations.append(
            T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")
        )
    return augmentations
