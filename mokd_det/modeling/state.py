# Copyright (c) The mokd_det authors.
"""What a forward pass in training mode changes in a module besides its outputs."""

import contextlib

import torch

__all__ = ["module_numbers", "restored_state", "set_module_numbers"]


def module_numbers(model):
    """
    Plain numbers that modules keep, e.g. the running mean of positives by which Detectron2's
    RetinaNet divides its loss. They are in no state dict.

    Returns:
        dict[str, dict[str, int or float]]: by the module's name.
    """
    return {
        name: {k: v for k, v in vars(module).items() if isinstance(v, (int, float))}
        for name, module in model.named_modules()
    }


def set_module_numbers(model, numbers):
    """Put the values of :func:`module_numbers` back."""
    modules = dict(model.named_modules())
    for name, values in numbers.items():
        vars(modules[name]).update(values)


@contextlib.contextmanager
def restored_state(model):
    """Restore afterwards all buffers (BatchNorm's statistics) and numbers of a module."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    numbers = module_numbers(model)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        set_module_numbers(model, numbers)
