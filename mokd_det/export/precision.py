# Copyright (c) The mokd_det authors.
"""Half the size: what of a model runs in float16."""

from collections.abc import Callable
from typing import Any, Dict  # noqa: UP035  (TorchScript)

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor


class HalfBackbone(Backbone):
    """A backbone (with its FPN), made float16, that takes and returns float32."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone.half()

    def forward(self, x: Tensor) -> Dict[str, Tensor]:  # noqa: UP006
        features = self.backbone(x.to(torch.float16))
        converted: Dict[str, Tensor] = {}  # noqa: UP006
        for name, feature in features.items():
            converted[name] = feature.to(torch.float32)
        return converted

    def output_shape(self) -> Dict[str, ShapeSpec]:  # noqa: UP006
        return self.backbone.output_shape()

    @property
    def size_divisibility(self) -> int:
        return self.backbone.size_divisibility

    if hasattr(Backbone, "padding_constraints"):  # since Detectron2 0.6

        @property
        def padding_constraints(self) -> Dict[str, int]:  # noqa: UP006
            return self.backbone.padding_constraints


def halve_backbone(model: Any) -> None:
    """
    Run a detector's backbone in float16, in place. Heads stay float32: float16 counts pixels in
    steps of 0.5 from 512 on, and the CPU's NMS and ROIAlign have none.
    """
    model.backbone = HalfBackbone(model.backbone)


def check_half(run: Callable[[], Any]) -> None:
    """Run a model in float16; ValueError if an operator does not have that on this device."""
    try:
        with torch.no_grad():
            run()
    except (NotImplementedError, RuntimeError) as error:
        if "not implemented for 'Half'" not in str(error):
            raise
        raise ValueError(
            f"--half: {error} on this device. Leave --half out, or export on a GPU (MODEL.DEVICE "
            "cuda)."
        ) from error
