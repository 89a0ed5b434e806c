# Copyright (c) The mokd_det authors.
"""Loaders of labelled images."""

import itertools

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.samplers import TrainingSampler
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from mokd_det.data import register_datasets
from mokd_det.data.classification import Batch, PackedImages, build_test_loader, build_train_loader
from mokd_det.data.classification.loader import (
    RepeatedAugmentationSampler,
    read_image,
    read_tensor,
)

from ...conftest import DIGITS, TREES

MIXED = ["INPUT.CLASSIFICATION.MIXUP", 0.8, "INPUT.CLASSIFICATION.CUTMIX", 1.0]


def batches(cfg, count, start=0):
    register_datasets(cfg)
    loader = build_train_loader(cfg)
    loader.seed, loader.start = 5, start
    return list(itertools.islice(loader, count))


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)
        assert a.names == b.names


@pytest.mark.parametrize("opts", [[], MIXED], ids=["plain", "mixed"])
def test_the_stream_can_start_anywhere_with_any_number_of_workers(make_digits_cfg, opts):
    whole = batches(make_digits_cfg(opts), 4)
    assert_equal(whole[2:], batches(make_digits_cfg(opts), 2, start=2))
    assert_equal(whole, batches(make_digits_cfg([*opts, "DATALOADER.NUM_WORKERS", 2]), 4))
    assert not torch.equal(whole[0].images, whole[1].images)


def test_batches_hold_the_images_of_their_labels(make_digits_cfg):
    cfg = make_digits_cfg(["INPUT.CLASSIFICATION.PADDING", 0])
    source = PackedImages(str(DIGITS / "train.npz"))
    for batch in batches(cfg, 2):
        assert batch.images.shape == (8, 3, 32, 32) and batch.images.dtype == torch.uint8
        for label, name in zip(batch.targets.tolist(), batch.names):
            assert source[int(name.split("#")[1])]["label"] == label


def test_mixed_batches_have_probabilities(make_digits_cfg):
    for batch in batches(make_digits_cfg(MIXED), 3):
        assert batch.images.dtype == torch.float32 and batch.targets.shape == (8, 10)


def test_a_batch_can_be_sliced_and_moved():
    batch = Batch(torch.zeros(4, 3, 2, 2), torch.arange(4), list("abcd"))
    part = batch[1:3].to("cpu")
    assert len(part) == 2 and part.targets.tolist() == [1, 2] and part.names == ["b", "c"]


def test_repeated_augmentation_repeats_and_covers_in_turn():
    sampler = RepeatedAugmentationSampler(9, 3, seed=0)
    epoch = list(itertools.islice(iter(sampler), 9))
    assert [len(list(g)) for _, g in itertools.groupby(epoch)] == [3, 3, 3]
    later = set(itertools.islice(iter(sampler), 9 * 40))
    assert later == set(range(9))
    plain = itertools.islice(iter(TrainingSampler(9, seed=4)), 30)
    once = itertools.islice(iter(RepeatedAugmentationSampler(9, 1, seed=4)), 30)
    assert list(plain) == list(once)


def test_repeats_are_augmented_differently(make_digits_cfg):
    batch = batches(make_digits_cfg(["DATALOADER.REPEATED_AUGMENTATION", 4]), 1)[0]
    assert len(set(batch.names)) == 2
    assert batch.names[0] == batch.names[3]
    assert not torch.equal(batch.images[0], batch.images[1])


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_training_sees_the_pixels_that_evaluation_sees(tmp_path, mode, suffix):
    if (mode, suffix) == ("CMYK", "png"):
        return  # there is no such file
    path = tmp_path / f"x.{suffix}"
    with Image.open(TREES / "train" / "0.jpg") as image:
        image.convert(mode).save(path)
    element = {"file_name": str(path), "name": "x", "label": 0}
    first, second = read_tensor(element), pil_to_tensor(read_image(element))
    assert first.shape == second.shape and first.dtype == torch.uint8
    assert (first.int() - second.int()).abs().max() <= 1


@pytest.fixture
def broken_folders(tmp_path):
    """20 digits in folders; broken are a text, a PNG and a JPEG that end in their middle."""
    packed = PackedImages(str(DIGITS / "val.npz"))
    for index in range(20):
        item = packed[index]
        folder = tmp_path / "set" / str(item["label"])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(item["image"]).save(folder / f"{index}.png")
    (tmp_path / "set" / "3" / "3.png").write_text("no image")
    content = (tmp_path / "set" / "5" / "5.png").read_bytes()
    (tmp_path / "set" / "5" / "5.png").write_bytes(content[:100])
    photo = (TREES / "train" / "0.jpg").read_bytes()
    (tmp_path / "set" / "7" / "7.png").write_bytes(photo[: len(photo) // 2])
    return tmp_path / "set"


def broken_opts(root, action):
    name = f"tests_broken_{root.parent.name}"
    return [
        *("DATASETS.CLASSIFICATION", [[name, str(root)]]),
        *("DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)),
        *("DATASETS.BROKEN_IMAGES", action, "SOLVER.IMS_PER_BATCH", 20),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_named(make_digits_cfg, broken_folders, workers):
    opts = [*broken_opts(broken_folders, "error"), "DATALOADER.NUM_WORKERS", workers]
    with pytest.raises(ValueError, match=r"set/(3/3|5/5|7/7).png cannot be read"):
        batches(make_digits_cfg(opts), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_skipped_and_counted(make_digits_cfg, broken_folders, workers):
    cfg = make_digits_cfg([*broken_opts(broken_folders, "skip"), "DATALOADER.NUM_WORKERS", workers])
    register_datasets(cfg)
    loader = build_train_loader(cfg)
    batch = next(iter(loader))
    assert len(batch) == 20 and not {"3/3.png", "5/5.png", "7/7.png"} & set(batch.names)
    assert loader.mapper.skipped >= 3

    name = cfg.DATASETS.TEST[0]
    cfg.TEST.BATCH_SIZE = 6
    seen = [name for batch in build_test_loader(cfg, name) for name in batch.names]
    assert len(seen) == len(set(seen)) == 17
    assert len(DatasetCatalog.get(name)) == 20


def test_a_batch_of_broken_images_only_is_empty(make_digits_cfg, broken_folders):
    cfg = make_digits_cfg([*broken_opts(broken_folders, "skip"), "TEST.BATCH_SIZE", 1])
    register_datasets(cfg)
    lengths = [len(batch) for batch in build_test_loader(cfg, cfg.DATASETS.TEST[0])]
    assert sorted(lengths) == [0, 0, 0] + [1] * 17
