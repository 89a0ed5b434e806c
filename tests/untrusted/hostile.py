# Copyright (c) The mokd_det authors.
"""Files that touch a marker file when they are executed."""

import builtins
import functools
import io
import operator
import os
import pathlib
import pickle
import shutil
import subprocess
import warnings
import zipfile

import numpy as np
import torch

SOURCE = pathlib.Path(__file__)  # any file, to be copied


class Reduce:
    """Pickled as a call."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


def _dotted(module, name, argument):
    """A call by a dotted name, which only protocol 4 has, of a library that is allowed."""
    text = lambda value: b"\x8c" + bytes([len(value)]) + value.encode()  # noqa: E731
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


def _in_storage(marker):
    """Inside the bytes of a tensor's storage, which torch loads by a second pickle."""
    inner = io.BytesIO()
    torch.save(Reduce(os.system, f"touch {marker}"), inner)
    return Reduce(torch.storage._load_from_bytes, inner.getvalue())


def _in_array(marker):
    return {"model": {"a": np.array([Reduce(os.system, f"touch {marker}")], dtype=object)}}


def _zoo(marker):
    """A whole zoo file, but for one entry of its metadata."""
    state = {"a": np.zeros(2, np.float32)}
    evil = Reduce(os.system, f"touch {marker}")
    return {"model": state, "__author__": "someone", "meta": [{"notes": ("fine", evil)}]}


# Name -> from the marker's path to an object, or to the bytes of a pickle.
PICKLES = {
    "os.system": lambda m: Reduce(os.system, f"touch {m}"),
    "subprocess": lambda m: Reduce(subprocess.check_call, ["touch", str(m)]),
    "eval": lambda m: Reduce(builtins.eval, f"__import__('pathlib').Path({str(m)!r}).touch()"),
    "exec": lambda m: Reduce(builtins.exec, f"open({str(m)!r}, 'w')"),
    "open": lambda m: Reduce(builtins.open, str(m), "w"),
    "copy": lambda m: Reduce(shutil.copy, str(SOURCE), str(m)),
    "import": lambda m: Reduce(
        operator.methodcaller("system", f"touch {m}"), Reduce(builtins.__import__, "os")
    ),
    "partial": lambda m: Reduce(functools.partial(os.system, f"touch {m}")),
    "map": lambda m: Reduce(list, Reduce(map, os.system, [f"touch {m}"])),
    "in a zoo file": _zoo,
    "in an object array": _in_array,
    "in a storage": _in_storage,
    "in a dict's key": lambda m: {"model": {Reduce(os.system, f"touch {m}"): 1}},
    "as a state": lambda m: Reduce(_Namespace, state={"a": Reduce(os.system, f"touch {m}")}),
    "numpy.load": lambda m: Reduce(np.load, _npy(m), None, True),
    "protocol 0": lambda m: f"cos\nsystem\n(S'touch {m}'\ntR.".encode(),
    "INST": lambda m: f"(S'touch {m}'\nios\nsystem\n.".encode(),
    "OBJ": lambda m: f"(cos\nsystem\nS'touch {m}'\no.".encode(),
    "dotted torch": lambda m: _dotted("torch.serialization", "os.system", f"touch {m}"),
    "dotted numpy": lambda m: _dotted("numpy.testing._private.utils", "os.system", f"touch {m}"),
}


class _Namespace:
    pass


# Classes of the standard library that real checkpoints name, and an attribute to be replaced.
REWRITTEN = {
    "argparse.Namespace": "__eq__",
    "pathlib.PurePosixPath": "is_relative_to",
    "pathlib.PosixPath": "is_relative_to",
    "pathlib.PureWindowsPath": "is_relative_to",
    "numpy.dtype": "__setstate__",
    "numpy.ndarray": "__setstate__",
    "collections.OrderedDict": "clear",
    "builtins.frozenset": "union",
}


def rewrites(name, attribute):
    """Return a pickle that gives a class, not an instance of it, a state: an attribute of it."""
    module, _, rest = name.rpartition(".")
    state = pickle.dumps((None, {attribute: 0}), 2)[2:-1]
    return b"\x80\x02c" + f"{module}\n{rest}\n".encode() + state + b"b."


def _npy(marker):
    path = f"{marker}.npy"
    np.save(path, np.array([Reduce(os.system, f"touch {marker}")], dtype=object))
    return path


EVIL = "class A(Module):\n  def f(self):\n    torch.save(x, 'y')"
FINE = EVIL.replace("torch.save(x, 'y')", "return x")
CODE = "model/code/__torch__.py"
# TorchScript archives by name and content of their entries; torch takes the evil one.
PROGRAMS = {
    "as torch writes it": [(CODE, EVIL)],
    "upper case": [("model/code/__torch__.PY", EVIL)],
    "the same name, first": [(CODE, EVIL), (CODE, FINE)],
    "the same name, last": [(CODE, FINE), (CODE, EVIL)],
    "the same name in another case": [("model/code/__TORCH__.py", EVIL), (CODE, FINE)],
    "a long name": [(CODE, FINE), (f"model/code/__torch__/{'a' * 600}.py", EVIL)],
    "a long name that is there when cut": [
        (f"model/code/{'a' * (511 - 11)}", FINE),
        (f"model/code/{'a' * 600}.py", EVIL),
    ],
}


def write_program(path, entries, more=()):
    """Write a zip archive that torch's reader takes for one of TorchScript."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # of names that are there already
        for entry in (("model/version", "3\n"), *entries, *more):
            archive.writestr(*entry)
    return str(path)


def write_two_directories(path, entries, more=()):
    """
    The same with two lists of what is in it: torch reads the one at the offset that is given, the
    evil one, and zipfile the one right before the end.
    """
    content = pathlib.Path(write_program(path, entries, more)).read_bytes()
    end = content.rindex(b"PK\x05\x06")
    start = int.from_bytes(content[end + 16 : end + 20], "little")
    other = content[start:end].replace(b".py", b".xx")
    path.write_bytes(content[:end] + other + content[end:])
    return str(path)


def payload(name, marker, protocol=2):
    """Return the bytes of a pickle of ``PICKLES``."""
    value = PICKLES[name](marker)
    return value if isinstance(value, bytes) else pickle.dumps(value, protocol)


def write(path, kind, content):
    """Write a pickle as it is, or as a file of torch.save, new or old."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
    elif kind == "legacy":
        head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION]
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
        parts = [pickle.dumps(part, 2) for part in (*head, system)]
        path.write_bytes(b"".join(parts) + content + pickle.dumps([], 2))
    else:
        path.write_bytes(content)
    return path
