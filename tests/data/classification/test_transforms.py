# Copyright (c) The mokd_det authors.
"""Augmentation: evaluation as torchvision's presets, and what each option does."""

import pytest
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights, ViT_B_16_Weights
from torchvision.transforms.functional import pil_to_tensor

from mokd_det.config import load_config
from mokd_det.data.classification import BatchMixing, build_transform
from mokd_det.modeling import Classifier

from ...conftest import TREES

CONFIG = "configs/ImageNet-Classification/resnet18.yaml"


@pytest.fixture
def photo():
    with Image.open(TREES / "train" / "0.jpg") as image:
        return image.convert("RGB").resize((300, 260))


def cfg_with(*opts):
    return load_config(
        CONFIG, [f"INPUT.CLASSIFICATION.{o}" if i % 2 == 0 else o for i, o in enumerate(opts)]
    )


@pytest.mark.parametrize(
    "preset, opts",
    [
        (ResNet18_Weights.IMAGENET1K_V1.transforms(), []),
        (
            ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1.transforms(),
            ["SIZE_TEST", 384, "RESIZE_TEST", 384, "INTERPOLATION", "bicubic"],
        ),
    ],
)
def test_evaluation_sees_what_torchvisions_presets_give(photo, preset, opts):
    cfg = cfg_with(*opts)
    image = build_transform(cfg, is_train=False)(photo)
    assert image.dtype == torch.uint8
    classifier = Classifier(
        network=torch.nn.ModuleDict({"fc": torch.nn.Identity()}),
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        num_classes=1,
    )
    assert torch.allclose(classifier.preprocess(image[None])[0], preset(photo), atol=1e-5)


@pytest.mark.parametrize(
    "opts",
    [
        [],
        ["CROP", "padded"],
        *(["AUTO_AUGMENT", x] for x in ("autoaugment", "randaugment", "trivialaugment", "augmix")),
        ["ERASING", 1.0],
        ["INTERPOLATION", "bicubic"],
    ],
)
def test_training_images_change_and_have_the_right_size(photo, opts):
    transform = build_transform(cfg_with("SIZE_TRAIN", 96, *opts), is_train=True)
    photo = pil_to_tensor(photo)
    first, second = transform(photo), transform(photo)
    assert first.shape == second.shape == (3, 96, 96) and first.dtype == torch.uint8
    assert not torch.equal(first, second)


def test_erased_pixels_have_the_mean_colour(photo):
    opts = ["SIZE_TRAIN", 64, "SCALE", [1.0, 1.0], "RATIO", [1.0, 1.0], "ERASING", 1.0]
    image = build_transform(cfg_with(*opts), is_train=True)(pil_to_tensor(photo))
    mean = torch.tensor([124, 116, 104], dtype=torch.uint8)
    assert (image == mean[:, None, None]).all(0).float().mean() > 0.01


def test_without_flips_and_padding_a_small_image_stays(photo):
    small = photo.resize((32, 32))
    opts = ["SIZE_TRAIN", 32, "CROP", "padded", "PADDING", 0]
    cfg = cfg_with(*opts)
    cfg.INPUT.RANDOM_FLIP = "none"
    same = build_transform(cfg_with("SIZE_TEST", 32, "RESIZE_TEST", 32), is_train=False)(small)
    assert torch.equal(build_transform(cfg, is_train=True)(pil_to_tensor(small)), same)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_labels_say_how_much_of_each_image_there_is(mixup, cutmix):
    """On images of one constant each, so that the share of an image can be read off its pixels."""
    images = torch.tensor([0, 100, 200], dtype=torch.uint8).view(3, 1, 1, 1).repeat(1, 3, 16, 16)
    labels = torch.tensor([4, 0, 2])
    mixing = BatchMixing(mixup, cutmix, num_classes=5)
    for _ in range(5):
        mixed, targets = mixing(images, labels)
        assert mixed.dtype == torch.float32 and targets.shape == (3, 5)
        assert torch.allclose(targets.sum(1), torch.ones(3))
        value = torch.zeros(5)
        value[labels] = torch.tensor([0.0, 100.0, 200.0])
        assert torch.allclose(mixed.mean((1, 2, 3)), targets @ value, atol=1e-2)


def test_no_mixing_gives_back_the_batch():
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    same = BatchMixing(0.0, 0.0, 2)(images, labels)
    assert same[0] is images and same[1] is labels
    with pytest.raises(ValueError, match="to satisfy the constraint"):  # torch's
        BatchMixing(-1, 0, 2)
