# Copyright (c) The mokd_det authors.
"""Files that are whole or not there, and checksums that find every change."""

import errno
import os
import zipfile

import pytest
import torch
from fvcore.common.checkpoint import Checkpointer

from mokd_det.data import write_json
from mokd_det.files import check_seal, check_whole, replace_file, save_checkpoint

DATA = {"model": {"weight": torch.arange(8.0).view(2, 4), "bias": torch.zeros(2)}, "iteration": 3}


@pytest.fixture
def sealed(tmp_path):
    path = str(tmp_path / "sealed.pth")
    save_checkpoint(DATA, path)
    return path


@pytest.fixture
def plain(tmp_path):
    path = str(tmp_path / "plain.pth")
    torch.save(DATA, path)
    return path


def changed(path, content):
    with open(path, "wb") as f:
        f.write(content)
    with pytest.raises(ValueError):
        check_whole(path)


def read(path):
    with open(path, "rb") as f:
        return f.read()


def test_a_sealed_checkpoint_is_torchs(sealed, plain):
    for mmap in (False, True):
        loaded = torch.load(sealed, weights_only=True, mmap=mmap)
        assert torch.equal(loaded["model"]["weight"], DATA["model"]["weight"])
    model = torch.nn.Linear(4, 2)
    assert Checkpointer(model).load(sealed)["iteration"] == 3
    assert torch.equal(model.weight, DATA["model"]["weight"])
    assert zipfile.ZipFile(sealed).testzip() is None
    assert check_seal(sealed) and not check_seal(plain)
    check_whole(sealed)
    check_whole(plain)


def test_every_changed_byte_is_found(sealed):
    content = read(sealed)
    for place in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        changed(sealed, flipped)
    for place in (0, 100, len(content) // 2):
        a, b = content[place : place + 64], content[-200:-136]
        swapped = content[:place] + b + content[place + 64 : -200] + a + content[-136:]
        assert len(swapped) == len(content)
        changed(sealed, swapped)


@pytest.mark.parametrize("kind", ["sealed", "plain"])
def test_every_cut_is_found(kind, request):
    path = request.getfixturevalue(kind)
    content = read(path)
    for length in [*range(0, len(content) - 1, 7), *range(len(content) - 100, len(content) - 1)]:
        changed(path, content[:length])
    changed(path, content + b"\0")


def test_changed_contents_of_others_files_are_found(plain):
    content = bytearray(read(plain))
    place = content.index(DATA["model"]["weight"].numpy().tobytes())
    content[place + 5] ^= 16
    changed(plain, content)
    changed(plain, b"<html>Not found</html>" * 9)


@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_a_stop_within_a_write_leaves_the_old_file(tmp_path, monkeypatch, stage):
    path = tmp_path / "file"
    path.write_text("old")

    def stop(*args):
        raise KeyboardInterrupt

    def write(f):
        f.write(b"new")
        if stage == "write":
            stop()

    with monkeypatch.context() as patch:
        if stage != "write":
            patch.setattr(os, stage, stop)
        with pytest.raises(KeyboardInterrupt):
            replace_file(str(path), write)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    replace_file(str(path), lambda f: f.write(b"new"))
    assert path.read_text() == "new"


def test_several_may_write_at_once(tmp_path):
    path = tmp_path / "file"
    replace_file(str(path), lambda f: replace_file(str(path), lambda g: g.write(b"other")))
    assert path.read_text() == "" and os.listdir(tmp_path) == ["file"]


def test_a_json_file_is_for_all_readers(tmp_path):
    path = tmp_path / "datasets" / "set.json"
    write_json({"a": 1}, str(path))
    path.with_name("other").touch()
    assert path.stat().st_mode == path.with_name("other").stat().st_mode
    path.with_name("other").unlink()
    with pytest.raises(TypeError):
        write_json({"a": object()}, str(path))
    assert path.read_text() == '{"a": 1}' and os.listdir(path.parent) == ["set.json"]


class FullDisk:
    """A file that takes so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 100, 1000])
def test_a_full_disk_is_an_error_of_the_file(tmp_path, room):
    path = tmp_path / "model.pth"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left on device: .*model.pth") as error:
        replace_file(str(path), lambda f: torch.save(DATA, FullDisk(f, room)))
    assert error.value.filename == str(path) and error.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["model.pth"]


def test_a_folder_that_is_gone_is_an_error_of_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone/model.pth"):
        save_checkpoint(DATA, str(tmp_path / "gone/model.pth"))
