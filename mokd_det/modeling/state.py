# Copyright (c) The mokd_det authors.
"""The state of a module: what is saved of it, and what a forward pass in training changes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class PlainState(nn.Module):
    """
    A module around ``network`` whose state is that of the network alone: checkpoints load into what
    the network's own library builds, and the other way round. Own buffers must not be persistent.
    """

    network: nn.Module

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # As a part of another module, whose state_dict() has the network's keys as well.
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}network.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def module_numbers(model: nn.Module) -> dict[str, dict[str, int | float]]:
    """
    Return plain numbers that modules keep, by the module's name. They are in no state dict, e.g.
    the running mean of positives by which Detectron2's RetinaNet divides its loss.
    """
    return {name: _numbers(module) for name, module in model.named_modules()}


def set_module_numbers(model: nn.Module, numbers: dict[str, dict[str, int | float]]) -> None:
    """Put the values of :func:`module_numbers` back; a number that was not there goes."""
    for name, module in model.named_modules():
        for key in _numbers(module).keys() - numbers[name].keys():
            delattr(module, key)
        vars(module).update(numbers[name])


def _numbers(module: nn.Module) -> dict[str, int | float]:
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


class RestoredState:
    """
    Context that afterwards restores all buffers (BatchNorm's statistics) and numbers of a module.
    Can be entered again and again, as activation checkpointing does. Or call :meth:`remember`, and
    :meth:`restore` if it turns out to be needed.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def remember(self) -> None:
        self._buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self._numbers = module_numbers(self.model)

    def restore(self) -> None:
        """Go back to what was remembered last, once."""
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
        set_module_numbers(self.model, self._numbers)
        self._buffers = []

    def __enter__(self) -> None:
        self.remember()

    def __exit__(self, *error: object) -> None:
        self.restore()
