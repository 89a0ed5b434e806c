# Copyright (c) The mokd_det authors.
"""What a model costs: parameters, multiply-adds, time."""

import time
from collections.abc import Callable
from typing import Any

import torch
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn


def count_parameters(model: nn.Module) -> int:
    """Return the number of a module's parameters (trainable or not; buffers do not count)."""
    return sum(p.numel() for p in model.parameters())


def gflops(model: nn.Module, inputs: Any) -> float:
    """Return the billions of multiply-adds of one run, as fvcore counts them."""
    analysis = FlopCountAnalysis(model, inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.total() / 1e9


def seconds_of(run: Callable[..., Any], *inputs: Any) -> float:
    """Return the time of one run, with what it leaves to the GPU."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    start = time.perf_counter()
    run(*inputs)
    synchronise()
    return time.perf_counter() - start
