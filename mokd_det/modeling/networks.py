# Copyright (c) The mokd_det authors.
"""Classification networks by name: torchvision's, timm's, and one's own."""

import functools
import logging
import os
import warnings
from typing import Any

import torch
import torchvision
from detectron2.config import CfgNode
from torch import Tensor, nn
from torchvision.models import get_model_weights, list_models

from ..untrusted import read_checkpoint
from ..registry import Registry, did_you_mean
from .loading import NO_DOWNLOAD, is_file, local_file, shortened

logger = logging.getLogger(__name__)

CLASSIFIERS = Registry("CLASSIFIERS", "MODEL.CLASSIFIER.NAME")
"""
One's own networks: functions, or classes, called as ``build(num_classes, **options)`` with the
options of MODEL.CLASSIFIER.OPTIONS. The module maps normalised images (N, 3, H, W) to logits
(N, num_classes). Its last part is a submodule ("fc", "classifier", "head", "heads", or what
MODEL.CLASSIFIER.HEAD names) that runs once, takes one tensor, and returns the logits.
"""

HEADS = ("fc", "classifier", "head", "heads")
TIMM_PREFIX = "timm."
WEIGHTS = "MODEL.CLASSIFIER.WEIGHTS"
# With torchvision's own weights, these convert images from the others' normalisation.
TRANSFORM_INPUT = ("googlenet", "inception_v3")
# Arguments by which timm and torchvision load files of weights.
NOT_OPTIONS = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
NOT_OPTIONS |= {"weights", "weights_backbone", "cache_dir"}
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@CLASSIFIERS.register("vit_tiny_16")
def vit_tiny_16(num_classes: int, image_size: int = 224, **options: Any) -> nn.Module:
    """torchvision's vision transformer at the size of DeiT-Ti (Touvron et al. 2021): 5.7 M."""
    size = {"num_layers": 12, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    return torchvision.models.VisionTransformer(
        image_size=image_size, patch_size=16, num_classes=num_classes, **size, **options
    )


def build_network(
    name: str,
    num_classes: int,
    weights: str = "",
    strict: bool = True,
    options: dict[str, Any] | None = None,
    option: str = WEIGHTS,
) -> nn.Module:
    """
    Args:
        name, weights: see ``MODEL.CLASSIFIER``.
        strict: False: of weights for another number of classes, the last layer stays random.
        options: for the network's constructor.
        option: what named the weights, for messages.

    ValueError, ImportError: unknown name, options or weights; weights that do not fit; no timm.
    """
    options = dict(options or {})
    if loading := sorted(NOT_OPTIONS & options.keys()):
        raise ValueError(
            f"MODEL.CLASSIFIER.OPTIONS has {loading[0]}: weights are named in {WEIGHTS} only."
        )
    make, state = _resolve(name, weights, option)
    try:
        network = make(num_classes=num_classes, **options)
    except TypeError as error:
        raise ValueError(
            f"MODEL.CLASSIFIER.OPTIONS {options} do not suit '{name}': {error}"
        ) from error
    if state is not None:
        _load(network, state(), None if strict else num_classes, f"{option} '{weights}'", name)
    return network


def _resolve(name, weights, option, named_by="MODEL.CLASSIFIER.NAME"):
    """The constructor of a random network, and a function that returns a state dict (or None)."""
    named_file = is_file(weights)
    state = functools.partial(state_of_file, weights, option) if named_file else None
    if name in CLASSIFIERS:
        if weights and not named_file:
            raise ValueError(f"{option} is '{weights}': expected '' or a file for '{name}'.")
        return CLASSIFIERS.get(name), state
    if name.startswith(TIMM_PREFIX):
        return _resolve_timm(name, weights, option, state, named_by)
    registered = f"one registered in CLASSIFIERS ({', '.join(CLASSIFIERS) or 'none'})"
    check_torchvision_name(name, named_by, f", '{TIMM_PREFIX}X' for timm's X, or {registered}")
    if weights and not named_file:
        member = torchvision_weights(name, weights, option)
        state = functools.partial(torchvision_state, member, f"{option} '{weights}'")
    return functools.partial(make_torchvision, name, implied_options(name, weights)), state


def check_name(name: str, option: str) -> None:
    """Raise ValueError, or ImportError without timm, unless there is a network of this name."""
    _resolve(name, "", WEIGHTS, option)


def is_classifier_name(name: str) -> bool:
    """Return whether a name is a classifier's; timm's is recognised by its prefix."""
    known = name in CLASSIFIERS or name in list_models(module=torchvision.models)
    return known or name.startswith(TIMM_PREFIX)


def check_torchvision_name(name: str, option: str, others: str = "") -> None:
    """Raise ValueError unless torchvision has it; ``others``: what else ``option`` takes."""
    if name not in (known := list_models(module=torchvision.models)):
        raise ValueError(
            f"{option} is '{name}': expected a classification model of torchvision "
            f"{torchvision.__version__}{others}. {did_you_mean(name, known)} All are listed by "
            "torchvision.models.list_models(torchvision.models)."
        )


def torchvision_weights(name: str, weights: str, option: str) -> Any:
    """Return the member of torchvision's enum; ValueError with the choices if there is none."""
    members = get_model_weights(name).__members__  # "DEFAULT" is an alias
    if weights not in members:
        raise ValueError(
            f"{option} is '{weights}': neither a file nor one of "
            f"{', '.join(map(repr, sorted(['', *members])))} for {name}. On a machine without "
            "internet, name a local file (datasets/prepare_pretrained.py fetches MobileNetV2's)."
        )
    return members[weights]


def torchvision_state(member: Any, name: str) -> dict[str, Any]:
    """
    Return the state dict of torchvision's weights, from torch's cache or the internet. ValueError:
    there is none, or the cache has something else; ``name``: for the message.
    """
    try:
        # A file that is in the cache already is not compared with its hash.
        return member.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except NO_DOWNLOAD as error:
        raise ValueError(
            f"{name} cannot be downloaded ({getattr(error, 'reason', error)}). Download "
            f"{member.url} on a machine that can, and copy it here as {_cached(member)}; "
            "or begin with random weights (set it to '')."
        ) from error
    except Exception as error:  # a damaged or hostile file may end in any of them
        raise ValueError(
            f"{name}: {_cached(member)} in torch's cache is no file of plain weights: delete it."
        ) from error


def _cached(member: Any) -> str:
    return os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(member.url))


