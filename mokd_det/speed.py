# Copyright (c) The mokd_det authors.
"""What students and teachers at speed have in common."""

from . import compat  # noqa: F401, I001  (first: patches Detectron2 where it needs it)

import torch
from detectron2.modeling.poolers import ROIPooler
from torch import nn
from torch.utils._pytree import tree_map
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.ssd import SSDHead


def check_backend(backend: str, option: str) -> None:
    """Raise ValueError unless torch.compile has this backend."""
    if backend not in (known := torch._dynamo.list_backends(exclude_tags=())):
        raise ValueError(
            f"{option} is '{backend}': expected '' (off) or a backend of torch.compile: "
            f"{', '.join(known)}."
        )


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; without them it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # No public function of torch says so of a CPU.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has = (getattr(torch.cpu, name, None) for name in names)
    return device.type == "cpu" and any(function is not None and function() for function in has)


# torchvision's decode boxes in the type of their outputs.
HEADS = (RPNHead, FastRCNNPredictor, RetinaNetHead, FCOSHead, SSDHead)


def pool_in_float32(model: nn.Module) -> None:
    """
    RoI features from float32 maps, and what torchvision's heads say in float32. Boxes are converted
    to the type of either, and bfloat16 has steps of 1 pixel from 128 on and of 4 from 512 on; the
    CPU operator has no bfloat16.
    """
    for module in model.modules():
        if isinstance(module, ROIPooler):
            module.register_forward_pre_hook(
                lambda _module, inputs: ([x.float() for x in inputs[0]], *inputs[1:])
            )
        elif isinstance(module, HEADS):
            module.register_forward_hook(
                lambda _module, _inputs, outputs: tree_map(torch.Tensor.float, outputs)
            )
