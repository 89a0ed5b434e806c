# Copyright (c) The mokd_det authors.
"""What a classification network needs, by its name."""

import inspect
from typing import NamedTuple

import torch
from torch import nn
from torchvision.models import get_model_weights

from .networks import CLASSIFIERS, TIMM_PREFIX, build_network, check_name, input_normalisation


class NetworkFacts(NamedTuple):
    """
    Attributes:
        weights: for ``MODEL.CLASSIFIER.WEIGHTS``: "DEFAULT", or "" if there are none.
        pixel_mean, pixel_std: of R, G and B in [0, 255], as these weights want them.
        least_size: of the images, in pixels.
        is_fixed: it takes no other size than that.
    """

    weights: str
    pixel_mean: list[float]
    pixel_std: list[float]
    least_size: int
    is_fixed: bool


def network_facts(name: str, option: str, is_random: bool = False) -> NetworkFacts:
    """
    Args:
        option: what named it, for messages.
        is_random: it is to start from random weights.

    ValueError, ImportError: there is no such network, or no timm.
    """
    check_name(name, option)
    weights, least, is_fixed = "", 1, False
    if name in CLASSIFIERS:
        if size := inspect.signature(CLASSIFIERS.get(name)).parameters.get("image_size"):
            least, is_fixed = size.default, True
    elif name.startswith(TIMM_PREFIX):
        import timm

        if (found := timm.get_pretrained_cfg(name.removeprefix(TIMM_PREFIX))) is not None:
            weights = "DEFAULT" if found.has_weights and not is_random else ""
            is_fixed = found.fixed_input_size
            least = (found.input_size if is_fixed else found.min_input_size or (1,))[-1]
    else:
        members = get_model_weights(name).__members__
        weights = "DEFAULT" if members and not is_random else ""
        given = [members[weights]] if weights else members.values()
        # A transformer's is the only one that it takes; of random weights it is the smallest.
        least = min((member.meta["min_size"][0] for member in given), default=1)
    return NetworkFacts(weights, *input_normalisation(name, weights), least, is_fixed)


def has_layer_norm(name: str, classes: int) -> bool:
    """Return whether a network, which is built for this, has one: transformers and their like."""
    with torch.random.fork_rng([]):
        network = build_network(name, classes)
    return any(isinstance(module, nn.LayerNorm) for module in network.modules())
