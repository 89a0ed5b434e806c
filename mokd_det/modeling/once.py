# Copyright (c) The mokd_det authors.
"""Heads that task and objectives ask the same question run once."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def run_once(modules: Iterable[nn.Module]) -> Iterator[None]:
    """
    While it is open, each of these modules, given the very tensors of its first run again (the same
    objects, not equal ones), returns what that run returned, with its graph.
    """
    with contextlib.ExitStack() as stack:
        for module in dict.fromkeys(modules):
            # On the instance, where others may have put theirs (precision, a compiler).
            own = vars(module).get("forward")
            stack.callback(_restore, module, own)
            module.forward = functools.partial(_remembering, module.forward, [])
        yield


def _restore(module: nn.Module, own: Callable | None) -> None:
    if own is None:
        del module.forward
    else:
        module.forward = own


def _remembering(forward: Callable, first: list, *args: Any, **kwargs: Any) -> Any:
    if kwargs:  # nothing in Detectron2 or torchvision calls a head so
        return forward(*args, **kwargs)
    given = list(_tensors(args))
    if first and len(first[0]) == len(given) and all(a is b for a, b in zip(first[0], given)):
        return first[1]
    result = forward(*args)
    if not first:
        first[:] = given, result
    return result


def _tensors(value: Any) -> Iterator[Any]:
    """All that is in lists and tuples: an argument that is no tensor must be the same, too."""
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
    else:
        yield value
