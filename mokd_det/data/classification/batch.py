# Copyright (c) The mokd_det authors.
"""Batches of labelled images."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass
class Batch:
    """Images with their targets, and names where they are evaluated."""

    images: Tensor  # (N, 3, H, W), RGB in [0, 255]; uint8, or float32 if they were mixed
    targets: Tensor  # (N,) int64 labels, or (N, C) float32 probabilities
    names: list[str] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, part: slice) -> "Batch":
        return Batch(self.images[part], self.targets[part], self.names[part])

    def to(self, device: str | torch.device) -> "Batch":
        """Return the batch on a device; the copy from pinned memory runs beside the host."""
        images, targets = (x.to(device, non_blocking=True) for x in (self.images, self.targets))
        return Batch(images, targets, self.names)

    def pin_memory(self) -> "Batch":
        """As torch's DataLoader asks of batches of one's own type."""
        return Batch(self.images.pin_memory(), self.targets.pin_memory(), self.names)
