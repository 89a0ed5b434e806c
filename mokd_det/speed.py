# Copyright (c) The mokd_det authors.
"""What students and teachers at speed have in common."""

from . import compat  # noqa: F401, I001  (first: patches Detectron2 where it needs it)

import torch
from detectron2.modeling.poolers import ROIPooler
from torch import nn


def check_backend(backend: str, option: str) -> None:
    """Raise ValueError unless torch.compile has this backend."""
    if backend not in (known := torch._dynamo.list_backends(exclude_tags=())):
        raise ValueError(
            f"{option} is '{backend}': expected '' (off) or a backend of torch.compile: "
            f"{', '.join(known)}."
        )


def pool_in_float32(model: nn.Module) -> None:
    """
    RoI features from float32 maps. Detectron2 converts boxes to the maps' type, and bfloat16
    has steps of 1 pixel from 128 on and of 4 from 512 on; the CPU operator has no bfloat16.
    """
    for module in model.modules():
        if isinstance(module, ROIPooler):
            module.register_forward_pre_hook(
                lambda _module, inputs: ([x.float() for x in inputs[0]], *inputs[1:])
            )
