# Copyright (c) The mokd_det authors.
"""Reading features inside a module, and replacing them for what comes after."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..teachers import PRE_LOGITS
from .classifier import Classifier, shallow_names
from .loading import shortened
from .state import eval_mode

Replacement = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@contextlib.contextmanager
def replace_backbone_features(module: nn.Module, function: Replacement) -> Iterator[None]:
    """
    While the context lasts, every output of ``module``, e.g. a detector's backbone, passes through
    ``function``. The hook is attached to the module object, so no renaming (by
    DistributedDataParallel or a compiler) can make it miss; outside, the module is stock.
    TypeError: the output is no dict. RuntimeError: the module did not run exactly once inside the
    context. A distillation that is silently absent, or counts a feature twice, would go unnoticed
    otherwise.
    """
    backbone, calls = f"The student's backbone ({type(module).__name__})", 0

    def hook(_module, _inputs, output):
        nonlocal calls
        calls += 1
        if not isinstance(output, dict):
            kind = type(output).__name__
            raise TypeError(f"{backbone} returned a {kind}: distillation needs dict[str, Tensor].")
        return function(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise RuntimeError(
            f"{backbone} ran {calls} times in one forward pass of the student; distillation needs "
            "exactly one."
        )


@dataclasses.dataclass(frozen=True)
class TapShape:
    """
    ``kind``: "vector" (N, C), "map" (N, C, H, W), "map_channels_last" (N, H, W, C; Swin), or
    "tokens" (N, L, C; vision transformers). ``channels``: C.
    """

    kind: str
    channels: int


@contextlib.contextmanager
def replace_taps(
    classifier: Classifier, names: Sequence[str], function: Replacement
) -> Iterator[None]:
    """
    While the context lasts, the tapped features of a forward pass go through ``function``, and its
    replacement of the last one goes on through the network. ``names``: of submodules, whose output
    is tapped, or ``PRE_LOGITS``; in the order in which they run. RuntimeError: not exactly once.
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
        return value.clone() if isinstance(value, Tensor) else value

    with contextlib.ExitStack() as hooks:
        for name in names:
            hooks.callback(_hooked(classifier, name, take).remove)
        yield
    if missing := [name for name in names if name not in found]:
        raise RuntimeError(f"{missing} of the classifier did not run in its forward pass.")


def _hooked(classifier: Classifier, name: str, take: Callable[[str, Any], Any]) -> RemovableHandle:
    if name == PRE_LOGITS:
        return classifier.head.register_forward_pre_hook(lambda _, args: (take(name, args[0]),))
    module = classifier.network.get_submodule(name)
    return module.register_forward_hook(lambda _module, _args, output: take(name, output))


@torch.no_grad()
def find_taps(
    classifier: Classifier, names: Sequence[str], size: int, option: str
) -> dict[str, TapShape]:
    """
    Look at features with an image of zeros, ``size`` pixels wide; return them in the order in which
    they run. ``names``: submodules or ``PRE_LOGITS``, of the config key ``option`` (for messages).
    ValueError: a name that does not exist, runs more than once, or is no features.
    """
    _check_names(classifier, names, option)
    found: dict[str, Any] = {}  # in the order of insertion, which is that of running

    def keep(features: dict[str, Tensor]) -> dict[str, Tensor]:
        found.update(features)
        return features

    with eval_mode(classifier), contextlib.ExitStack() as stack:
        for name in dict.fromkeys(names):
            stack.enter_context(replace_taps(classifier, [name], keep))
        try:
            classifier.network(torch.zeros(1, 3, size, size, device=classifier.device))
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"{type(classifier.network).__name__} does not take images of {size} x {size}, or "
                f"{option} {list(names)} do not suit it: {error}"
            ) from error
    return {name: _shape_of(name, value, option) for name, value in found.items()}


def check_batch_norm(classifier: Classifier, size: int, count: int) -> None:
    """
    Raise ValueError if a BatchNorm sees fewer than three values a channel in a training batch of
    ``count`` images, ``size`` pixels wide: of one it has no statistics, of two only a sign.
    """
    positions: dict[str, int] = {}

    def look(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            positions.setdefault(name, inputs[0][0, 0].numel())

        return hook

    with torch.no_grad(), eval_mode(classifier), contextlib.ExitStack() as stack:
        for name, module in classifier.network.named_modules():
            # SyncBatchNorm has the images of all processes.
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                stack.callback(module.register_forward_pre_hook(look(name)).remove)
        classifier.network(torch.zeros(1, 3, size, size, device=classifier.device))
    for name, number in positions.items():
        if count * number < 3:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH is too small: a process trains on {count} images at once "
                "(SOLVER.MICRO_BATCHES divides them, too), and at INPUT.CLASSIFICATION.SIZE_TRAIN "
                f"{size} the BatchNorm '{name}' sees {count * number} value(s) a channel: expected "
                "3 or more. Use more images at once, or larger ones."
            )


def _check_names(classifier: Classifier, names: Sequence[str], option: str) -> None:
    modules = dict(classifier.network.named_modules())
    for name in names:
        if name != PRE_LOGITS and (not name or name not in modules):
            raise ValueError(
                f"{option} has '{name}', which {type(classifier.network).__name__} does not have. "
                f"Use '{PRE_LOGITS}' or a submodule: {shortened(shallow_names(modules), 40)}."
            )
        if f"{name}.".startswith(f"{classifier.head_name}."):
            raise ValueError(
                f"{option} has '{name}', which is in the head '{classifier.head_name}': tap what "
                "comes before it, or name a smaller head in MODEL.CLASSIFIER.HEAD."
            )


def _shape_of(name: str, value: Any, option: str) -> TapShape:
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    if len(shape) == 2:
        return TapShape("vector", shape[1])
    if len(shape) == 3:
        return TapShape("tokens", shape[2])
    if len(shape) == 4:
        _, a, b, c = shape  # images are square, so are maps
        return TapShape("map_channels_last", c) if a == b != c else TapShape("map", a)
    raise ValueError(
        f"{option} has '{name}', whose output ({shape or type(value).__name__}) is no features: "
        "expected a tensor (N, C), (N, C, H, W), (N, H, W, C) or (N, L, C)."
    )


def as_map(features: Tensor, shape: TapShape) -> Tensor:
    """(N, C, H, W). A vector has H = W = 1; tokens are the patches', without a class token."""
    if shape.kind == "map":
        return features
    if shape.kind == "vector":
        return features[:, :, None, None]
    if shape.kind == "map_channels_last":
        return features.permute(0, 3, 1, 2)
    side = math.isqrt(features.shape[1])
    patches = features[:, features.shape[1] - side**2 :]
    return patches.transpose(1, 2).unflatten(2, (side, side))


def common_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average two maps (N, C, H, W) to their coarser grid; a map beside a vector is pooled."""
    grid = min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1])

    def pooled(x: Tensor) -> Tensor:
        return x if x.shape[-2:] == grid else F.adaptive_avg_pool2d(x, grid)

    return pooled(student), pooled(teacher)
