# Copyright (c) The mokd_det authors.
"""
A deployed classifier takes images, an (N, 3, H, W) tensor in [0, 255], uint8 or float32, RGB;
normalisation is inside, resizing and cropping are not. It returns (N, C) float32 logits.
"""

import torch
from torch import Tensor, nn

from ..modeling import Classifier


class DeployedClassifier(nn.Module):
    """The network of a classifier in eval mode, with its normalisation."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: Classifier):
        super().__init__()
        self.network = model.network
        self.register_buffer("pixel_mean", model.pixel_mean.clone())
        self.register_buffer("pixel_std", model.pixel_std.clone())

    def forward(self, images: Tensor) -> Tensor:
        images = (images.to(self.pixel_mean) - self.pixel_mean) / self.pixel_std
        return self.network(images)


class HalfClassifier(DeployedClassifier):
    """The same with the network in float16; normalisation and logits stay float32."""

    def __init__(self, model: Classifier):
        super().__init__(model)
        self.network.half()

    def forward(self, images: Tensor) -> Tensor:
        images = (images.to(self.pixel_mean) - self.pixel_mean) / self.pixel_std
        return self.network(images.to(torch.float16)).to(torch.float32)
