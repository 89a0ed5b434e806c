# Copyright (c) The mokd_det authors.
"""Pickles that run code, in every format and at every door where weights enter."""

import functools
import http.server
import inspect
import os
import pathlib
import pickle
import threading

import numpy as np
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.build import load_proposals_into_dataset

from mokd_det.config import get_cfg, trust_files
from mokd_det.data import check_proposals
from mokd_det.data.classification.sources import class_names, open_source
from mokd_det.untrusted import check_torchscript, read_checkpoint
from mokd_det.untrusted.pickles import ALLOWED
from mokd_det.modeling import SafeCheckpointer, StrictCheckpointer, TorchvisionBackbone
from mokd_det.modeling.networks import build_network
from mokd_det.tasks import task_of
from mokd_det.teachers.scripted import ScriptedDetector

from .hostile import CODE, PICKLES, PROGRAMS, REWRITTEN, payload, rewrites, write
from .hostile import write_program, write_two_directories

KINDS = {"pickle": ".pkl", "zip": ".pth", "legacy": ".pth"}


@pytest.mark.parametrize("name", PICKLES)
def test_they_are_hostile(name, marker):
    """Python's own unpickler runs each of them."""
    try:
        pickle.loads(payload(name, marker))
    except (TypeError, RuntimeError):  # what comes after it
        pass
    assert marker.exists()


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PICKLES)
def test_no_pickle_is_executed(name, kind, tmp_path, marker, refused):
    path = write(tmp_path / f"evil{KINDS[kind]}", kind, payload(name, marker))
    with refused(r"evil\.p.* (holds an object of|is damaged|cannot be)"):
        read_checkpoint(str(path))


@pytest.mark.bad_input
@pytest.mark.parametrize("protocol", range(6))
def test_no_protocol_is_executed(protocol, tmp_path, marker, refused):
    content = payload("in a zoo file", marker, protocol)
    path = write(tmp_path / "evil.pkl", "pickle", content)
    with refused(r"an object of '(posix|nt)\.system'"):
        read_checkpoint(str(path))


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REWRITTEN)
def test_no_class_is_rewritten(name, kind, tmp_path, refused):
    ours = ALLOWED[name]
    ours, attribute = getattr(ours, "function", ours), REWRITTEN[name]
    before = inspect.getattr_static(ours, attribute)
    path = write(tmp_path / f"evil{KINDS[kind]}", kind, rewrites(name, attribute))
    try:
        with refused(r"evil\.p.* (holds an object of|is damaged|cannot be)"):
            read_checkpoint(str(path))
        assert inspect.getattr_static(ours, attribute) is before
    finally:
        if inspect.getattr_static(ours, attribute) is not before:
            setattr(ours, attribute, before)


def test_nothing_that_a_pickle_gets_takes_attributes():
    for name, value in ALLOWED.items():
        assert type(value).__name__ == "_Call" or "__setstate__" in vars(value), name


class Flagged:
    """A NumPy type of floats whose flags say that its bytes are pointers to objects."""

    def __reduce__(self):
        return np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63)


class Pointers:
    """An array of that type; NumPy's own unpickling of it would use its bytes as addresses."""

    def __reduce__(self):
        reconstruct, args, _ = np.zeros(2).__reduce__()
        return reconstruct, args, (1, (2,), Flagged(), False, b"\x41" * 16)


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", KINDS)
def test_numpys_flags_are_not_believed(kind, tmp_path):
    content = pickle.dumps({"model": {"a": Pointers()}, "__author__": "x"}, 2)
    path = write(tmp_path / f"evil{KINDS[kind]}", kind, content)
    array = read_checkpoint(str(path))["model"]["a"]
    assert array.dtype == np.float64 and array.dtype.flags == 0
    assert array.tobytes() == b"\x41" * 16


@pytest.mark.bad_input
@pytest.mark.parametrize("code", ["O", "V8", "f8,O", "M8[s]", ["O"], 3, "f" * 5000])
def test_numpys_other_types_are_refused(code, tmp_path, refused):
    array = ("cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(", "\x00" * 8)
    content = array[0].encode("latin1") + pickle.dumps(code, 0)[:-1] + b"tRS'xxxxxxxx'\ntR."
    write(tmp_path / "evil.pkl", "pickle", content)
    with refused(r"evil\.pkl' (holds an object|is damaged)"):
        read_checkpoint(str(tmp_path / "evil.pkl"))


def checkpointer(kind, path):
    return kind(torch.nn.Linear(2, 2)).load(str(path))


def last_checkpoint(path):
    (path.parent / "last_checkpoint").write_text(path.name)
    SafeCheckpointer(torch.nn.Linear(2, 2), str(path.parent)).resume_or_load("", resume=True)


def served(path):
    """By http, from this machine."""
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(path.parent))
    serve.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}/{path.name}"
            checkpointer(SafeCheckpointer, address)
        finally:
            server.shutdown()


def trained_classifier(path):
    cfg = classifier_cfg()
    cfg.MODEL.WEIGHTS = str(path)
    task_of(cfg).load_trained(cfg)


def teacher(path):
    cfg = classifier_cfg()
    cfg.MOKD.TEACHER.CLASSIFIER, cfg.MOKD.TEACHER.WEIGHTS = "shufflenet_v2_x0_5", str(path)
    task_of(cfg).build_teacher(cfg)


def classifier_cfg():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "Classifier", "cpu"
    cfg.MODEL.CLASSIFIER.NAME, cfg.INPUT.FORMAT = "shufflenet_v2_x0_5", "RGB"
    return cfg


def proposals(path):
    cfg = get_cfg()
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.DATASETS.TRAIN, cfg.DATASETS.PROPOSAL_FILES_TRAIN = ("any",), (str(path),)
    check_proposals(cfg, ["TRAIN"])


