# Copyright (c) The mokd_det authors.
"""Weights of other libraries: loaded as they are meant, or one sentence that says what they are."""

import argparse
import collections
import io
import pathlib
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from mokd_det.files import save_checkpoint
from mokd_det.untrusted import read_checkpoint, read_pickle
from mokd_det.modeling import SafeCheckpointer, StrictCheckpointer
from mokd_det.modeling.networks import build_network, state_of_file


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


STATE = network().state_dict()
ARRAYS = {key: value.numpy() for key, value in STATE.items()}
MORE = {
    "epoch": 3,
    "best": np.float64(0.5),
    "best array": np.arange(6.0).reshape(2, 3),
    "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("/runs"), seeds=[1, 2]),
    "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
}


def prefixed(prefix):
    return {f"{prefix}{key}": value for key, value in STATE.items()}


LOADED = {
    "a state dict": STATE,
    "an ordered one": collections.OrderedDict(STATE),
    "torchvision's reference": {"model": STATE, **MORE},
    "timm and Lightning": {"state_dict": STATE, **MORE},
    "with a running mean": {"model": STATE, "model_ema": prefixed("module."), **MORE},
    "a running mean alone": {"ema_state": STATE, **MORE},
    "one of AveragedModel": {"model_ema": {"n_averaged": torch.tensor(3), **prefixed("module.")}},
    "a mean in a module": {"ema": {"module": STATE, "updates": 4}},
    "DistributedDataParallel": prefixed("module."),
    "DistributedDataParallel's model": {"model": prefixed("module."), **MORE},
    "torch.compile": {"state_dict": prefixed("_orig_mod.")},
    "torch.compile in parallel": {"model": prefixed("module._orig_mod.")},
    "arrays": ARRAYS,
    "parameters": {key: nn.Parameter(v, v.is_floating_point()) for key, v in STATE.items()},
}


def saved(value, kind, folder):
    path = folder / ("weights.pkl" if kind == "pickle" else "weights.pth")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=kind == "zip")
    return str(path)


KINDS = [(name, kind) for name in LOADED for kind in ("zip", "legacy", "pickle")]
KINDS.remove(("arrays", "pickle"))  # is of Caffe2's zoo


@pytest.mark.parametrize("name, kind", KINDS)
def test_what_is_loaded(name, kind, tmp_path):
    path = saved(LOADED[name], kind, tmp_path)
    checkpoint = read_checkpoint(path)
    assert list(checkpoint["model"]) == list(STATE)
    for key, value in checkpoint["model"].items():
        assert torch.equal(torch.as_tensor(value), STATE[key])
    if "args" in LOADED[name]:
        assert checkpoint["best"] == 0.5 and checkpoint["args"].seeds == [1, 2]
        assert type(checkpoint["best array"]) is np.ndarray
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    StrictCheckpointer(model).load(path, checkpointables=[])
    assert all(torch.equal(model.state_dict()[key], STATE[key]) for key in STATE)


def test_a_running_mean_beside_the_weights_is_said(tmp_path, caplog):
    read_checkpoint(saved(LOADED["with a running mean"], "zip", tmp_path), "MODEL.WEIGHTS 'x'")
    assert "MODEL.WEIGHTS 'x': its 'model' is used, not its running mean 'model_ema'" in caplog.text


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(STATE, tmp_path / "w.safetensors")
    state = state_of_file(str(tmp_path / "w.safetensors"), "WEIGHTS")
    assert all(torch.equal(state[key], STATE[key]) for key in STATE)
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-4])
    with pytest.raises(ValueError, match=r"cut\.safetensors' is damaged"):
        read_checkpoint(str(tmp_path / "cut.safetensors"))


@pytest.mark.parametrize("protocol", range(6))
def test_detectron2s_zoo(tmp_path, protocol):
    """As Detectron2's own unpickler reads it: the same values, types and writable arrays."""
    zoo = {
        "model": {
            "a.weight": np.asfortranarray(np.random.rand(3, 4).astype(np.float32)),
            "a.bias": np.arange(4),
            "empty": np.zeros((0, 2), np.float16),
            "scalar": np.array(2.0),
        },
        "__author__": "FAIR",
        "matching_heuristics": True,
        "numbers": (np.float64(1.5), np.int64(2), np.bool_(True), {1, 2}, b"", b"x", 1j, None),
    }
    content = pickle.dumps(zoo, protocol)
    ours, theirs = read_pickle(io.BytesIO(content)), pickle.loads(content, encoding="latin1")
    for key, value in theirs["model"].items():
        mine = ours["model"][key]
        assert type(mine) is np.ndarray and mine.dtype == value.dtype and mine.flags.writeable
        assert np.array_equal(mine, value)
    assert ours["numbers"] == theirs["numbers"]
    assert list(map(type, ours["numbers"])) == list(map(type, theirs["numbers"]))
    (tmp_path / "zoo.pkl").write_bytes(content)
    assert read_checkpoint(str(tmp_path / "zoo.pkl"))["matching_heuristics"] is True