def make_torchvision(name: str, defaults: dict[str, Any], **options: Any) -> nn.Module:
    """Return a random network of torchvision."""
    with warnings.catch_warnings():  # on how long the initialisation of Inception takes
        warnings.filterwarnings("ignore", message=".*weight initialization.*")
        return torchvision.models.get_model(name, weights=None, **{**defaults, **options})


def implied_options(name: str, weights: str) -> dict[str, Any]:
    """
    Return the constructor's options that torchvision sets for these weights and that no state dict
    has: a network that was trained from them needs them as well.
    """
    if not weights or name in CLASSIFIERS:
        return {}
    if name in TRANSFORM_INPUT:
        return {"transform_input": True}
    members = get_model_weights(name).__members__ if name.startswith("vit_") else {}
    return {"image_size": members[weights].meta["min_size"][0]} if weights in members else {}


def _resolve_timm(name, weights, option, state, named_by):
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"{named_by} '{name}' needs timm: pip install -e '.[timm]' in the checkout"
        ) from error
    bare = name.removeprefix(TIMM_PREFIX)
    architecture, _, tag = bare.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(
            f"{named_by} is '{name}', which timm {timm.__version__} does not have. "
            f"{did_you_mean(architecture, timm.list_models(), TIMM_PREFIX)} All are listed by "
            "timm.list_models()."
        )
    if tag and bare not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        raise ValueError(
            f"{named_by} is '{name}', and timm {timm.__version__} has no such weights of "
            f"'{architecture}'. {did_you_mean(bare, tagged, TIMM_PREFIX)}"
        )
    make = functools.partial(timm.create_model, bare, pretrained=False)
    if state is not None or not weights:
        return make, state
    if weights != "DEFAULT":
        raise ValueError(
            f"{option} is '{weights}': expected '', 'DEFAULT' or a file for '{name}' (timm names "
            "its weights in the model, as in 'timm.resnet50.a1_in1k')."
        )
    return make, functools.partial(_timm_state, bare, option)


