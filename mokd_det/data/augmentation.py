# Copyright (c) The mokd_det authors.
"""Detectron2's mapper: its augmentation, and what it says and does about broken images."""

from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from fvcore.transforms.transform import BlendTransform

from .images import BrokenImages, ImageError, check_for_detector, vanishes


class RandomChannelGain(T.Augmentation):
    """Multiplies each channel by a uniform number of its own: another sun, another camera."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        gain = np.random.uniform(self.low, self.high, size=image.shape[-1])
        return BlendTransform(src_image=0, src_weight=0, dst_weight=gain)


class CheckedMapper(DatasetMapper):
    """
    Detectron2's mapper, bit for bit, whose errors name the image: one that cannot be read is an
    ImageError, or with ``DATASETS.BROKEN_IMAGES`` "skip" ``dropped``; the rest a ValueError.
    """

    def __init__(self, broken: str, dropped: dict | None = None, **options: Any):
        """
        Args:
            broken: ``DATASETS.BROKEN_IMAGES``.
            dropped: what stands for an image that is skipped; Detectron2's loaders take another
                image for None.
            options: of Detectron2's mapper.
        """
        super().__init__(**options)
        self.broken, self.dropped = BrokenImages(broken), dropped

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        try:
            check_for_detector(dataset_dict["file_name"])
            return super().__call__(dataset_dict)
        except Exception as error:
            # Only now, since it means to read the image a second time.
            explained = self._explained(dataset_dict, error)
            if not isinstance(explained, ImageError):
                raise explained from error
        self.broken.handle(explained)
        return self.dropped

    def _explained(self, element: dict[str, Any], error: Exception) -> Exception:
        if isinstance(error, ImageError):
            return error
        file_name = element["file_name"]
        for key in ("file_name", "sem_seg_file_name"):
            try:
                check_for_detector(element.get(key, file_name), decode=True)
            except ImageError as reason:
                return reason
        height, width = element.get("height", 1), element.get("width", 1)
        for step in self.augmentations.augs:
            if isinstance(step, T.ResizeShortestEdge) and vanishes(
                height, width, min(step.short_edge_length), step.max_size
            ):
                return ImageError.of(
                    file_name,
                    f"resizing its {width} x {height} pixels to at most {step.max_size} leaves a "
                    "side of 0",
                    "Cut it into pieces, remove it, or raise INPUT.MAX_SIZE_TRAIN (MAX_SIZE_TEST).",
                )
        return ValueError(f"The image {file_name} and its annotations cannot be used: {error!r}")


def build_train_mapper(cfg: CfgNode) -> CheckedMapper:
    """
    Return Detectron2's own mapper. With ``INPUT.LSJ`` it resizes and crops accordingly; for a
    positive ``INPUT.COLOR_JITTER`` j the image's contrast and each channel's brightness are
    multiplied by random factors in [1 - j, 1 + j] first. ValueError:
    another ``DATASETS.BROKEN_IMAGES``.
    """
    jitter = cfg.INPUT.COLOR_JITTER
    options = DatasetMapper.from_config(cfg, is_train=True)
    if cfg.INPUT.LSJ.ENABLED:
        options["augmentations"] = _large_scale_jitter(cfg)
        options["recompute_boxes"] = cfg.MODEL.MASK_ON
    if jitter > 0:
        colour = [make(1 - jitter, 1 + jitter) for make in (T.RandomContrast, RandomChannelGain)]
        options["augmentations"] = [*colour, *options["augmentations"]]
    return CheckedMapper(cfg.DATASETS.BROKEN_IMAGES, **options)


def build_test_mapper(cfg: CfgNode) -> CheckedMapper:
    """Return Detectron2's mapper of evaluation, which gives ``{}`` for an image that it skips."""
    options = DatasetMapper.from_config(cfg, is_train=False)
    return CheckedMapper(cfg.DATASETS.BROKEN_IMAGES, dropped={}, **options)


def _large_scale_jitter(cfg: CfgNode) -> list[T.Augmentation]:
    size, (low, high) = cfg.INPUT.LSJ.SIZE, cfg.INPUT.LSJ.SCALE
    augmentations = [T.ResizeScale(low, high, size, size), T.FixedSizeCrop((size, size))]
    flip = cfg.INPUT.RANDOM_FLIP
    if flip != "none":
        augmentations.append(
            T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")
        )
    return augmentations
