# Copyright (c) The mokd_det authors.
"""Reading, and where wanted replacing, the feature maps that a module hands on."""

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn


@contextlib.contextmanager
def replace_backbone_features(
    module: nn.Module, function: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> Iterator[None]:
    """
    While the context lasts, every output of ``module`` passes through ``function``.

    The hook is attached to the module object, so no renaming (by DistributedDataParallel or a
    compiler) can make it miss, and it is gone afterwards: the module is stock outside.

    Args:
        module: e.g. a detector's backbone, which returns dict[str, Tensor].
        function: from the module's output to what the caller of the module gets.

    Raises:
        TypeError: the output is no dict.
        RuntimeError: the module did not run exactly once inside the context. A distillation that
            is silently absent, or counts a feature twice, would go unnoticed otherwise.
    """
    calls = 0

    def hook(_module, _inputs, output):
        nonlocal calls
        calls += 1
        if not isinstance(output, dict):
            raise TypeError(
                f"The student's backbone ({type(module).__name__}) returned a "
                f"{type(output).__name__}: distillation needs dict[str, Tensor]."
            )
        return function(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise RuntimeError(
            f"The student's backbone ({type(module).__name__}) ran {calls} times in one forward "
            "pass of the student; distillation needs exactly one."
        )