def test_a_pickle_of_python_2(tmp_path):
    """Its arrays are text: as in Detectron1's and Caffe2's zoo."""
    content = (
        b"(dp0\nS'blobs'\np1\n(dp2\nS'conv1_w'\np3\ncnumpy.core.multiarray\n_reconstruct\np4\n"
        b"(cnumpy\nndarray\np5\n(I0\ntp6\nS'b'\np7\ntp8\nRp9\n(I1\n(I2\ntp10\ncnumpy\ndtype\np11\n"
        b"(S'f4'\np12\nI0\nI1\ntp13\nRp14\n(I3\nS'<'\np15\nNNNI-1\nI-1\nI0\ntp16\nbI00\n"
        b"S'\\x00\\x00\\x80?\\x00\\x00\\x00\\xc0'\np17\ntp18\nbsS'conv1_w_momentum'\np19\nI0\nss."
    )
    (tmp_path / "old.pkl").write_bytes(content)
    checkpoint = read_checkpoint(str(tmp_path / "old.pkl"))
    assert checkpoint["model"].keys() == {"conv1_w"} and checkpoint["__author__"] == "Caffe2"
    assert checkpoint["model"]["conv1_w"].tolist() == [1.0, -2.0]


def test_pycls(tmp_path):
    torch.save({"model_state": STATE, "epoch": 1}, tmp_path / "x.pyth")
    checkpoint = read_checkpoint(str(tmp_path / "x.pyth"))
    assert checkpoint["__author__"] == "pycls" and checkpoint["matching_heuristics"]


def archive(kind, path):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("readme.txt", "hello")
    else:
        with tarfile.open(fileobj=buffer, mode=kind) as file:
            file.addfile(tarfile.TarInfo("x"))
    path.write_bytes(buffer.getvalue())


def whole_model(path):
    torch.save({"model": network()}, path)


def torchscript(path):
    torch.jit.script(network()).save(str(path))


def truncated(path):
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-200])


def sealed_and_changed(path):
    save_checkpoint({"model": STATE}, str(path))
    weights = STATE["0.weight"].numpy().tobytes()
    assert weights in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(weights, weights[::-1]))


def cut_pickle(path):
    path.write_bytes(pickle.dumps({"model": ARRAYS, "__author__": "x"})[:-40])


