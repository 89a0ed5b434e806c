# Copyright (c) The mokd_det authors.
"""
Reading pickles without running what is in them. A pickle is a program that may call any function;
here it may name those of ``ALLOWED`` only, and none of these does more than make a value.
"""

import argparse
import codecs
import collections
import io
import pathlib
import pickle
import re
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from .names import printable


class _Call(NamedTuple):
    """A function that a pickle may call. It has no ``__dict__``, so a pickle cannot change it."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class _Namespace(argparse.Namespace):
    """argparse's has no ``__setstate__``, and pickles set attributes of what has none."""

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state)


class _DType:
    """
    Stands for ``numpy.dtype``, whose own state has flags that make NumPy take bytes for pointers:
    of the state only the byte order is used.
    """

    def __init__(self, code: str, *_: Any):
        if not isinstance(code, str) or not re.fullmatch(r"[<>=|]?(b1|[biufcSU]\d+|\?)", code):
            raise pickle.UnpicklingError(f"the NumPy type {code!r}")
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">", "="):
            self.value = self.value.newbyteorder(state[1])


class _Array:
    """Stands for a NumPy array until :func:`_plain` puts the array in its place."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if is_fortran else "C")


def _array(raw: Any, dtype: _DType, shape: Any, order: str, axes: Any = None) -> np.ndarray:
    """As NumPy's ``_frombuffer``; ``raw`` is a str in pickles of Python 2."""
    if not isinstance(dtype, _DType):
        raise pickle.UnpicklingError("an array without a NumPy type")
    if isinstance(raw, str):
        raw = raw.encode("latin1")
    # A copy, as bytes cannot be written to, in the byte order that torch takes.
    array = np.frombuffer(raw, dtype.value).astype(dtype.value.newbyteorder("="))
    if order == "K" and axes is not None:
        return array.reshape(shape).transpose(axes)
    return array.reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: _DType, raw: Any = b"") -> Any:
    return _array(raw, dtype, (1,), "C")[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if codecs.lookup(encoding).name != "iso8859-1":  # the only one that pickles need
        raise pickle.UnpicklingError(f"an object of the encoding {encoding!r}")
    return text.encode(encoding)


def _storage(raw: bytes) -> Any:
    """As torch's ``_load_from_bytes``, which loads whatever there is."""
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


# What files of other libraries hold besides torch's own types.
_COMMON: dict[str, Any] = {
    "argparse.Namespace": _Namespace,
    "builtins.bytes": _Call(lambda: b""),  # how Python 3 writes it for Python 2
    "builtins.frozenset": _Call(frozenset),
    "numpy.dtype": _DType,
    "numpy.ndarray": _Array,
}
for _name, _path in (("Posix", pathlib.PurePosixPath), ("Windows", pathlib.PureWindowsPath)):
    _COMMON[f"pathlib.{_name}Path"] = _COMMON[f"pathlib.Pure{_name}Path"] = _Call(_path)
for _module in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _COMMON[f"{_module}.multiarray._reconstruct"] = _Call(lambda *_: _Array())
    _COMMON[f"{_module}.multiarray.scalar"] = _Call(_scalar)
    _COMMON[f"{_module}.numeric._frombuffer"] = _Call(_array)

ALLOWED: dict[str, Any] = {
    **_COMMON,
    "_codecs.encode": _Call(_encode),
    "builtins.complex": _Call(complex),
    "builtins.set": _Call(set),
    "collections.OrderedDict": _Call(collections.OrderedDict),
    "torch.storage._load_from_bytes": _Call(_storage),
    "torch._utils._rebuild_tensor_v2": _Call(torch._utils._rebuild_tensor_v2),
    "torch._utils._rebuild_parameter": _Call(torch._utils._rebuild_parameter),
}
"""
What a pickle may name, and what it gets for it. Nothing on which it could set attributes: a _Call,
or a class with a ``__setstate__``.
"""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("__builtin__.", "builtins.", 1)
        if full not in ALLOWED:
            raise pickle.UnpicklingError(f"an object of '{full}'")
        return ALLOWED[full]


def read_pickle(file: IO[bytes], encoding: str = "latin1", name: str = "") -> Any:
    """
    Return what a pickle holds: numbers, text, containers, NumPy arrays, tensors. ValueError: it
    holds anything else, which would run code, or is damaged.

    Args:
        encoding: of text of Python 2, as in ``pickle.load``.
        name: what the user calls the file, for the message.
    """
    try:
        return _plain(_Unpickler(file, encoding=encoding).load())
    except Exception as error:  # a damaged or hostile pickle may end in any of them
        raise _refusal(name or f"'{getattr(file, 'name', 'The pickle')}'", error) from error


def read_torch(path: str, name: str, mmap: bool = False) -> Any:
    """
    As :func:`read_pickle` of a file of ``torch.save``, with all tensors on the CPU; ``mmap``: they
    are read when they are used.
    """
    extra: list[Any] = [(value, full) for full, value in _COMMON.items()]
    try:
        with torch.serialization.safe_globals(extra):
            return _plain(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise _refusal(name, error) from error


def _refusal(name: str, error: Exception) -> ValueError:
    text = str(error)
    if found := re.search(r"WeightsUnpickler error: (.*)", text):  # torch adds advice around it
        text = found[1]
    if found := re.search(r"GLOBAL ([\w.]+)|(?:object of|NumPy type) '([^']*)'", text):
        return ValueError(
            f"{name} holds an object of '{printable(found[1] or found[2])}', which is not loaded: "
            "only tensors, arrays, numbers, text and containers are, as anything else could run "
            "code. If you trust the file, open it where it was made, and save the weights alone: "
            "torch.save(model.state_dict(), path)."
        )
    first = printable(text.strip().split("\n")[0][:200]) or "no more data"
    return ValueError(
        f"{name} is damaged ({type(error).__name__}: {first}): copy or download it again."
    )


def _plain(value: Any) -> Any:
    """``value`` with arrays in place of what stands for them; containers keep their identity."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = _plain(item)
    elif isinstance(value, list):
        value[:] = map(_plain, value)
    elif type(value) is tuple:
        return tuple(map(_plain, value))
    elif isinstance(value, argparse.Namespace):
        _plain(vars(value))
    return value
