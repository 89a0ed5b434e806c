# Copyright (c) The mokd_det authors.
"""torchvision's ResNets as weights of Detectron2's, so that a ResNet-18 is a stock student."""

import logging
import re
from typing import Any

from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import nn

logger = logging.getLogger(__name__)

# As Detectron2's tools/convert-torchvision-to-d2.py.
RENAMED = (
    (r"^(?!layer)", "stem."),
    (r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}"),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)


def for_detectron2(checkpoint: dict[str, Any], model: nn.Module, name: str) -> dict[str, Any]:
    """
    Return a checkpoint for Detectron2's checkpointer: as it is, unless it is a ResNet of
    torchvision and the model has one of Detectron2. Then it has Detectron2's names. ``name``: of
    the file, for messages. ValueError: the model's ResNet computes something else.
    """
    state, keys = checkpoint["model"], model.state_dict().keys()
    is_torchvisions = "layer1.0.conv1.weight" in state and "bn1.weight" in state
    if not is_torchvisions or not any(key.endswith("stem.conv1.weight") for key in keys):
        return checkpoint
    blocks = [module for module in model.modules() if isinstance(module, BottleneckBlock)]
    if any(block.conv1.stride != (1, 1) for block in blocks):
        raise ValueError(
            f"{name} is a ResNet of torchvision, which has its strides in the 3x3 convolutions, "
            "but MODEL.RESNETS.STRIDE_IN_1X1 is True: set it to False."
        )
    pixel_std = getattr(model, "pixel_std", None)
    has_unit = pixel_std is not None and bool((pixel_std == 1).all())
    if getattr(model, "input_format", "RGB") != "RGB" or has_unit:
        logger.warning(
            f"{name} is a ResNet of torchvision, which reads normalised RGB, but INPUT.FORMAT is "
            f"'{getattr(model, 'input_format', 'RGB')}' and MODEL.PIXEL_STD "
            f"{None if pixel_std is None else pixel_std.flatten().tolist()}: set them to 'RGB' and "
            "[58.395, 57.12, 57.375], and MODEL.PIXEL_MEAN to [123.675, 116.28, 103.53]."
        )
    renamed = {}
    for key, value in state.items():
        if key.startswith("fc."):
            continue
        for pattern, replacement in RENAMED:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return {"model": renamed, "matching_heuristics": True}
