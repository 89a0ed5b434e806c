# Copyright (c) The mokd_det authors.
"""Loaders of labelled images: the resumable stream of training, and evaluation's."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.samplers import InferenceSampler, TrainingSampler
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2.functional import get_size

from ..images import BrokenImages, ImageError, opened, orientation_of, read_rgb, upright
from ..loader import ResumableLoader, images_per_process, isolated_rng
from .batch import Batch
from .transforms import BatchMixing, build_transform

# A MPO file is a JPEG file with further pictures behind it, as some phones write.
JPEG_FORMATS = ("JPEG", "MPO")
LONGEST = 500  # sides of an image, in units of the other


class ImageMapper:
    """Reads the image of a source's element and transforms it."""

    def __init__(
        self, read: Callable[[dict], Any], transform: Callable[[Any], Tensor], broken: str = "error"
    ):
        """
        Args:
            read: :func:`read_tensor` or :func:`read_image`.
            transform: from what that returns to a (3, S, S) uint8 tensor.
            broken: "error" or "skip", see ``DATASETS.BROKEN_IMAGES``.
        """
        self.read, self.transform, self.broken = read, transform, BrokenImages(broken)

    @property
    def skipped(self) -> int:
        """Images that could not be read so far, in this process and its workers."""
        return self.broken.skipped

    def __call__(self, element: dict[str, Any]) -> dict[str, Any] | None:
        """
        Return ``image``, ``label``, ``name`` and ``seed``, a random number, of a source's element.
        An image that cannot be read is None if it is skipped, else an ImageError that names it.
        """
        try:
            image = self.read(element)
            _refuse_lines(image, element)
        except ImageError as error:
            self.broken.handle(error)
            return None
        image = self.transform(image)
        seed = int(torch.randint(2**31, ()))  # drawn after the transform's
        return {"image": image, "label": element["label"], "name": element["name"], "seed": seed}


def _refuse_lines(image: Any, element: dict[str, Any]) -> None:
    """Resized by its short edge, a line would fill the memory."""
    height, width = get_size(image)
    if max(height, width) > LONGEST * min(height, width):
        raise ImageError.of(
            element.get("file_name", element["name"]),
            f"of its {width} x {height} pixels, one side is over {LONGEST} times the other",
            "Cut or remove it, or set DATASETS.BROKEN_IMAGES to 'skip'.",
        )


def read_image(element: dict[str, Any]) -> Image.Image:
    """Return the RGB PIL image of a source's element, turned as EXIF says, or raise ImageError."""
    if "image" in element:
        return Image.fromarray(np.asarray(element["image"])).convert("RGB")
    return read_rgb(element["file_name"])


def read_tensor(element: dict[str, Any]) -> Tensor:
    """
    Return the (3, H, W) uint8 RGB tensor of a source's element: the pixels of :func:`read_image`,
    of upright JPEG files (and only these) by torchvision's decoder, which is faster.
    """
    if "image" in element:
        return pil_to_tensor(read_image(element))
    with opened(element["file_name"]) as image:
        if image.format in JPEG_FORMATS and orientation_of(image) == 1:
            with PathManager.open(element["file_name"], "rb") as file:
                content = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
            with contextlib.suppress(RuntimeError):  # PIL has the last word, and a clearer one
                return decode_jpeg(content, ImageReadMode.RGB)
        return pil_to_tensor(upright(image).convert("RGB"))


def make_batch(samples: Sequence[dict | None], mixing: BatchMixing | None = None) -> Batch:
    """Join samples of an :class:`ImageMapper` but None, mixed with the first one's seed."""
    kept = [sample for sample in samples if sample is not None]
    if not kept:
        return Batch(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    images = torch.stack([sample["image"] for sample in kept])
    targets = torch.tensor([sample["label"] for sample in kept])
    if mixing is not None:
        with isolated_rng(kept[0]["seed"]):
            images, targets = mixing(images, targets)
    return Batch(images, targets, [sample["name"] for sample in kept])


class RepeatedAugmentationSampler(TrainingSampler):
    """
    Detectron2's infinite stream, in which each image comes several times in a row, to be augmented
    differently on different processes or in one batch (Hoffer et al. 2020; DeiT's recipe). A
    permutation stays as long as the set, so it covers only a part of the images.
    """

    def __init__(self, size: int, repeats: int, seed: int | None = None):
        """The seed is equal on all ranks; ``repeats``: 1 (off) or more."""
        super().__init__(size, seed=seed)
        self.repeats = repeats

    def _infinite_indices(self) -> Iterator[int]:
        indices = super()._infinite_indices()
        while True:
            permutation = itertools.islice(indices, self._size)
            repeated = (index for index in permutation for _ in range(self.repeats))
            yield from itertools.islice(repeated, self._size)
            for _ in permutation:  # the part that the repeats left out
                pass


def build_train_loader(cfg: CfgNode) -> ResumableLoader:
    """
    Return a classifier's training loader of :class:`Batch`, whose ``mapper`` counts what it skips;
    ValueError: a batch that the processes cannot share.
    """
    batch_size = images_per_process(cfg)
    options = cfg.INPUT.CLASSIFICATION
    transform = build_transform(cfg, is_train=True)
    mixing = BatchMixing(options.MIXUP, options.CUTMIX, cfg.MODEL.CLASSIFIER.NUM_CLASSES)
    sources: ConcatDataset = ConcatDataset(list(map(DatasetCatalog.get, cfg.DATASETS.TRAIN)))
    repeats = cfg.DATALOADER.REPEATED_AUGMENTATION
    return ResumableLoader(
        sources,
        ImageMapper(read_tensor, transform, cfg.DATASETS.BROKEN_IMAGES),
        lambda seed: RepeatedAugmentationSampler(len(sources), repeats, seed),
        comm.shared_random_seed(),
        batch_size,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate=functools.partial(make_batch, mixing=mixing),
        pin_memory=torch.cuda.is_available(),
    )


class _Mapped(torch.utils.data.Dataset):
    def __init__(self, source, mapper):
        self.source, self.mapper = source, mapper

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.mapper(self.source[index])


def build_test_loader(cfg: CfgNode, name: str) -> DataLoader:
    """
    Return a loader of :class:`Batch` over this process's share of a registered set: every image
    once, in one process only.
    """
    source = DatasetCatalog.get(name)
    # By PIL and its resizing, bit for bit as torchvision's presets.
    transform = build_transform(cfg, is_train=False)
    mapper = ImageMapper(read_image, transform, cfg.DATASETS.BROKEN_IMAGES)
    return DataLoader(
        _Mapped(source, mapper),
        batch_size=cfg.TEST.BATCH_SIZE,
        sampler=InferenceSampler(len(source)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=make_batch,
        pin_memory=torch.cuda.is_available(),
    )
