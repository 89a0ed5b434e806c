# Copyright (c) The mokd_det authors.
"""The focal loss of Detectron2's dense detectors, as it is written."""

import contextlib
from collections.abc import Iterator

from detectron2.modeling.meta_arch import fcos, retinanet
from fvcore.nn import sigmoid_focal_loss

NAME = "sigmoid_focal_loss_jit"


@contextlib.contextmanager
def uncompiled_focal_loss() -> Iterator[None]:
    """
    Within it RetinaNet and FCOS call fvcore's function, else what TorchScript makes of it. That is
    compiled anew after its first call in a process, to a gradient of other bits: a resumed run
    would not be the uninterrupted one. (``torch.jit.optimized_execution`` has no effect on what is
    compiled already, and stays in effect for a later run of Detectron2's own step.)
    """
    compiled = [(module, getattr(module, NAME)) for module in (fcos, retinanet)]
    try:
        for module, _ in compiled:
            setattr(module, NAME, sigmoid_focal_loss)
        yield
    finally:
        for module, function in compiled:
            setattr(module, NAME, function)
