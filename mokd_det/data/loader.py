# Copyright (c) The mokd_det authors.
"""
A training loader that can go on where it stopped; Detectron2's starts anew after a resume.

The stream of batches is a function of a seed, and the augmentation of a sample a function of the
seed and of the sample's position in the stream. So position N can be reached without loading what
comes before, and gives the same batch with any number of workers.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import logging
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, build_detection_test_loader
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from .augmentation import build_test_mapper

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """
    Restore the random states of Python, NumPy and torch (CPU and CUDA) afterwards; inside, the
    three are seeded (torch: CPU only) if a seed is given.
    """
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def workers_that_outlive_signals(
    init: Callable[[int], None] | None = None,
) -> Callable[[int], None]:
    """
    Return a DataLoader's ``worker_init_fn``. A terminal's Ctrl-C and a scheduler's SIGTERM reach
    all processes, but the step that is to be finished needs its batch. ``init``: what to call, too.
    """
    return functools.partial(_init_worker, init)


def _init_worker(init, worker):
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has not, and SIGTERM ends the workers there
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()
    if init is not None:
        init(worker)


def _obey_parent():
    """End this process on a SIGTERM of its parent's, which waits for it then; on no other's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class _SeededDataset(Dataset):
    """Maps the element at an index under a random state of its own."""

    def __init__(self, elements, mapper, seed):
        self.elements, self.mapper, self.seed = elements, mapper, seed

    def __len__(self):
        return len(self.elements)

    def __getitem__(self, key):
        position, index = key
        with isolated_rng(hash((self.seed, position)) % 2**63):
            for _ in range(100):
                sample = self.mapper(copy.deepcopy(self.elements[index]))
                if sample is not None:
                    return sample
                index = random.randrange(len(self.elements))  # as Detectron2: try another
        raise RuntimeError("The mapper dropped 100 samples in a row: check the data set.")


class _BatchStream(Sampler):
    """Batches of (position, index), infinite, from batch number ``start`` on."""

    def __init__(self, sampler, batch_size, groups, start):
        self.sampler, self.batch_size = sampler, batch_size
        self.groups, self.start = groups, start

    def __iter__(self):
        return itertools.islice(self._batches(), self.start, None)

    def _batches(self):
        rank, ranks = comm.get_rank(), comm.get_world_size()
        waiting: dict[Any, list] = {}
        for count, index in enumerate(self.sampler):
            group = waiting.setdefault(self.groups[index] if self.groups else 0, [])
            group.append((count * ranks + rank, index))
            if len(group) == self.batch_size:
                yield group[:]
                group.clear()


@dataclasses.dataclass(eq=False, repr=False)
class ResumableLoader:
    """
    An infinite iterable of batches. Nothing is loaded and no worker starts before the first batch
    is asked for, so that a checkpoint loaded after the loader was built still decides where it
    starts.

    Attributes:
        elements: a sequence of data set dicts.
        mapper: from an element (a copy) to a sample; None drops it.
        make_sampler: from a seed to an infinite iterable of indices.
        seed: of the order and the augmentations; equal on all ranks.
        batch_size: of this rank.
        groups: a group for each element; a batch holds one group only.
        collate: from samples to a batch; what it draws at random it must take from the samples.
        pin_memory: of the batches, which a GPU then reads by itself.
        start: number of batches to skip, without loading them, when iterating starts.
    """

    elements: Any
    mapper: Callable[[Any], Any]
    make_sampler: Callable[[int], Iterable[int]]
    seed: int
    batch_size: int
    groups: Sequence | None = None
    num_workers: int = 0
    collate: Callable[[list], Any] = trivial_batch_collator
    pin_memory: bool = False
    start: int = dataclasses.field(default=0, init=False)

    def __iter__(self) -> Iterator[Any]:
        sampler = self.make_sampler(self.seed)
        yield from DataLoader(
            _SeededDataset(self.elements, self.mapper, self.seed),
            batch_sampler=_BatchStream(sampler, self.batch_size, self.groups, self.start),
            num_workers=self.num_workers,
            collate_fn=self.collate,
            pin_memory=self.pin_memory,
            # A data loader draws from torch's global generator when it starts, unless it has one.
            generator=torch.Generator(),
            worker_init_fn=workers_that_outlive_signals(),
        )

    def state_dict(self) -> dict[str, Any]:
        """The position is the trainer's iteration, so the seed is all there is to keep."""
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed = state["seed"]


