# Copyright (c) The mokd_det authors.
"""Classification networks by name: torchvision's, timm's, and one's own."""

import functools
import logging
import warnings
from typing import Any

import torch
import torchvision
from detectron2.utils.file_io import PathManager
from torch import nn

from ..registry import Registry

logger = logging.getLogger(__name__)

CLASSIFIERS = Registry("CLASSIFIERS", "MODEL.CLASSIFIER.NAME")
"""
One's own networks: functions, or classes, called as ``build(num_classes, **options)`` with the
options of MODEL.CLASSIFIER.OPTIONS, which return an ``nn.Module``. It maps normalised images
(N, 3, H, W) to logits (N, num_classes), and its last part is a submodule ("fc", "classifier",
"head", "heads", or what MODEL.CLASSIFIER.HEAD names) that runs once, takes one tensor, and whose
output are the logits.
"""

TIMM_PREFIX = "timm."
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@CLASSIFIERS.register("vit_tiny_16")
def vit_tiny_16(num_classes: int, image_size: int = 224, **options: Any) -> nn.Module:
    """torchvision's vision transformer at the size of DeiT-Ti (Touvron et al. 2021): 5.7 M."""
    return torchvision.models.VisionTransformer(
        image_size=image_size,
        patch_size=16,
        num_layers=12,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
        num_classes=num_classes,
        **options,
    )


def build_network(
    name: str,
    num_classes: int,
    weights: str = "",
    strict: bool = True,
    options: dict[str, Any] | None = None,
    option: str | None = None,
) -> nn.Module:
    """
    Args:
        name: see ``MODEL.CLASSIFIER.NAME``.
        num_classes: C.
        weights: see ``MODEL.CLASSIFIER.WEIGHTS``.
        strict: False: weights for another number of classes are fine; the layer for them stays
            random, and is logged.
        options: for the network's constructor.
        option: the config key of the weights, for messages.

    Returns:
        The stock network.

    Raises:
        ValueError: unknown name, options or weights, or weights that do not fit.
        ImportError: timm is not installed.
    """
    option = option or "MODEL.CLASSIFIER.WEIGHTS"
    options = dict(options or {})
    make, state = _resolve(name, weights, option)
    try:
        network = make(num_classes=num_classes, **options)
    except TypeError as error:
        raise ValueError(
            f"MODEL.CLASSIFIER.OPTIONS {options} do not suit '{name}': {error}"
        ) from error
    if state is not None:
        new_classes = None if strict else num_classes
        _load(network, state(), new_classes, f"{option} '{weights}'", name)
    return network


def _resolve(name, weights, option, named_by="MODEL.CLASSIFIER.NAME"):
    """The constructor of a random network, and a function that returns a state dict (or None)."""
    is_file = bool(weights) and PathManager.isfile(weights)
    state = functools.partial(_state_of_file, weights) if is_file else None
    if name in CLASSIFIERS:
        if weights and not is_file:
            raise ValueError(f"{option} is '{weights}': expected '' or a file for '{name}'.")
        return CLASSIFIERS.get(name), state
    if name.startswith(TIMM_PREFIX):
        return _resolve_timm(name, weights, option, state, named_by)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(
            f"{named_by} is '{name}': expected a classification model of torchvision "
            f"{torchvision.__version__} ({', '.join(known)}), '{TIMM_PREFIX}X' for timm's X, or "
            f"one registered in CLASSIFIERS ({', '.join(CLASSIFIERS) or 'none'})."
        )
    if weights and not is_file:
        member = _torchvision_weights(name, weights, option)
        state = functools.partial(member.get_state_dict, progress=False, check_hash=True)
    return functools.partial(_make_torchvision, name, implied_options(name, weights)), state


def implied_options(name: str, weights: str) -> dict[str, Any]:
    """
    Args:
        name, weights: as for :func:`build_network`.

    Returns:
        Options of the constructor that torchvision's builders set for these weights, and that are
        not in a state dict: a network that was trained from them needs them as well.
    """
    if not weights or name in CLASSIFIERS or name.startswith(TIMM_PREFIX):
        return {}
    if name in ("googlenet", "inception_v3"):
        return {"transform_input": True}
    if name.startswith("vit_"):
        enum = torchvision.models.get_model_weights(name)
        member = enum.DEFAULT if weights == "DEFAULT" else enum.__members__.get(weights)
        return {"image_size": member.meta["min_size"][0]} if member else {}
    return {}


