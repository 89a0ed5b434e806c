# Copyright (c) The mokd_det authors.
"""Names that come from files stay in their folder, their line, and their cell."""

import json
import pathlib
import sys

import pytest

from mokd_det.config import get_cfg, load_config
from mokd_det.data import check_classes, register_datasets
from mokd_det.data.classification.sources import open_source
from mokd_det.data.coco import check_coco
from mokd_det.data.images import BrokenImages, ImageError, check_header
from mokd_det.engine import errors_as_messages
from mokd_det.evaluation import format_comparison
from mokd_det.untrusted import check_class_names, check_file_name, markdown_row, printable
from mokd_det.untrusted.torchscript import OF_FILES

from ..conftest import ROOT
from .hostile import PROGRAMS, write_program, write_two_directories

FORGED = {
    "line": "apple\n[11/30 12:00:00 d2.evaluation]: AP 99",
    "carriage return": "apple\rpear",
    "colour": "\x1b[31mapple\x1b[0m",
    "title of the terminal": "\x1b]0;evil\x07apple",
    "backspace": "pear\b\b\b\bapple",
    "nul": "apple\x00",
    "C1 control": "\x9b31mapple",
    "line separator": "apple\u2028pear",
    "direction": "apple\u202egnp.exe",
    "surrogate": "apple\ud800",
    "empty": "",
    "spaces": "  ",
    "number": 3,
    "null": None,
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", FORGED)
def test_classes_forge_no_lines(name):
    with pytest.raises(ValueError, match="labels.json has a class named .*Rename it") as error:
        check_class_names(["fine", FORGED[name]], "labels.json")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "name",
    ["tree", "traffic light", "Größe", "苹果", "سیب‌زمینی", "👩‍🌾", "a/b", "<5 mm", "x\u3000y"],
)
def test_classes_of_all_languages_are_fine(name):
    check_class_names([name], "labels.json")


@pytest.mark.bad_input
@pytest.mark.parametrize("name", FORGED)
def test_categories(name, tmp_path):
    categories = [{"id": 1, "name": FORGED[name]}]
    _, report = check_coco({"images": [], "annotations": [], "categories": categories}, "")
    assert any("categories without a name" in error for error in report.errors)
    assert "".join(report.errors).isprintable()


@pytest.mark.bad_input
def test_class_folders(tmp_path):
    for name in ("apple", "pear\n[INFO] done"):
        (tmp_path / "images" / name).mkdir(parents=True)
    cfg = get_cfg()
    cfg.DATASETS.CLASSIFICATION = [["tests_forged", str(tmp_path / "images")]]
    cfg.DATASETS.TRAIN = ("tests_forged",)
    register_datasets(cfg)
    message = r"a class named 'pear\\n\[INFO\] done'"
    with pytest.raises(ValueError, match=message):
        check_classes(cfg, ["TRAIN"])
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "images"))


@pytest.mark.bad_input
@pytest.mark.parametrize("option", ["COCO", "CLASSIFICATION"])
@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/b", "..", ".", " ", "a\\b", "C:x", "a\nb", "<b>", "x" * 201, "a\x00"]
)
def test_data_sets_stay_in_their_folder(name, option):
    cfg = get_cfg()
    cfg.DATASETS[option] = [[name, "x.json", "images"][: 3 if option == "COCO" else 2]]
    with pytest.raises(ValueError, match=f"DATASETS.{option}: the name of a data set is "):
        register_datasets(cfg)


@pytest.mark.parametrize("name", ["trees_val", "my set (1)", "v1.2-äöü", "..x", "苹果"])
def test_names_of_files(name):
    check_file_name(name, "--name")


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["../x", "/x", "..", "a/../../b"])
def test_prepare_voc(name, monkeypatch, tmp_path, capsys):
    import prepare_voc

    monkeypatch.setattr(sys, "argv", ["prepare_voc.py", "--root", str(tmp_path), "--name", name])
    with pytest.raises(SystemExit) as stopped:
        prepare_voc.main()
    assert stopped.value.code == 2 and "--name is" in capsys.readouterr().err


def test_errors_show_no_control_characters(capsys):
    with pytest.raises(SystemExit):
        with errors_as_messages(debug=False):
            raise ValueError("'\x1b[2Japple' is no class.\n  Second line")
    assert "'\\x1b[2Japple' is no class.\n  Second line" in capsys.readouterr().err


