# Copyright (c) The mokd_det authors.
"""What ``MODEL.TORCHVISION_DETECTOR.OPTIONS`` may be: arguments of torchvision's constructors."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torchvision.models import get_model_builder

from ..config.bounds import Bound, integer, number, refusal, rows

NODE = "MODEL.TORCHVISION_DETECTOR"
ELSEWHERE = {
    "weights": f"{NODE}.WEIGHTS",
    "weights_backbone": f"{NODE}.BACKBONE_WEIGHTS",
    "num_classes": f"{NODE}.NUM_CLASSES",
    "pretrained": f"{NODE}.WEIGHTS",
    "pretrained_backbone": f"{NODE}.BACKBONE_WEIGHTS",
    "progress": "nothing: leave it out",
}
COUNT, POSITIVE, SHARE = integer(1), number(0, above=True), number(0, 1)
# By the end of the name. All others are modules and functions, which a config cannot have.
BOUNDS: dict[str, Bound] = {
    "min_size": COUNT | rows(COUNT, least=1),
    "max_size": COUNT,
    "image_mean": rows(number(), 3),
    "image_std": rows(POSITIVE, 3),
    "bbox_reg_weights": rows(POSITIVE, 4),
    "center_sampling_radius": POSITIVE,
    "trainable_backbone_layers": integer(0),
    "_thresh": SHARE,
    "_fraction": SHARE,
    "_per_img": COUNT,
    "_per_image": COUNT,
    "_top_n_train": COUNT,
    "_top_n_test": COUNT,
    "topk_candidates": COUNT,
    "num_keypoints": COUNT,
}


def check_values(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that is set elsewhere, or a value out of its bounds."""
    for key, value in options.items():
        if key in ELSEWHERE:
            raise ValueError(f"{NODE}.OPTIONS has {key}: that is set by {ELSEWHERE[key]}.")
        bound = _bound_of(key)
        if bound is not None and not bound.holds(value):
            raise ValueError(refusal(f"{NODE}.OPTIONS.{key}", value, bound))


def check_names(options: Mapping[str, Any], name: str, network: nn.Module) -> None:
    """
    Raise ValueError for options that the constructors of ``network``, torchvision's detector of
    this name, do not have or that a config cannot set. Some take any name and leave it unread.
    """
    kinds: list[Any] = list(type(network).__mro__)
    functions = [get_model_builder(name), *(kind.__init__ for kind in kinds)]
    known = {p.name for f in functions for p in inspect.signature(f).parameters.values()}
    known = {key for key in known - ELSEWHERE.keys() if _bound_of(key) is not None}
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"it has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")


def _bound_of(key: str) -> Bound | None:
    return next((bound for end, bound in BOUNDS.items() if key.endswith(end)), None)
