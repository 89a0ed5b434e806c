# Copyright (c) The mokd_det authors.
"""The meta-architecture of a classifier: a stock network with its preprocessing and loss."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..data.classification import Batch
from ..teachers import PRE_LOGITS
from .loading import StrictCheckpointer
from .networks import build_network

HEADS = ("fc", "classifier", "head", "heads")
# Weight of the heads for training only, of GoogLeNet (Szegedy et al. 2015) and Inception.
AUXILIARY = 0.3


@META_ARCH_REGISTRY.register()
class Classifier(nn.Module):
    """
    A classification network for Detectron2's trainer and evaluation.

    Its state is that of the network alone: checkpoints load into the network that torchvision
    (or timm) builds, under the same keys, and the other way round.

    Attributes:
        network: stock.
        head: its last part, whose output are the logits.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        network: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        num_classes: int,
        head: str = "",
        label_smoothing: float = 0,
    ):
        """
        Args:
            network: maps (N, 3, H, W) to (N, C) logits.
            pixel_mean, pixel_std: of R, G and B in [0, 255].
            num_classes: C.
            head: see ``MODEL.CLASSIFIER.HEAD``.
            label_smoothing: in [0, 1).

        Raises:
            ValueError: an option out of its range, or a network without such a head.
        """
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"MODEL.CLASSIFIER.LABEL_SMOOTHING is {label_smoothing}: expected a number in "
                "[0, 1)."
            )
        for option, values in (("PIXEL_MEAN", pixel_mean), ("PIXEL_STD", pixel_std)):
            if len(values) != 3:
                raise ValueError(f"MODEL.{option} is {list(values)}: a classifier takes 3 numbers.")
        self.network = network
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.head_name = _find_head(network, head)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode, strict: bool = False) -> dict[str, Any]:
        """
        Args:
            strict: MODEL.CLASSIFIER.WEIGHTS must be for this number of classes.
        """
        options = cfg.MODEL.CLASSIFIER
        if cfg.INPUT.FORMAT != "RGB":
            raise ValueError(
                f"INPUT.FORMAT is '{cfg.INPUT.FORMAT}': classifiers take 'RGB', and "
                "MODEL.PIXEL_MEAN and PIXEL_STD in that order (configs/Base-Classifier.yaml)."
            )
        network = build_network(
            options.NAME,
            options.NUM_CLASSES,
            options.WEIGHTS,
            strict=strict,
            options={key.lower(): value for key, value in options.OPTIONS.items()},
        )
        return {
            "network": network,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "num_classes": options.NUM_CLASSES,
            "head": options.HEAD,
            "label_smoothing": options.LABEL_SMOOTHING,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def head(self) -> nn.Module:
        return self.network.get_submodule(self.head_name)

    # The two buffers are the config's, so the network's state is all.
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # As a part of another module, whose state_dict() has the network's keys as well.
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}network.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def preprocess(self, images: Tensor) -> Tensor:
        """Return float32 images, normalised, of (N, 3, H, W) in [0, 255] on any device."""
        images = images.to(self.device, non_blocking=True)
        return (images - self.pixel_mean).div_(self.pixel_std)

    def forward(self, batch: Batch) -> Any:
        """
        Returns:
            In training dict[str, Tensor]: ``loss_cls``, the mean cross-entropy; and of networks
            with heads for training only ``loss_auxiliary``, 0.3 times theirs.
            In evaluation (N, C) logits.
        """
        if not self.training:
            if not len(batch):  # all images of it were broken
                return self.pixel_mean.new_zeros(0, self.num_classes)
            return self.network(self.preprocess(batch.images))
        outputs = self.network(self.preprocess(batch.images))
        targets = batch.targets.to(self.device, non_blocking=True)
        if isinstance(outputs, torch.Tensor):
            return {"loss_cls": self._cross_entropy(outputs, targets)}
        logits, *auxiliary = (x for x in outputs if x is not None)
        losses = {"loss_cls": self._cross_entropy(logits, targets)}
        if auxiliary:
            rest: Any = sum(self._cross_entropy(x, targets) for x in auxiliary)
            losses["loss_auxiliary"] = AUXILIARY * rest
        return losses

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)


def load_trained_classifier(cfg: CfgNode, option: str = "MODEL.WEIGHTS") -> Classifier:
    """
    Args:
        cfg: with ``MODEL.WEIGHTS``, or else ``MODEL.CLASSIFIER.WEIGHTS``.
        option: the config key they were given with, for messages.

    Returns:
        In eval mode, on the config's device.

    Raises:
        ValueError: the weights do not fit.
    """
    model = Classifier(cfg, strict=True).to(cfg.MODEL.DEVICE)
    if cfg.MODEL.WEIGHTS:
        checkpointer = StrictCheckpointer(model.network, option=option)
        checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
    return model.eval()


def _find_head(network: nn.Module, name: str) -> str:
    modules = dict(network.named_modules())
    if name:
        if name not in modules:
            raise ValueError(
                f"MODEL.CLASSIFIER.HEAD is '{name}', which {type(network).__name__} does not have. "
                f"It has: {', '.join(key for key in modules if key and key.count('.') < 2)}."
            )
        return name
    for name in HEADS:
        if name in modules:
            return name
    raise ValueError(
        f"{type(network).__name__} has none of {', '.join(map(repr, HEADS))}: name the submodule "
        "whose output are the logits in MODEL.CLASSIFIER.HEAD."
    )


def default_tap(classifier: Classifier) -> str:
    """
    Where features are matched unless the config says: at the head's input. A head with hidden
    layers on a flattened map (AlexNet, VGG) has tens of thousands of inputs; there, the last map.

    Returns:
        A submodule's name, or ``PRE_LOGITS``.
    """
    linear = next((m for m in classifier.head.modules() if isinstance(m, nn.Linear)), None)
    takes_flat_map = linear is not None and linear.in_features > 8192
    has_map = takes_flat_map and hasattr(classifier.network, "features")
    return "features" if has_map else PRE_LOGITS