def _make_torchvision(name, defaults, **options):
    with warnings.catch_warnings():  # on how long the initialisation of Inception takes
        warnings.filterwarnings("ignore", message=".*weight initialization.*")
        return torchvision.models.get_model(name, weights=None, **{**defaults, **options})


def _resolve_timm(name, weights, option, state, named_by):
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"{named_by} '{name}' needs timm: pip install -e '.[timm]' in the checkout"
        ) from error
    bare = name[len(TIMM_PREFIX) :]
    if not timm.is_model(bare):
        close = timm.list_models(f"*{bare.split('.')[0]}*")[:8]
        raise ValueError(
            f"{named_by} is '{name}', which timm {timm.__version__} does not have. "
            f"Similar: {', '.join(close) or 'none'}."
        )

    make = functools.partial(timm.create_model, bare, pretrained=False)
    if state is not None or not weights:
        return make, state
    if weights != "DEFAULT":
        raise ValueError(
            f"{option} is '{weights}': expected '', 'DEFAULT' or a file for '{name}' (timm names "
            "its weights in the model, as in 'timm.resnet50.a1_in1k')."
        )
    return make, lambda: timm.create_model(bare, pretrained=True).state_dict()


def _torchvision_weights(name, weights, option):
    enum = torchvision.models.get_model_weights(name)
    names = [member.name for member in enum]
    if weights == "DEFAULT" and names:
        return enum.DEFAULT
    if weights not in names:
        raise ValueError(
            f"{option} is '{weights}': neither a file nor one of '', 'DEFAULT', "
            f"{', '.join(map(repr, names))} for {name}. On a machine without internet, name a "
            "local file (datasets/prepare_pretrained.py fetches MobileNetV2's)."
        )
    return enum[weights]


def _state_of_file(path):
    state = torch.load(PathManager.get_local_path(path), map_location="cpu", weights_only=True)
    return state.get("model", state)


def _load(network, state, new_classes, source, name):
    """``new_classes``: their number, if layers for another number may stay random; else None."""
    expected = network.state_dict()
    # The counter of batches came with torch 0.4.1; older files lack it and need it for nothing.
    # Heads for training only (of Inception and GoogLeNet) are not built without being asked for.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in expected and not k.lower().startswith("aux")]
    shapes = [k for k in expected if k in state and expected[k].shape != state[k].shape]
    new = [
        k
        for k in shapes
        if expected[k].shape[:1] == (new_classes,) and expected[k].shape[1:] == state[k].shape[1:]
    ]
    shapes = [
        f"{k} (file {tuple(state[k].shape)}, model {tuple(expected[k].shape)})"
        for k in shapes
        if k not in new
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{source} does not fit {name} with this number of classes and options: missing "
            f"{_shortened(missing)}, unexpected {_shortened(unexpected)}, of another shape "
            f"{_shortened(shapes)}."
        )
    if new:
        logger.info(f"{source} is for another number of classes: {', '.join(new)} start random.")
    fits = {k: v for k, v in state.items() if k in expected and k not in new}
    network.load_state_dict(fits, strict=False)


def _shortened(keys, most=6):
    return (", ".join(keys[:most]) or "none") + (f", ... ({len(keys)})" if len(keys) > most else "")


def input_normalisation(name: str, weights: str) -> tuple[list[float], list[float]]:
    """
    Args:
        name, weights: ``MOKD.TEACHER.CLASSIFIER`` and ``.WEIGHTS``.

    Returns:
        Mean and standard deviation of each of R, G, B in [0, 255] that these weights want;
        ImageNet's where they do not say, and for a file.

    Raises:
        ValueError, ImportError: as :func:`build_network`.
    """
    _resolve(name, weights, "MOKD.TEACHER.WEIGHTS", named_by="MOKD.TEACHER.CLASSIFIER")
    if weights and PathManager.isfile(weights):
        return list(IMAGENET_MEAN), list(IMAGENET_STD)
    if name.startswith(TIMM_PREFIX):
        import timm

        found = timm.get_pretrained_cfg(name[len(TIMM_PREFIX) :], allow_unregistered=True)
        if found is not None:
            return [255 * x for x in found.mean], [255 * x for x in found.std]
    elif name not in CLASSIFIERS and weights:
        preset = _torchvision_weights(name, weights, "MOKD.TEACHER.WEIGHTS").transforms()
        return [255 * x for x in preset.mean], [255 * x for x in preset.std]
    return list(IMAGENET_MEAN), list(IMAGENET_STD)
