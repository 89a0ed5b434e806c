# Copyright (c) The mokd_det authors.
"""Reading files of weights, whatever library wrote them; or saying what a file is instead."""

import logging
import os
import re
import zipfile
from typing import Any

import numpy as np
import torch
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from ..files import check_seal
from .names import printable
from .pickles import read_pickle, read_torch

logger = logging.getLogger(__name__)

State = dict[str, Any]

# Where libraries keep the state dict of a checkpoint, the first that is there: Detectron2 and
# torchvision's references, timm and Lightning, pycls, others; then running means of the weights.
ENTRIES = ("model", "state_dict", "model_state", "model_state_dict", "net", "network", "weights")
MEANS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema_state", "ema")
# Put before every key by DistributedDataParallel, by running means, and by torch.compile.
PREFIXES = ("module.", "_orig_mod.")
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
UNPACK, AGAIN, OTHER = "unpack it", "copy or download it again", "name a checkpoint of PyTorch"
# How a file begins (a regular expression), what it is then, and what to do.
NOT_WEIGHTS = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself", "git lfs pull gets it"),
    (rb"\s*(\xef\xbb\xbf)?\s*<", "an HTML or XML page: a failed download", "download the file"),
    (rb"\x1f\x8b", "a gzip archive", UNPACK),
    (rb"BZh", "a bzip2 archive", UNPACK),
    (rb"\xfd7zXZ", "an xz archive", UNPACK),
    (rb"7z\xbc\xaf", "a 7z archive", UNPACK),
    (rb"Rar!", "a RAR archive", UNPACK),
    (rb"(?s).{257}ustar", "a tar archive", UNPACK),
    (rb"\x89HDF", "an HDF5 file, such as Keras writes", OTHER),
    (rb"\x93NUMPY", "a single NumPy array", OTHER),
    (rb"\x08[\x01-\x20][\x12\x1a\x22\x3a\x42]", "an ONNX model", "name what it was exported from"),
    (rb"\x89PNG|\xff\xd8\xff", "a picture", OTHER),
    (rb"[\t\n\f\r -\x7e\x80-\xff]+\Z", "a text file", OTHER),
    (rb"", "of no kind that is known", OTHER),
)


def read_checkpoint(path: str, name: str = "") -> dict[str, Any]:
    """
    Return a checkpoint as Detectron2 has it: ``model``, a state dict, and what else the file holds
    beside it. No code in the file is run.

    Args:
        path: a file here, of ``torch.save``, pickle (Detectron2's and Caffe2's zoo) or safetensors.
        name: what the user called it, with the option, for messages.

    ValueError: it is none of these, damaged, or holds objects that are not just data.
    """
    name = name or f"'{path}'"
    kind = kind_of(path, name)
    if kind == "safetensors":
        loaded: Any = _read_safetensors(path, name)
    elif kind == "pickle":
        with open(path, "rb") as file:
            loaded = read_pickle(file, name=name)
    else:
        try:
            check_seal(path)
        except ValueError as error:
            raise ValueError(f"{name} is damaged ({error}): {AGAIN}.") from error
        loaded = read_torch(path, name)
    if not isinstance(loaded, dict):
        raise ValueError(
            f"{name} holds a {type(loaded).__name__}: expected a state dict, as by "
            "torch.save(model.state_dict(), path)."
        )
    if kind == "pickle" and _is_of_caffe2(loaded):
        blobs = loaded.get("blobs", loaded)
        state = {k: v for k, v in blobs.items() if not str(k).endswith("_momentum")}
        checkpoint: dict[str, Any] = {
            "model": state,
            "__author__": "Caffe2",
            "matching_heuristics": True,
        }
    else:
        checkpoint = _unwrapped(loaded, name)
    if path.endswith(".pyth"):  # pycls' (Detectron2 takes nobody else's)
        checkpoint |= {"__author__": "pycls", "matching_heuristics": True}
    _check_state(checkpoint["model"], name)
    return checkpoint


def _is_of_caffe2(loaded: State) -> bool:
    """Whether Detectron2 would take it for a file of Caffe2's or Detectron1's zoo."""
    if any(isinstance(loaded.get(entry), dict) for entry in (*ENTRIES, *MEANS)):
        return False
    return isinstance(loaded.get("blobs"), dict) or all(
        isinstance(v, np.ndarray) for v in loaded.values()
    )


def _unwrapped(loaded: State, name: str) -> dict[str, Any]:
    """``loaded`` with its state dict as ``model``, under the keys of the bare network."""
    found = [key for key in (*ENTRIES, *MEANS) if isinstance(loaded.get(key), dict)]
    rest = {key: value for key, value in loaded.items() if found and key != found[0]}
    state = loaded[found[0]] if found else loaded
    if means := [key for key in found[1:] if key in MEANS]:
        logger.warning(f"{name}: its '{found[0]}' is used, not its running mean '{means[0]}'.")
    for key in ("module", *ENTRIES):  # {"ema": {"module": state}} and the like
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    state.pop("n_averaged", None)  # torch's AveragedModel counts there
    for prefix in PREFIXES * 2:
        if state and all(isinstance(key, str) and key.startswith(prefix) for key in state):
            consume_prefix_in_state_dict_if_present(state, prefix)
    return {**rest, "model": state}


def _check_state(state: State, name: str) -> None:
    if not state:
        raise ValueError(f"{name} holds no weights: its state dict is empty.")
    for key, value in state.items():
        if isinstance(value, np.generic):
            state[key] = value = torch.as_tensor(value)
        if not isinstance(key, str) or not isinstance(value, (torch.Tensor, np.ndarray)):
            raise ValueError(
                f"{name} has no state dict that is known: its entry '{printable(str(key))}' is a "
                f"{type(value).__name__}, not a tensor. Save the weights alone: "
                "torch.save(model.state_dict(), path)."
            )


def kind_of(path: str, name: str) -> str:
    """
    Return "torch", "pickle" or "safetensors", by the content of a file. ValueError,
    FileNotFoundError: it is none of them; the message says what else it is. ``name``: for it.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name} does not exist, or is no file.")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(512)
        file.seek(max(size - 1, 0))
        last = file.read(1)
    if head.startswith(LEGACY_TORCH):
        return "torch"
    by_old_protocol = head[:1] in (b"(", b"c", b"]", b"}") and last == b"."  # 0 and 1
    if head[:1] == b"\x80" or by_old_protocol:
        return "pickle"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "safetensors"
    if not size:
        what, remedy = "empty (0 bytes)", AGAIN
    elif head.startswith(b"PK"):
        what, remedy = _what_zip(path)
        if what == "torch":
            return what
    else:
        what, remedy = next((w, r) for start, w, r in NOT_WEIGHTS if re.match(start, head))
    raise ValueError(f"{name} is {what}: {remedy}.")


def _what_zip(path: str) -> tuple[str, str]:
    """ "torch", or what else a zip archive is, and what to do."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile's own errors, and others of what it reads
        return "a truncated or damaged zip archive", AGAIN
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        return (
            "a TorchScript archive, which is a program",
            "name the checkpoint that it was made from (MOKD.TEACHER.TORCHSCRIPT.FILE takes one, "
            "as a teacher of features)",
        )
    if any("/models/" in name or name.endswith("archive_format") for name in names):
        return "an archive of torch.export", "name what it was exported from"
    if any(name.endswith("data.pkl") for name in names):
        return "torch", ""
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)", OTHER
    return "a zip archive without weights of PyTorch", UNPACK


def _read_safetensors(path: str, name: str) -> State:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"{name} is a safetensors file, which needs the package: pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{name} is damaged ({error}): {AGAIN}.") from error