def _timm_state(name, option):
    import timm

    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except OSError as error:  # of the hub's client: there is neither internet nor a copy
        page = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", "timm")
        raise ValueError(
            f"{option} 'DEFAULT' of '{TIMM_PREFIX}{name}' cannot be downloaded ({error}). Download "
            f"model.safetensors of https://huggingface.co/{page} on a machine that can, copy it "
            f"here, and set {option} to the path of that file, or to '' for random weights."
        ) from error


def state_of_file(path: str, option: str) -> dict[str, Any]:
    """Return a state dict as :func:`mokd_det.untrusted.read_checkpoint` finds it; its errors."""
    return read_checkpoint(local_file(path, option), f"{option} '{path}'")["model"]


def classes_of_weights(node: CfgNode, weights: str, option: str) -> int:
    """
    Return the number of classes that weights of ``node``, a ``MODEL.CLASSIFIER``, are for; its
    own NUM_CLASSES where nothing says it. ``option`` names the weights. Errors: as
    :func:`build_network`.
    """
    name, usual = node.NAME, node.NUM_CLASSES
    if is_file(weights):
        options = {key.lower(): value for key, value in node.OPTIONS.items()}
        with torch.random.fork_rng([]):
            expected = build_network(name, usual, options=options).state_dict()
        given = state_of_file(weights, option)
        _, _, shapes = differences(expected, given)
        heads = {given[k].shape[:1] for k in shapes if given[k].shape[1:] == expected[k].shape[1:]}
        return heads.pop()[0] if len(heads) == 1 else usual
    if name.startswith(TIMM_PREFIX):
        import timm

        found = timm.get_pretrained_cfg(name.removeprefix(TIMM_PREFIX))
        return found.num_classes if found else usual
    return len(torchvision_weights(name, weights, option).meta["categories"])


def differences(expected: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[list[str], ...]:
    """Return the keys of a state dict that are missing, unexpected, and of another shape."""
    # The counter of batches came with torch 0.4.1; older files lack it and need it for nothing.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in expected]
    shapes = [k for k in expected if k in state and expected[k].shape != state[k].shape]
    return missing, unexpected, shapes


def _load(network, state, new_classes, source, name):
    """``new_classes``: their number, if layers for another number may stay random; else None."""
    expected = network.state_dict()
    missing, unexpected, shapes = differences(expected, state)
    # Heads for training only (of Inception and GoogLeNet) are not built without being asked for.
    unexpected = [k for k in unexpected if not k.lower().startswith("aux")]
    there = {k: (tuple(state[k].shape), tuple(expected[k].shape)) for k in shapes}
    new = [k for k, (file, model) in there.items() if model == (new_classes, *file[1:])]
    wrong = [f"{k} (file {there[k][0]}, model {there[k][1]})" for k in shapes if k not in new]
    if missing or unexpected or wrong:
        raise ValueError(
            f"{source} does not fit {name} with this number of classes and options: missing "
            f"{shortened(missing)}, unexpected {shortened(unexpected)}, of another shape "
            f"{shortened(wrong)}."
        )
    if new:
        logger.info(f"{source} is for another number of classes: {', '.join(new)} start random.")
    fits = {k: v for k, v in state.items() if k in expected and k not in new}
    network.load_state_dict(fits, strict=False)


def input_normalisation(name: str, weights: str) -> tuple[list[float], list[float]]:
    """
    Return mean and standard deviation of each of R, G, B in [0, 255] that the weights of
    ``MOKD.TEACHER.CLASSIFIER`` want; ImageNet's where they do not say, and for a file. Errors: as
    :func:`build_network`.
    """
    option = "MOKD.TEACHER.WEIGHTS"
    _resolve(name, weights, option, named_by="MOKD.TEACHER.CLASSIFIER")
    found: Any = None
    if not is_file(weights):
        if name.startswith(TIMM_PREFIX):
            import timm

            found = timm.get_pretrained_cfg(name.removeprefix(TIMM_PREFIX), allow_unregistered=True)
        elif weights and name not in CLASSIFIERS:
            found = torchvision_weights(name, weights, option).transforms()
    if found is None:
        return list(IMAGENET_MEAN), list(IMAGENET_STD)
    return [255 * x for x in found.mean], [255 * x for x in found.std]