def scripted(path):
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MOKD.TEACHER.TORCHSCRIPT.FILE = "cpu", str(path)
    ScriptedDetector.from_config(cfg)


def torchs_cache(build, path):
    """Where torchvision's own weights are looked for before they are downloaded."""
    cache = pathlib.Path(torch.hub.get_dir()) / "checkpoints"
    cache.mkdir(parents=True)
    name = os.path.basename(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url)
    path.rename(cache / name)
    try:
        build("resnet18", weights="IMAGENET1K_V1")
    except ValueError as error:
        raise ValueError(str(error).replace(name, "evil")) from error


DOORS = {
    "checkpointer": functools.partial(checkpointer, SafeCheckpointer),
    "strict checkpointer": functools.partial(checkpointer, StrictCheckpointer),
    "Detectron2's checkpointer": functools.partial(checkpointer, DetectionCheckpointer),
    "last_checkpoint": last_checkpoint,
    "http": served,
    "MODEL.CLASSIFIER.WEIGHTS": lambda path: build_network("resnet18", 10, str(path)),
    "torch's cache": functools.partial(
        torchs_cache, functools.partial(build_network, num_classes=9)
    ),
    "torch's cache, backbone": functools.partial(torchs_cache, TorchvisionBackbone),
    "MODEL.WEIGHTS of a classifier": trained_classifier,
    "MOKD.TEACHER.WEIGHTS": teacher,
    "MOKD.TEACHER.TORCHSCRIPT.FILE": scripted,
    "DATASETS.PROPOSAL_FILES_TRAIN": proposals,
    "Detectron2's proposals": lambda path: load_proposals_into_dataset([], str(path)),
}
BY_PICKLE = [door for door in DOORS if "ROPOSAL" in door.upper() or door.startswith("Detectron2")]


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["os.system", "in a zoo file", "in a storage", "INST"])
@pytest.mark.parametrize(
    "door, kind", [(d, k) for d in DOORS for k in (["pickle"] if d in BY_PICKLE else KINDS)]
)
def test_every_door(door, kind, name, tmp_path, marker, refused, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = write(tmp_path / f"evil{KINDS[kind]}", kind, payload(name, marker))
    with refused("evil"):
        DOORS[door](path)


class Saves(torch.nn.Module):
    """A TorchScript program that writes a file as it runs."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        torch.save(x, self.path)
        return {"p3": x}


@pytest.mark.bad_input
@pytest.mark.parametrize("trusted", [False, True])
def test_torchscript_teachers_write_no_files(trusted, tmp_path, marker, refused):
    path = tmp_path / "evil.ts"
    torch.jit.script(Saves(str(marker))).save(str(path))
    trust_files(trusted)
    if trusted:  # that it could
        scripted(path)
        assert marker.exists()
    else:
        with refused("evil.ts' is a program that uses 'save'"):
            scripted(path)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "call",
    ["torch.save(x, y)", "torch . save(x)", "ops.image.write_file(x)", "torch.from_file(x)"]
    + ["ops.image. # a comment\n write_file(x)"],
)
def test_operators_of_files(call, tmp_path):
    text = f"class A(Module):\n  def f(self):\n    {call}"
    path = write_program(tmp_path / "evil.ts", [(CODE, text)])
    with pytest.raises(ValueError, match="evil.ts is a program that uses"):
        check_torchscript(path, "evil.ts")


@pytest.mark.bad_input
@pytest.mark.parametrize("write", [write_program, write_two_directories])
@pytest.mark.parametrize("name", PROGRAMS)
def test_archives_hide_no_program(name, write, tmp_path):
    path = write(tmp_path / "evil.ts", PROGRAMS[name])
    with pytest.raises(ValueError, match="evil.ts is (a program that uses|no TorchScript file)"):
        check_torchscript(path, "evil.ts")


@pytest.mark.bad_input
def test_a_program_in_torchs_other_format(tmp_path):
    """torch.jit.load takes a file for that by its first bytes, whatever follows."""
    (tmp_path / "evil.ts").write_bytes(b"\0\0\0\0PTMF" + b"\0" * 99)
    with pytest.raises(ValueError, match="evil.ts is no TorchScript file: it begins as none"):
        check_torchscript(str(tmp_path / "evil.ts"), "evil.ts")


def test_operators_of_detectors_are_fine(tmp_path):
    class Suppress(torch.nn.Module):
        def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return torchvision.ops.batched_nms(boxes, scores, scores.long(), 0.5)

    torch.jit.script(Suppress()).save(str(tmp_path / "fine.ts"))
    check_torchscript(str(tmp_path / "fine.ts"), "fine.ts")


@pytest.mark.bad_input
@pytest.mark.parametrize("read", [class_names, open_source])
def test_object_arrays_of_packed_data_sets(read, tmp_path, marker, refused):
    objects = np.array([PICKLES["os.system"](marker)], dtype=object)
    path = str(tmp_path / "evil.npz")
    np.savez(path, images=objects, labels=objects, classes=objects)
    with refused("evil"):
        read(path)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name", ["../evil.pth", "/evil.pth", "a/../../evil.pth", "..", "http://x/y.pth", "a/b.pth"]
)
def test_last_checkpoint_leads_nowhere_else(name, tmp_path, marker, refused):
    folder = tmp_path / "run"
    folder.mkdir()
    if name == "/evil.pth":
        name = str(tmp_path / "evil.pth")
    write(tmp_path / "evil.pth", "zip", payload("os.system", marker))
    (folder / "last_checkpoint").write_text(name)
    with refused("last_checkpoint names .*: expected a file of its own folder"):
        SafeCheckpointer(torch.nn.Linear(2, 2), str(folder)).resume_or_load("", resume=True)