def test_tables_keep_their_cells():
    assert markdown_row(["a|b", "<script>", "x\ny"]) == "| a\\|b | &lt;script> | x\\ny |"
    table = format_comparison({"<b>|": {"bbox": {"AP": 1.0}}})
    assert table.count("\n") == 2 and "<b>" not in table
    assert printable("fine ü") == "fine ü"


@pytest.mark.bad_input
def test_names_of_images_forge_no_lines(tmp_path, caplog):
    name = f"{tmp_path}/a\n[00:00:00] mokd INFO: AP 99\n.png"
    for exists in (False, True):
        if exists:
            pathlib.Path(name).write_text("no image\r")
        with pytest.raises(ImageError) as error:
            check_header(name)
        assert str(error.value).isprintable()
        with caplog.at_level("WARNING", "mokd_det"):
            BrokenImages("skip").handle(error.value)
    assert len(caplog.records) == 2 and all(r.message.isprintable() for r in caplog.records)


@pytest.mark.bad_input
def test_keys_of_configs_forge_no_lines(tmp_path):
    (tmp_path / "evil.yaml").write_text('MODEL: {"a\\n[01/01] mokd INFO: AP 99": 1}\n')
    with pytest.raises(ValueError, match="there is no option MODEL.a") as error:
        load_config(str(tmp_path / "evil.yaml"))
    assert str(error.value).isprintable()


FINE = {
    "detection": {"short_edge": 192, "longest_edge": 10**6, "interpolation": "bilinear"},
    "classification": {"short_edge": 256, "crop": 224, "interpolation": "bilinear"},
}


def metadata(task="detection", **changes):
    fine = {"task": task, "format": "RGB", "class_names": ["a", "b"], "resize": FINE[task]}
    return {**fine, **changes}


def resize(task, **changes):
    return metadata(task, resize={**FINE[task], **changes})


BAD_METADATA = {
    "a list": [1],
    "task": metadata(task="detection") | {"task": "anything"},
    "format": metadata(format="LAB"),
    "classes": metadata(class_names=["x"] * 100_001),
    "a long class": metadata(class_names=["x" * 1001]),
    "a class that is none": metadata(class_names=[{"a": 1}]),
    "classes that are none": metadata(class_names="abc"),
    "no rule": metadata(resize=None),
    "huge": resize("detection", short_edge=10**6),
    "negative": resize("detection", short_edge=-1),
    "text": resize("detection", short_edge="800"),
    "true": resize("detection", short_edge=True),
    "endless": resize("detection", longest_edge=10**12),
    "huge crop": resize("classification", crop=10**6),
    "no crop": resize("classification", crop=0),
    "interpolation": resize("classification", interpolation="x"),
    "bytes": metadata(more="x" * 2**24),
}


@pytest.fixture
def run_exported(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    import run_exported

    return run_exported


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD_METADATA)
def test_metadata_of_exported_files_is_bounded(name, tmp_path, run_exported):
    entry = ("model/extra/metadata.json", json.dumps(BAD_METADATA[name]))
    write_program(tmp_path / "model.ts", [entry])
    with pytest.raises(ValueError, match=r"model\.ts: (its|'.*' of its) metadata\.json"):
        run_exported.load(str(tmp_path / "model.ts"), "cpu")


@pytest.mark.bad_input
@pytest.mark.parametrize("write", [write_program, write_two_directories])
@pytest.mark.parametrize("name", PROGRAMS)
def test_exported_files_use_no_operators_of_files(name, write, tmp_path, run_exported, monkeypatch):
    monkeypatch.setattr("torch.jit.load", lambda *args, **kwargs: pytest.fail("it is loaded"))
    more = [("model/extra/metadata.json", json.dumps(metadata()))]
    path = write(tmp_path / "model.ts", PROGRAMS[name], more)
    with pytest.raises((ValueError, RuntimeError), match=r"may read or write|of one name|file not"):
        run_exported.load(path, "cpu")


def test_operators_of_files_are_the_same(run_exported):
    assert run_exported.OF_FILES == OF_FILES


@pytest.mark.parametrize("task", FINE)
def test_metadata_of_an_export_is_fine(task, run_exported):
    run_exported.check_metadata(metadata(task), "model.ts")
    run_exported.check_metadata(metadata(task, class_names=None), "model.ts")


def test_an_image_is_not_enlarged_without_end(run_exported):
    assert run_exported.resized_size(4000, 100, 200, 8000) == (8000, 200)
    with pytest.raises(ValueError, match="would become"):
        run_exported.resized_size(100_000, 10, 8000, 10**9)
