# Copyright (c) The mokd_det authors.
"""Weights that let feature matching look at objects more than at background."""

import torch
from torch import Tensor

SOURCES = ("", "ground_truth", "teacher")
UNITS = ("image", "box")


def foreground_weights(
    boxes: list[Tensor], size: tuple[int, int], stride: int, share: float, unit: str = "image"
) -> Tensor:
    """
    Args:
        boxes: for each of N images (B_i, 4), XYXY in pixels. Those with an angle are a ValueError.
        size, stride: (H, W) of the feature map, and in pixels.
        share: of the loss that cells touched by a box get together.
        unit: see Returns.

    Returns:
        (N, 1, H, W). With unit "image" with mean one for each image; one everywhere if no or every
        cell is touched. With "box" (FGD, arXiv 2111.11837, Eq. 4 to 6) a touched cell has ``share``
        over the number of cells of the smallest box that touches it, another ``1 - share`` over
        the number of all others.
    """
    if any(image_boxes.shape[1] != 4 for image_boxes in boxes):
        raise ValueError(
            "MOKD.FEATURES.FOREGROUND takes boxes of 4 numbers, not rotated ones: set it to ''."
        )
    height, width = size
    weights = torch.ones(len(boxes), 1, height, width, device=boxes[0].device)
    rows = torch.arange(height, device=weights.device) * stride
    columns = torch.arange(width, device=weights.device) * stride
    for image, image_boxes in zip(weights, boxes):
        x0, y0, x1, y1 = (image_boxes[:, i, None] for i in range(4))
        in_rows = (rows < y1) & (rows + stride > y0)  # (B, H)
        in_columns = (columns < x1) & (columns + stride > x0)  # (B, W)
        touching = in_rows[:, :, None] & in_columns[:, None, :]
        inside = touching.any(dim=0)
        count, cells = inside.sum(), height * width
        if unit == "box":
            image[0] = (1 - share) / (cells - count).clamp_min(1)
            if len(touching):
                sizes = touching.sum(dim=(1, 2), keepdim=True).clamp_min(1)
                of_smallest = (touching * (share / sizes)).amax(dim=0)
                image[0] = torch.where(inside, of_smallest, image[0])
            continue
        touched = share * cells / count.clamp_min(1)
        others = (1 - share) * cells / (cells - count).clamp_min(1)
        uniform = (count == 0) | (count == cells)
        image[0] = torch.where(uniform, image[0], torch.where(inside, touched, others))
    return weights
