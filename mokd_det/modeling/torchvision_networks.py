# Copyright (c) The mokd_det authors.
"""Building ``torchvision.models.detection`` by name, with torchvision's own rules and weights."""

import contextlib
import inspect
import logging
import os
import typing
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import nn
from torchvision.models import get_model, get_model_builder, get_model_weights, list_models
from torchvision.models import detection
from torchvision.models._api import WeightsEnum

from ..registry import did_you_mean
from .loading import is_file, shortened
from .networks import differences, state_of_file, torchvision_state, torchvision_weights
from .torchvision_options import NODE, check_names, check_values

logger = logging.getLogger(__name__)

# The parts that are built for a number of classes (or of keypoints).
HEADS = (
    "roi_heads.box_predictor",
    "roi_heads.mask_predictor",
    "roi_heads.keypoint_predictor",
    "head.classification_head",
)
COCO_LABELS = [category["id"] for category in COCO_CATEGORIES if category["isthing"]]
COCO_NAMES = [category["name"] for category in COCO_CATEGORIES if category["isthing"]]


def detector_names() -> list[str]:
    """Return the names of torchvision's detectors."""
    return list_models(module=detection)


def check_detector_name(name: str, option: str) -> None:
    """Raise ValueError, with the nearest names, unless torchvision has this detector."""
    if name not in (known := detector_names()):
        raise ValueError(
            f"{option} is '{name}': expected a detector of torchvision. "
            f"{did_you_mean(name, known)} It has {', '.join(known)}."
        )


def labels_of(cfg: CfgNode) -> list[int]:
    """
    Return the label of each class in torchvision's numbering, where 0 is the background: 1, 2, ...,
    or with ``COCO_IDS`` the ids of COCO's 80 categories, which have gaps up to 90.
    """
    options = cfg.MODEL.TORCHVISION_DETECTOR
    if not options.COCO_IDS:
        return list(range(1, options.NUM_CLASSES + 1))
    if options.NUM_CLASSES != len(COCO_LABELS):
        raise ValueError(
            f"{NODE}.COCO_IDS is True, but NUM_CLASSES is {options.NUM_CLASSES}: the heads of "
            f"torchvision's COCO weights are for COCO's {len(COCO_LABELS)} classes. Set it to "
            "False for other classes: heads start from random weights then."
        )
    return list(COCO_LABELS)


def build_torchvision_detector(cfg: CfgNode) -> tuple[nn.Module, list[str]]:
    """
    Return the network of ``MODEL.TORCHVISION_DETECTOR``, as torchvision's own constructor makes it,
    on the device of the config; and the names of parameters that are random because the weights are
    for other classes. ValueError: an unknown name, options that do not suit it, or weights of
    another model or that cannot be had.
    """
    options = cfg.MODEL.TORCHVISION_DETECTOR
    check_detector_name(options.NAME, f"{NODE}.NAME")
    further = {key.lower(): value for key, value in options.OPTIONS.items()}
    check_values(further)
    number = max(labels_of(cfg)) + 1
    build = _Builder(options.NAME, further, options.DOWNLOAD)
    network = build(options.WEIGHTS, options.BACKBONE_WEIGHTS, number)
    return network.to(cfg.MODEL.DEVICE), build.random


