# Copyright (c) The mokd_det authors.
"""Small classifiers, and a balanced step of a pair."""

import pytest
import torch
import torchvision

from mokd_det.balancing import Branch
from mokd_det.data.classification import Batch
from mokd_det.engine import DistillationTrainer
from mokd_det.modeling import Classifier

# One of each family of torchvision: its default tap, and what is there.
FAMILIES = {
    "alexnet": ("features", "map", 256),
    "convnext_tiny": ("pre_logits", "map", 768),
    "densenet121": ("pre_logits", "vector", 1024),
    "efficientnet_b0": ("pre_logits", "vector", 1280),
    "googlenet": ("pre_logits", "vector", 1024),
    "inception_v3": ("pre_logits", "vector", 2048),
    "maxvit_t": ("pre_logits", "map", 512),
    "mnasnet0_5": ("pre_logits", "vector", 1280),
    "mobilenet_v2": ("pre_logits", "vector", 1280),
    "mobilenet_v3_small": ("pre_logits", "vector", 576),
    "regnet_y_400mf": ("pre_logits", "vector", 440),
    "resnet18": ("pre_logits", "vector", 512),
    "shufflenet_v2_x0_5": ("pre_logits", "vector", 1024),
    "squeezenet1_1": ("pre_logits", "map", 512),
    "swin_t": ("pre_logits", "vector", 768),
    "vgg11": ("features", "map", 512),
    "vit_b_16": ("pre_logits", "vector", 768),
}
FIXED = ["MOKD.BALANCING.RULE", "fixed", "MOKD.BALANCING.FIXED.WEIGHTS"]
MEASURE_AT = "MOKD.BALANCING.MEASURE_AT"
TINY_VIT = [
    "MODEL.CLASSIFIER.NAME",
    "vit_tiny_16",
    "MODEL.CLASSIFIER.OPTIONS",
    "{image_size: 32}",
]


def classifier_families(quick):
    """Parameters of a test: those that `make test` leaves out are marked as slow."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]


def classifier(network, num_classes=10, **options):
    """Return a classifier around a network, or one of torchvision's by its name."""
    if isinstance(network, str):
        network = torchvision.models.get_model(network, num_classes=num_classes)
    return Classifier(
        network=network,
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
        num_classes=num_classes,
        **options,
    )


def digit_batch(size=32, count=6, classes=10):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.arange(count) % classes)


@pytest.fixture
def build(make_digits_cfg):
    """From overrides to a classifier that distils features and logits, in training mode."""

    def make(opts=()):
        torch.manual_seed(1)
        return DistillationTrainer.build_model(
            make_digits_cfg(["MOKD.FEATURES.DIM", 32, *opts])
        ).train()

    return make


def gradients(model, weights=None, batch=None):
    """After a balanced step on the digits; or of the sum of losses with these weights."""
    model.zero_grad()
    objectives = model(batch or digit_batch())
    losses = {name: sum(parts.values()) for name, parts in objectives.items()}
    if weights is None:
        model.boundary.backward(losses, model.parameters())
    else:
        sum(w * v for w, v in zip(weights, losses.values())).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(value, expected, name):
    """Up to the order in which floats are added, which deep networks amplify."""
    assert (value - expected).norm() <= 1e-3 * expected.norm() + 1e-5, name


class NoSplit:
    """In the boundary's place: all objectives use the same features."""

    balancer = type("B", (), {"needs_second_forward": False})
    measures = True

    def split(self, features, parameters):
        return {
            name: Branch(dict(features), {p: p for p in used}) for name, used in parameters.items()
        }