def build_resumable_train_loader(
    cfg: CfgNode, mapper: Callable[[dict], Any] | None = None
) -> ResumableLoader:
    """
    Build the training loader of a Detectron2 config, with its samplers, filters, mapper (by
    default ``DatasetMapper(cfg, is_train=True)``) and aspect-ratio grouping. ValueError: a batch
    that the ranks cannot share equally.
    """
    images_per_process(cfg)
    elements = training_elements(cfg)
    return resumable_loader(
        elements,
        mapper=mapper or DatasetMapper(cfg, is_train=True),
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        make_sampler=functools.partial(SAMPLERS[cfg.DATALOADER.SAMPLER_TRAIN], cfg, elements),
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def resumable_loader(
    dataset: list[dict[str, Any]],
    *,
    mapper: Callable[[dict], Any],
    total_batch_size: int,
    make_sampler: Callable[[int], Iterable[int]] | None = None,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
) -> ResumableLoader:
    """
    As Detectron2's ``build_detection_train_loader``, for Python configs. ``make_sampler``: from a
    seed to an infinite iterable of indices; default every image in random order. ValueError: a
    batch that the processes cannot share equally.
    """
    ranks = comm.get_world_size()
    if total_batch_size % ranks:
        raise ValueError(
            f"total_batch_size is {total_batch_size}, which {ranks} processes cannot share equally."
        )
    groups = None
    if aspect_ratio_grouping:
        groups = [int(element["width"] > element["height"]) for element in dataset]
    return ResumableLoader(
        DatasetFromList(dataset, copy=False),
        mapper,
        make_sampler or functools.partial(_every_image, None, dataset),
        comm.shared_random_seed(),
        total_batch_size // ranks,
        groups,
        num_workers,
    )


def images_per_process(cfg: CfgNode) -> int:
    """Return each process's part of ``SOLVER.IMS_PER_BATCH``; ValueError if that is not whole."""
    ranks = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % ranks:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {ranks} processes cannot "
            "share equally."
        )
    return cfg.SOLVER.IMS_PER_BATCH // ranks


def training_elements(cfg: CfgNode) -> list[dict[str, Any]]:
    """Return Detectron2's dicts of the images in ``DATASETS.TRAIN``, after its filters."""
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    return get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )


def _every_image(cfg, elements, seed):
    return TrainingSampler(len(elements), seed=seed)


def _by_repeat_factor(cfg, elements, seed):
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        elements, cfg.DATALOADER.REPEAT_THRESHOLD
    )
    return RepeatFactorTrainingSampler(factors, seed=seed)


def _random_subset(cfg, elements, seed):
    ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
    return RandomSubsetTrainingSampler(len(elements), ratio, seed_shuffle=seed, seed_subset=seed)


# By DATALOADER.SAMPLER_TRAIN: from the config, the images' dicts and a seed.
SAMPLERS = {
    "TrainingSampler": _every_image,
    "RepeatFactorTrainingSampler": _by_repeat_factor,
    "RandomSubsetTrainingSampler": _random_subset,
}


class _WithoutSkipped:
    """The batches of a loader, of one image each, but the empty ones, which are told afterwards."""

    def __init__(self, loader, name):
        self.loader, self.name = loader, name

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        skipped = 0
        for batch in self.loader:
            if batch:
                yield batch
            else:
                skipped += 1
        if skipped:
            logger.warning(
                f"{skipped} images of '{self.name}' could not be read (DATASETS.BROKEN_IMAGES "
                "'skip') and have no predictions: their objects count as missed."
            )


def build_test_loader(cfg: CfgNode, name: str) -> Iterable[list[dict[str, Any]]]:
    """
    Return Detectron2's loader for the evaluation of a detector on a registered set. An image that
    cannot be read is an ImageError; with ``DATASETS.BROKEN_IMAGES`` "skip" it is left out, and the
    number of these is told at the end.
    """
    mapper = build_test_mapper(cfg)
    if not mapper.broken.skips:
        return build_detection_test_loader(cfg, name, mapper=mapper)
    loader = build_detection_test_loader(cfg, name, mapper=mapper, collate_fn=_without_dropped)
    return _WithoutSkipped(loader, name)


def _without_dropped(samples):
    return [sample for sample in samples if sample]
