# Copyright (c) The mokd_det authors.
"""Reading features inside a classifier, and replacing the last of them."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..teachers import PRE_LOGITS
from .classifier import Classifier


@dataclasses.dataclass(frozen=True)
class TapShape:
    """
    Attributes:
        kind: "vector" (N, C), "map" (N, C, H, W), "map_channels_last" (N, H, W, C; Swin), or
            "tokens" (N, L, C; vision transformers).
        channels: C.
    """

    kind: str
    channels: int


@contextlib.contextmanager
def replace_taps(
    classifier: Classifier,
    names: Sequence[str],
    function: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Iterator[None]:
    """
    While the context lasts, the tapped features of a forward pass go through ``function``, and its
    replacement of the last one goes on through the network.

    Args:
        classifier: whose forward pass it is.
        names: of submodules, whose output is tapped, or ``PRE_LOGITS``; in the order in which they
            run.
        function: from all taps to what they are replaced by.

    Raises:
        RuntimeError: a tapped module did not run exactly once. A distillation that is silently
            absent, or counts a feature twice, would go unnoticed otherwise.
    """
    found: dict[str, Any] = {}

    def take(name: str, value: Any) -> Any:
        if name in found:
            raise RuntimeError(
                f"'{name}' of the classifier ran more than once in one forward pass; distillation "
                "needs exactly one: tap another submodule."
            )
        found[name] = value
        if len(found) == len(names):
            value = function({name: found[name] for name in names})[name]
        # A copy goes on: what follows may work in place (the dropout of EfficientNet's head, a
        # ReLU), which must not change the feature that is read, and cannot work on a view.
        return value.clone()

    handles = [_hooked(classifier, name, take) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in names if name not in found]:
        raise RuntimeError(f"{missing} of the classifier did not run in its forward pass.")


def _hooked(classifier: Classifier, name: str, take: Callable[[str, Any], Any]) -> RemovableHandle:
    if name == PRE_LOGITS:
        return classifier.head.register_forward_pre_hook(
            lambda _module, args: (take(name, args[0]),)
        )
    module = classifier.network.get_submodule(name)
    return module.register_forward_hook(lambda _module, _args, output: take(name, output))


@torch.no_grad()
def find_taps(
    classifier: Classifier, names: Sequence[str], size: int, option: str
) -> dict[str, TapShape]:
    """
    Look at the features with an image of zeros.

    Args:
        classifier: its network is run.
        names: submodules or ``PRE_LOGITS``.
        size: side of the image in pixels.
        option: the config key of the names, for messages.

    Returns:
        In the order in which they run.

    Raises:
        ValueError: a name that does not exist, runs more than once, or is no features.
    """
    _check_names(classifier, names, option)
    found: dict[str, Any] = {}  # in the order of insertion, which is that of running

    def keep(features: dict[str, Tensor]) -> dict[str, Tensor]:
        found.update(features)
        return features

    training = classifier.training
    classifier.eval()
    with contextlib.ExitStack() as stack:
        for name in dict.fromkeys(names):
            stack.enter_context(replace_taps(classifier, [name], keep))
        try:
            classifier.network(torch.zeros(1, 3, size, size, device=classifier.device))
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"{type(classifier.network).__name__} does not take images of {size} x {size}, or "
                f"{option} {list(names)} do not suit it: {error}"
            ) from error
        finally:
            classifier.train(training)
    return {name: _shape_of(name, value, option) for name, value in found.items()}


def _check_names(classifier: Classifier, names: Sequence[str], option: str) -> None:
    modules = dict(classifier.network.named_modules())
    for name in names:
        if name != PRE_LOGITS and (not name or name not in modules):
            raise ValueError(
                f"{option} has '{name}', which {type(classifier.network).__name__} does not have. "
                f"Use '{PRE_LOGITS}' or a submodule: {_listed(modules)}."
            )
        if f"{name}.".startswith(f"{classifier.head_name}."):
            raise ValueError(
                f"{option} has '{name}', which is in the head '{classifier.head_name}': tap what "
                "comes before it, or name a smaller head in MODEL.CLASSIFIER.HEAD."
            )


def _shape_of(name: str, value: Any, option: str) -> TapShape:
    if isinstance(value, torch.Tensor) and value.dim() == 2:
        return TapShape("vector", value.shape[1])
    if isinstance(value, torch.Tensor) and value.dim() == 3:
        return TapShape("tokens", value.shape[2])
    if isinstance(value, torch.Tensor) and value.dim() == 4:
        _, a, b, c = value.shape
        if a == b != c:  # images are square, so are maps
            return TapShape("map_channels_last", c)
        return TapShape("map", a)
    got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
    raise ValueError(
        f"{option} has '{name}', whose output ({got}) is no features: expected a tensor (N, C), "
        "(N, C, H, W), (N, H, W, C) or (N, L, C)."
    )


def _listed(modules, most=40):
    shallow = [name for name in modules if name and name.count(".") < 2]
    return ", ".join(shallow[:most]) + (", ..." if len(shallow) > most else "")


def as_map(features: Tensor, shape: TapShape) -> Tensor:
    """
    Args:
        features: as the tap gives them.
        shape: of the tap.

    Returns:
        (N, C, H, W). A vector has H = W = 1. Tokens are those of the patches, on their
        square grid; a class token before them is left out.
    """
    if shape.kind == "vector":
        return features[:, :, None, None]
    if shape.kind == "map":
        return features
    if shape.kind == "map_channels_last":
        return features.permute(0, 3, 1, 2)
    side = math.isqrt(features.shape[1])
    patches = features[:, features.shape[1] - side**2 :]
    return patches.transpose(1, 2).unflatten(2, (side, side))


def common_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """
    Average two maps to the coarser grid of both, in each direction. So a map beside a vector is
    pooled.

    Args:
        student, teacher: (N, C_s, H_s, W_s) and (N, C_t, H_t, W_t) of the same images.

    Returns:
        (N, C_s, H, W) and (N, C_t, H, W).
    """
    height, width = (min(student.shape[d], teacher.shape[d]) for d in (-2, -1))

    def pooled(x: Tensor) -> Tensor:
        is_coarse = x.shape[-2:] == (height, width)
        return x if is_coarse else F.adaptive_avg_pool2d(x, (height, width))

    return pooled(student), pooled(teacher)