class _Builder:
    """
    torchvision decides by the presence of weights what is frozen (BatchNorm, first layers) and with
    which epsilon; so its constructor is always given the weights, whose values come from us.
    """

    def __init__(self, name: str, options: dict[str, Any], download: bool):
        self.name, self.options, self.download = name, options, download
        self.random: list[str] = []  # names of parameters, where the weights are for other classes

    def __call__(self, weights: str, backbone_weights: str, number: int) -> nn.Module:
        option = f"{NODE}.WEIGHTS"
        if not weights and not backbone_weights and "trainable_backbone_layers" in self.options:
            raise ValueError(
                f"{NODE}.OPTIONS has trainable_backbone_layers, but WEIGHTS and BACKBONE_WEIGHTS "
                "are empty, and of random layers all are trained: remove it."
            )
        if not weights:
            member = self._backbone_member(backbone_weights) if backbone_weights else None
            source = f"{NODE}.BACKBONE_WEIGHTS '{backbone_weights}'"
            return self._make(None, member, number, source)
        source = f"{option} '{weights}'"
        if named_file := is_file(weights):
            member = self._member_of_file(weights)
        else:
            member = torchvision_weights(self.name, weights, option)
        if member is None:
            return self._of_own_training(weights, number, option)
        if number == len(member.meta["categories"]) and self._has_keypoints_of(member):
            network = self._make(member, None, number, source, download=not named_file)
        else:
            of_weights = self._make(member, None, None, source, download=not named_file)
            network = self._with_heads(
                of_weights, number, f"{source} is for other classes or keypoints"
            )
        if named_file:
            self._load(network, weights, option)
        return network

    def _of_own_training(self, weights, number, option):
        """It began with the backbone's weights or with none: SSDlite has other layers then."""
        errors = []
        for backbone in dict.fromkeys([self._usual_backbone(), None]):
            network = self._make(None, backbone, number, "", download=False)
            try:
                self._load(network, weights, option)
            except ValueError as error:
                errors.append(error)
            else:
                return network
        raise errors[0]

    def _make(self, member, backbone, number, source, download=True):
        """``member``, ``backbone``: weights; at most one of them, and its values are loaded."""
        asked = member or backbone
        options = dict(self.options)
        if member is not None and number is None:
            options.pop("num_keypoints", None)  # of the weights, until the head is exchanged
        state = {}
        if asked is not None:
            real = download and self.download
            state = torchvision_state(asked, source) if real else _random_state(asked)
        given = {} if number is None else {"num_classes": number}
        try:
            with _states(state):
                network = get_model(
                    self.name, weights=member, weights_backbone=backbone, **given, **options
                )
            check_names(self.options, self.name, network)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{NODE}.OPTIONS {self.options} do not suit '{self.name}': {error}"
            ) from error
        return network

    def _with_heads(self, network, number, why):
        """Exchange what is built for a number of classes; the rest of those parts is kept."""
        fresh = self._make(None, None, number, "")
        new = []
        for path in HEADS:
            parent, _, name = path.rpartition(".")
            try:
                old, head = network.get_submodule(path), fresh.get_submodule(path)
            except AttributeError:
                continue
            state = old.state_dict()
            _, _, shapes = differences(head.state_dict(), state)
            head.load_state_dict({k: v for k, v in state.items() if k not in shapes}, strict=False)
            setattr(network.get_submodule(parent), name, head)
            new += [f"{path}.{key}" for key in shapes]
        self.random += new
        if self.download:  # else MODEL.WEIGHTS has them
            logger.info(f"{why}: {shortened(new)} start random.")
        return network

    def _has_keypoints_of(self, member):
        usual = len(member.meta.get("keypoint_names", ()))
        return self.options.get("num_keypoints", usual) == usual

    def _load(self, network, file, option):
        state = state_of_file(file, option)
        expected = network.state_dict()
        missing, unexpected, shapes = differences(expected, state)
        in_heads = [key for key in shapes if key.startswith(HEADS)]
        unexpected = [key for key in unexpected if not key.endswith("num_batches_tracked")]
        wrong = [key for key in shapes if key not in in_heads]
        if missing or unexpected or wrong:
            raise ValueError(
                f"{option} '{file}' is not of {self.name} with these options: missing "
                f"{shortened(missing)}, unexpected {shortened(unexpected)}, of another shape "
                f"{shortened(wrong)}."
            )
        self.random += in_heads
        if in_heads:
            logger.info(f"{option} '{file}' is for other classes: {', '.join(in_heads)} random.")
        network.load_state_dict({k: v for k, v in state.items() if k not in in_heads}, strict=False)

    def _member_of_file(self, file):
        """The weights that torchvision publishes under this file name, or None."""
        name = os.path.basename(file)
        members = list(get_model_weights(self.name))
        return next((m for m in members if os.path.basename(m.url) == name), None)

    def _backbone_parameter(self):
        return inspect.signature(get_model_builder(self.name)).parameters["weights_backbone"]

    def _usual_backbone(self):
        return self._backbone_parameter().default

    def _backbone_member(self, name):
        kinds = typing.get_args(self._backbone_parameter().annotation)  # of Optional[...]
        members = next(k for k in kinds if issubclass(k, WeightsEnum)).__members__
        if name not in members:
            raise ValueError(
                f"{NODE}.BACKBONE_WEIGHTS is '{name}': expected '' or one of "
                f"{', '.join(map(repr, sorted(members)))} for {self.name}."
            )
        return members[name]


@contextlib.contextmanager
def _states(state: dict[str, Any]) -> Iterator[None]:
    """Within it, torchvision's constructors get this state dict instead of downloading one."""
    before = WeightsEnum.get_state_dict
    WeightsEnum.get_state_dict = lambda self, *args, **kwargs: state
    try:
        yield
    finally:
        WeightsEnum.get_state_dict = before


def _random_state(member: Any) -> dict[str, Any]:
    """A state dict of the model of these weights, with random values."""
    for name in list_models():
        if type(member) is get_model_weights(name):
            further = {"weights_backbone": None} if name in detector_names() else {}
            return get_model(name, weights=None, **further).state_dict()
    raise ValueError(f"torchvision has no model for {member}.")