HEADER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
OTHERS = {
    "page": (lambda p: p.write_text("\n<!DOCTYPE html><html>404"), "is an HTML or XML page: a fai"),
    "xml": (lambda p: p.write_text('<?xml version="1.0"?><Error/>'), "is an HTML or XML page"),
    "Git LFS": (lambda p: p.write_bytes(HEADER), "is a Git LFS pointer.*: git lfs pull"),
    "empty": (lambda p: p.write_bytes(b""), r"is empty \(0 bytes\): copy or download it again"),
    "text": (lambda p: p.write_text("learning_rate: 0.1\n"), "is a text file"),
    "utf-8": (lambda p: p.write_text("größe: 0.1\n"), "is a text file"),
    "json": (lambda p: p.write_text('{"a": 1}'), "is a text file"),
    "bytes": (lambda p: p.write_bytes(bytes(range(256))), "is of no kind that is known"),
    "TorchScript": (torchscript, "is a TorchScript archive, which is a program"),
    "ONNX": (lambda p: p.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.0"), "is an ONNX model"),
    "zip": (lambda p: archive("zip", p), "is a zip archive without weights of PyTorch: unpack it"),
    "tar": (lambda p: archive("w", p), "is a tar archive: unpack it"),
    "tar.gz": (lambda p: archive("w:gz", p), "is a gzip archive: unpack it"),
    "tar.bz2": (lambda p: archive("w:bz2", p), "is a bzip2 archive: unpack it"),
    "tar.xz": (lambda p: archive("w:xz", p), "is an xz archive: unpack it"),
    "Keras": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n"), "is an HDF5 file"),
    "picture": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n"), "is a picture"),
    "npy": (lambda p: np.save(p.open("wb"), np.ones(3)), "is a single NumPy array"),
    "npz": (lambda p: np.savez(p.open("wb"), a=np.ones(3)), r"is a NumPy archive \(.npz\)"),
    "truncated": (truncated, "is a truncated or damaged zip archive: copy or download it again"),
    "changed": (
        sealed_and_changed,
        r"is damaged \(its checksum does not match its content\): copy",
    ),
    "cut pickle": (cut_pickle, "is damaged .*: copy or download it again"),
    "a whole model": (whole_model, "holds an object of 'torch.nn.modules.*save the weights alone"),
    "a list": (lambda p: torch.save([1, 2], p), "holds a list: expected a state dict"),
    "a tensor": (lambda p: torch.save(torch.ones(2), p), "holds a Tensor: expected a state dict"),
    "no state": (lambda p: torch.save({"epoch": 1}, p), "no state dict .*'epoch' is a int"),
    "an empty state": (lambda p: torch.save({"model": {}}, p), "holds no weights"),
    "blobs": (lambda p: p.write_bytes(pickle.dumps({"blobs": 3})), "entry 'blobs' is a int"),
    "a path as a key": (
        lambda p: torch.save({pathlib.PurePosixPath("module.a"): torch.ones(1)}, p),
        "its entry 'module.a' is a Tensor",
    ),
    "a folder": (lambda p: p.mkdir(), "does not exist, or is no file"),
    "nothing": (lambda p: None, "does not exist, or is no file"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", OTHERS)
def test_what_a_file_is_instead(name, tmp_path):
    write, message = OTHERS[name]
    write(tmp_path / "weights.pth")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        read_checkpoint(str(tmp_path / "weights.pth"), "MODEL.WEIGHTS 'weights.pth'")
    text = str(error.value)
    assert text.startswith("MODEL.WEIGHTS 'weights.pth' ") and text.isprintable()


@pytest.mark.bad_input
def test_damaged_checkpoints_are_not_loaded(tmp_path):
    """To evaluate, to export, to teach from, and as a classifier's weights."""
    path = tmp_path / "weights.pth"
    sealed_and_changed(path)
    for load in (SafeCheckpointer(network()).load, StrictCheckpointer(network()).load):
        with pytest.raises(ValueError, match="MODEL.WEIGHTS '.*weights.pth' is damaged"):
            load(str(path), checkpointables=[])
    with pytest.raises(ValueError, match="WEIGHTS '.*weights.pth' is damaged"):
        state_of_file(str(path), "WEIGHTS")


@pytest.mark.parametrize("mean", [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [1.0]])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_old_pixel_mean(tmp_path, prefix, mean):
    """Older checkpoints have it, a parallel one under a prefix; it must be the config's."""
    model = network()
    model.register_buffer("pixel_mean", torch.tensor([1.0, 2.0, 3.0]).view(-1, 1, 1), False)
    torch.save({**prefixed(prefix), f"{prefix}pixel_mean": torch.tensor(mean)}, tmp_path / "t.pth")
    load = lambda: StrictCheckpointer(model).load(str(tmp_path / "t.pth"), checkpointables=[])  # noqa: E731
    if mean == [1.0, 2.0, 3.0]:
        load()
        assert torch.equal(model.state_dict()["0.weight"], STATE["0.weight"])
    else:
        with pytest.raises(ValueError, match="unexpected: pixel_mean"):
            load()


@pytest.mark.bad_input
@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x.pth", "https://127.0.0.1:9/x.pkl"])
def test_an_address_without_a_file(address, tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    wanted = (
        f"^MODEL.WEIGHTS '{address}' cannot be downloaded .*Download {address} on .* set MODEL."
    )
    with pytest.raises(ValueError, match=wanted) as error:
        SafeCheckpointer(network()).load(address, checkpointables=[])
    assert "urlopen" not in str(error.value)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options", [{"checkpoint_path": "x"}, {"pretrained": True}, {"weights": "x"}, {"cache_dir": ""}]
)
def test_weights_enter_by_one_option(options):
    with pytest.raises(ValueError, match="weights are named in MODEL.CLASSIFIER.WEIGHTS only"):
        build_network("resnet18", 10, options=options)


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "safetensors"])
def test_damaged_files_end_in_one_message(kind, tmp_path):
    """Cut, or with bytes changed: loaded or refused, whatever the library below makes of it."""
    if kind == "safetensors":
        path = str(tmp_path / "weights.safetensors")
        pytest.importorskip("safetensors.torch").save_file(STATE, path)
    else:
        value = {"model": ARRAYS, "__author__": "x"} if kind == "pickle" else LOADED["arrays"]
        path = saved(value, kind, tmp_path)
    content = pathlib.Path(path).read_bytes()
    random, refused = np.random.default_rng(0), 0
    for attempt in range(150):
        changed = bytearray(content)
        for _ in range(random.integers(1, 4)):
            changed[random.integers(len(content))] = random.integers(256)
        if attempt % 3 == 0:
            changed = changed[: random.integers(len(content))]
        pathlib.Path(path).write_bytes(changed)
        try:
            read_checkpoint(path)
        except ValueError as error:
            assert str(error).isprintable(), error
            refused += 1
    assert refused > 50
