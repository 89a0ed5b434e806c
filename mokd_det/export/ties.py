# Copyright (c) The mokd_det authors.
"""Equal scores, such as an RPN gives where its features are zero."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class StableSorting(TorchFunctionMode):
    """
    Within it ``sort`` and ``topk`` leave equal values in their order, as ONNX does. torch promises
    no order, and has another on each kind of processor; NMS then keeps other boxes.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        stable = {torch.Tensor.sort: _sort, torch.Tensor.topk: _topk}
        stable |= {torch.sort: _sort, torch.topk: _topk}
        return stable.get(func, func)(*args, **(kwargs or {}))


def _sort(x: Tensor, dim: int = -1, descending: bool = False, stable: Any = None) -> Any:
    return torch.sort(x, dim=dim, descending=descending, stable=True)


def _topk(x: Tensor, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    values, indices = _sort(x, dim, largest)
    return values.narrow(dim, 0, int(k)), indices.narrow(dim, 0, int(k))
