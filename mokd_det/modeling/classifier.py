# Copyright (c) The mokd_det authors.
"""The meta-architecture of a classifier: a stock network with its preprocessing and loss."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..data.classification import Batch
from ..teachers import PRE_LOGITS
from .loading import StrictCheckpointer
from .networks import HEADS, WEIGHTS, build_network
from .state import PlainState

# Weight of the heads for training only, of GoogLeNet (Szegedy et al. 2015) and Inception.
AUXILIARY = 0.3


@META_ARCH_REGISTRY.register()
class Classifier(PlainState):
    """A stock classification network for Detectron2's trainer and evaluation."""

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
        ``network`` maps (N, 3, H, W) to logits (N, num_classes), ``pixel_mean`` and ``pixel_std``
        are of R, G and B in [0, 255]; see ``MODEL.CLASSIFIER.HEAD`` for ``head``. ValueError: an
        option out of its range, or a network without such a head.
        """
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"MODEL.CLASSIFIER.LABEL_SMOOTHING is {label_smoothing}: expected one in [0, 1)."
            )
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            if len(values) != 3:
                raise ValueError(f"MODEL.{name.upper()} is {list(values)}: a classifier takes 3.")
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), False)
        self.network = network
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.head_name = _find_head(network, head)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, strict: bool = False, option: str = WEIGHTS
    ) -> dict[str, Any]:
        """
        ``strict``: MODEL.CLASSIFIER.WEIGHTS must be for this number of classes. ``option``: what
        named them, for messages.
        """
        options = cfg.MODEL.CLASSIFIER
        if cfg.INPUT.FORMAT != "RGB":
            raise ValueError(
                f"INPUT.FORMAT is '{cfg.INPUT.FORMAT}': classifiers take 'RGB', and "
                "MODEL.PIXEL_MEAN and PIXEL_STD in that order (configs/Base-Classifier.yaml)."
            )
        settings = {key.lower(): value for key, value in options.OPTIONS.items()}
        classes = options.NUM_CLASSES
        return {
            "network": build_network(
                options.NAME, classes, options.WEIGHTS, strict, settings, option
            ),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "num_classes": classes,
            "head": options.HEAD,
            "label_smoothing": options.LABEL_SMOOTHING,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def head(self) -> nn.Module:
        """The network's last part, whose output are the logits."""
        return self.network.get_submodule(self.head_name)

    def preprocess(self, images: Tensor) -> Tensor:
        """Return float32 images, normalised, of (N, 3, H, W) in [0, 255] on any device."""
        images = images.to(self.device, non_blocking=True)
        return (images - self.pixel_mean).div_(self.pixel_std)

    def forward(self, batch: Batch) -> Any:
        """
        Return (N, C) logits in evaluation. In training the mean cross-entropy ``loss_cls``, and of
        networks with heads for training only ``loss_auxiliary``, 0.3 times theirs.
        """
        if not self.training and not len(batch):  # all images of it were broken
            return self.pixel_mean.new_zeros(0, self.num_classes)
        outputs = self.network(self.preprocess(batch.images))
        if not self.training:
            return outputs
        targets = batch.targets.to(self.device, non_blocking=True)
        heads = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x is not None]
        smoothing = self.label_smoothing
        loss, *rest = (F.cross_entropy(x, targets, label_smoothing=smoothing) for x in heads)
        auxiliary = {"loss_auxiliary": AUXILIARY * sum(rest)} if rest else {}
        return {"loss_cls": loss, **auxiliary}


def load_trained_classifier(cfg: CfgNode, option: str = "MODEL.WEIGHTS") -> Classifier:
    """
    From ``MODEL.WEIGHTS``, or else ``MODEL.CLASSIFIER.WEIGHTS``, in eval mode. ``option``: the key
    they were given with, for messages. ValueError: they do not fit.
    """
    named_by = WEIGHTS if option == "MODEL.WEIGHTS" else option
    model = Classifier(cfg, strict=True, option=named_by).to(cfg.MODEL.DEVICE)
    if cfg.MODEL.WEIGHTS:
        checkpointer = StrictCheckpointer(model.network, option=option)
        checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
    return model.eval()


def _find_head(network: nn.Module, name: str) -> str:
    modules = dict(network.named_modules())
    kind, known = type(network).__name__, ", ".join(shallow_names(modules))
    for candidate in [name] if name else HEADS:
        if candidate in modules:
            return candidate
    if name:
        raise ValueError(
            f"MODEL.CLASSIFIER.HEAD is '{name}', which {kind} does not have. It has: {known}."
        )
    raise ValueError(
        f"{kind} has none of {', '.join(map(repr, HEADS))}: name the submodule whose output are "
        "the logits in MODEL.CLASSIFIER.HEAD."
    )


def shallow_names(modules: Iterable[str]) -> list[str]:
    return [name for name in modules if name and name.count(".") < 2]


def default_tap(classifier: Classifier) -> str:
    """
    Where features are matched unless the config says: at the head's input; or the last map, where
    the head takes it flattened (AlexNet, VGG): tens of thousands of inputs.
    """
    linear = next((m for m in classifier.head.modules() if isinstance(m, nn.Linear)), None)
    takes_flat_map = linear is not None and linear.in_features > 8192
    return "features" if takes_flat_map and hasattr(classifier.network, "features") else PRE_LOGITS
