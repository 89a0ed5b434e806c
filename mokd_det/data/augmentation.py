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
        cfg (CfgNode): ``INPUT.COLOR_JITTER`` and what Detectron2's mapper reads.

    Returns:
        DatasetMapper: Detectron2's own; for a positive jitter j the image's contrast and each
        channel's brightness are multiplied by random factors in [1 - j, 1 + j] first.

    Raises:
        ValueError: the jitter is outside [0, 1).
    """
    jitter = cfg.INPUT.COLOR_JITTER
    if not 0 <= jitter < 1:
        raise ValueError(f"INPUT.COLOR_JITTER is {jitter}: expected 0 (off) or more, below 1.")
    mapper = DatasetMapper(cfg, is_train=True)
    if jitter > 0:
        colour = [
            T.RandomContrast(1 - jitter, 1 + jitter),
            RandomChannelGain(1 - jitter, 1 + jitter),
        ]
        mapper.augmentations = T.AugmentationList([*colour, *mapper.augmentations.augs])
    return mapper
