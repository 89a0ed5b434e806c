# Copyright (c) The mokd_det authors.
"""Labelled images: where they come from, and what is checked before any is read."""

import os
import re

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from mokd_det.config import load_config
from mokd_det.data import check_classes, check_datasets, register_datasets
from mokd_det.data.classification import (
    ClassFolders,
    PackedImages,
    check_source,
    open_source,
    write_packed,
)

from mokd_det.data.classification.loader import read_image
from mokd_det.data.report import Report

from ...conftest import DIGITS, DIGIT_OPTS
from ..images import BAD_FILES, SIZE, encoded, message_of, write_bad


@pytest.fixture
def folders(tmp_path):
    """The first 20 digits of tests/data as PNG files in folders of their classes."""
    packed = PackedImages(str(DIGITS / "val.npz"))
    root = tmp_path / "digits"
    for index in range(20):
        item = packed[index]
        folder = root / f"digit_{item['label']}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(item["image"]).save(folder / f"{index}.png")
    return root


def test_folders_give_labels_in_the_order_of_their_names(folders):
    deeper = folders / "digit_3" / "more"
    deeper.mkdir()
    (folders / "digit_3" / "3.png").rename(deeper / "x.PNG")
    (folders / "digit_4" / "notes.txt").write_text("no image")
    source = ClassFolders(str(folders))
    assert source.classes == [f"digit_{i}" for i in range(10)]
    assert len(source) == 20
    for item in source:
        assert f"digit_{item['label']}" == item["name"].split("/")[0]
    assert "digit_3/more/x.PNG" in {item["name"] for item in source}


def test_a_class_without_images_keeps_its_label_and_is_warned_of(folders, caplog):
    for file in (folders / "digit_0").iterdir():
        file.unlink()
    source = ClassFolders(str(folders))
    assert min(item["label"] for item in source) == 1
    assert "classes have no image (1: digit_0)" in caplog.text
    assert source.report.warnings == ["classes have no image (1: digit_0)"]


def put(root, path, content=None):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encoded("png") if content is None else content)


SYSTEM_FILES = [
    ".ipynb_checkpoints/cat-checkpoint.png",
    "__MACOSX/cat/._0.png",
    "@eaDir/cat/0.png",
    ".git/0.png",
    "cat/.ipynb_checkpoints/0-checkpoint.png",
    "cat/._0.png",
    "cat/@eaDir/0.png",
    "cat/Thumbs.db",
    "dog/.DS_Store",
    "dog/desktop.ini",
    ".DS_Store",
    "Thumbs.db",
    "._0.png",
]


@pytest.mark.bad_input
@pytest.mark.parametrize("path", SYSTEM_FILES)
def test_files_and_folders_of_the_system_are_no_classes_and_no_images(tmp_path, path):
    for name in ("cat/0.png", "dog/0.png"):
        put(tmp_path, name)
    put(tmp_path, path)
    source = ClassFolders(str(tmp_path))
    assert source.classes == ["cat", "dog"]
    assert [item["name"] for item in source] == ["cat/0.png", "dog/0.png"]
    assert check_source(str(tmp_path), read_images=True) == Report()


@pytest.mark.bad_input
def test_only_hidden_folders_are_no_classes(tmp_path):
    put(tmp_path, ".ipynb_checkpoints/0.png")
    with pytest.raises(FileNotFoundError, match="has no folders: expected one for each class"):
        ClassFolders(str(tmp_path))


@pytest.mark.parametrize("suffix", ["jpg", "JPG", "jpeg", "JPEG", "jfif", "JFIF", "jpe", "png"])
@pytest.mark.parametrize("folder", ["cat", "cat/deep/deeper"])
def test_extensions_of_images(tmp_path, suffix, folder):
    put(tmp_path, f"{folder}/a.{suffix}", encoded("png" if suffix == "png" else "jpg"))
    source = ClassFolders(str(tmp_path))
    assert [item["name"] for item in source] == [f"{folder}/a.{suffix}"]
    assert read_image(source[0]).size == SIZE


@pytest.mark.parametrize("suffix", ["webp", "avif", "tif", "TIFF", "bmp", "ppm", "pgm"])
def test_extensions_that_pillow_reads(tmp_path, suffix):
    if f".{suffix.lower()}" not in Image.registered_extensions():
        pytest.skip("not this Pillow")
    put(tmp_path, f"cat/a.{suffix}", encoded(suffix.lower(), "L" if suffix == "pgm" else "RGB"))
    assert read_image(ClassFolders(str(tmp_path))[0]).size == SIZE


WARNINGS = {
    "text": (["cat/a.txt", "cat/b.TXT", "dog/x/c.md"], r"2 .txt, 1 .md: files .* out .3: .*a.txt"),
    "no extension": (["cat/a"], "1 none: files that are no images are left out"),
    "gif": (["cat/a.gif"], "1 .gif: files that are no images"),
    "beside": (["0.png", "1.JPG"], "beside the folders of classes .* out .2: 0.png, 1.JPG"),
    "case": (["Cat/0.png"], r"differ in capitals or spaces only .1: Cat and cat\)"),
    "space": (["cat /0.png"], "differ in capitals or spaces only .1: cat and cat "),
    "empty": (["bird/a.txt"], r"classes have no image .1: bird\)"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", WARNINGS)
def test_what_looks_wrong_is_one_warning(tmp_path, caplog, name):
    paths, message = WARNINGS[name]
    for path in ["cat/0.png", "dog/0.png", *paths]:
        put(tmp_path, path)
    report = check_source(str(tmp_path))
    assert not report.errors and sum(bool(re.search(message, w)) for w in report.warnings) == 1
    assert len(report.warnings) == (2 if name == "empty" else 1)
    assert all(warning in caplog.text for warning in report.warnings)


@pytest.mark.bad_input
def test_links(tmp_path):
    put(tmp_path / "elsewhere", "0.png")
    put(tmp_path, "set/cat/0.png")
    (tmp_path / "set/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/cat/up").symlink_to(tmp_path / "set/cat")
    (tmp_path / "set/cat/gone.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "set/cat/pipe.png")
    report = check_source(str(tmp_path / "set"))
    names = [item["name"] for item in open_source(str(tmp_path / "set"))]
    assert names == ["cat/0.png", "dog/0.png"]
    assert [w.split(" (")[0].split(" ", 1)[0] for w in report.warnings] == ["files", "links"]
    assert "2: " in report.warnings[0] and "pipe.png" in report.warnings[0]


@pytest.mark.bad_input
def test_a_folder_of_splits_is_no_set(tmp_path):
    for split in ("train", "valid"):
        for name in ("cat", "dog"):
            put(tmp_path, f"{split}/{name}/0.png")
    cfg = digits_cfg(
        *("DATASETS.CLASSIFICATION", [["tests_splits", str(tmp_path)]]),
        *("DATASETS.TRAIN", ("tests_splits",), "DATASETS.TEST", ("tests_splits",)),
    )
    with pytest.raises(
        ValueError, match="train, valid, which are splits, .* one of them, as .*/tr"
    ):
        check(cfg)
    assert check_source(str(tmp_path / "train")) == Report()
    put(tmp_path / "games", "test/0.png")  # classes may be called so
    put(tmp_path / "games", "train/0.png")
    assert ClassFolders(str(tmp_path / "games")).classes == ["test", "train"]


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("broken", ["error", "skip"])
def test_unreadable_images_are_found_before_training(tmp_path, name, broken):
    put(tmp_path, "cat/0.png")
    write_bad(tmp_path / "cat", name)
    report = check_source(str(tmp_path), read_images=True, broken=broken)
    kinds = report.errors, report.warnings
    found, other = kinds if broken == "error" else kinds[::-1]
    assert len(found) == 1 and not other
    assert re.search("empty files" if name == "empty" else message_of(name), found[0])
    report = check_source(str(tmp_path), broken=broken)
    assert bool(report.errors + report.warnings) == (not name.startswith("cut"))  # by the header


def test_a_source_that_is_none_is_an_error_of_the_report(tmp_path):
    for path in (tmp_path, tmp_path / "x.npz"):
        report = check_source(str(path))
        assert len(report.errors) == 1 and str(path) in report.errors[0]
        with pytest.raises((FileNotFoundError, ValueError), match=f"the set: .*{path}"):
            report.raise_for_errors("the set")


def test_reports_raise_all_errors_at_once():
    report = Report()
    report.raise_for_errors("x")
    report.warn("odd", [1, 2])
    report.raise_for_errors("x")
    report.error("bad", "abcd")
    assert report.warnings == ["odd (2: 1, 2)"] and report.errors == ["bad (4: a, b, c, ...)"]
    with pytest.raises(ValueError, match=r"^x: bad \(4: a, b, c, ...\)$"):
        report.raise_for_errors("x")
    report.error("worse")
    with pytest.raises(ValueError, match="x has 2 kinds of errors:\n  bad .*\n  worse$"):
        report.raise_for_errors("x")


def test_folders_without_classes_or_images_are_errors(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no folders: expected one for each class"):
        ClassFolders(str(folders / "digit_1"))
    empty = tmp_path / "empty" / "class"
    empty.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="1 folders of classes, but no image"):
        ClassFolders(str(empty.parent))


def test_packed_images_come_back(tmp_path):
    images = np.arange(5 * 4 * 3 * 3, dtype=np.uint8).reshape(5, 4, 3, 3)
    path = str(tmp_path / "new" / "set.npz")
    write_packed(path, images, np.array([0, 1, 1, 0, 1]), ["a", "b"])
    source = PackedImages(path)
    assert len(source) == 5 and source.classes == ["a", "b"]
    assert np.array_equal(source[3]["image"], images[3]) and source[2]["label"] == 1
    assert source[4]["name"] == "set.npz#4"
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["set.npz"]


def packed(**changed):
    images = np.zeros((2, 4, 4), np.uint8)
    return {"images": images, "labels": [0, 1], "classes": ["a", "b"], **changed}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": np.zeros((2, 4, 4), np.uint8)}, r"lacks \['classes', 'labels'\]"),
        (
            {"images": np.zeros((2, 4, 4)), "labels": np.zeros(2, int), "classes": ["a"]},
            r"expected images \(N, H, W\)",
        ),
        (packed(images=np.zeros((2, 4, 4), np.uint16)), "expected images .* uint16"),
        (packed(images=np.zeros((2, 4), np.uint8)), r"it has \(2, 4\) uint8"),
        (packed(images=np.zeros((2, 4, 4, 4), np.uint8)), r"it has \(2, 4, 4, 4\) uint8"),
        (packed(images=np.zeros((2, 0, 4), np.uint8)), r"it has \(2, 0, 4\) uint8"),
        (packed(images=np.zeros((0, 4, 4), np.uint8), labels=[]), r"it has \(0, 4, 4\) uint8"),
        (packed(labels=[0.0, 1.0]), "labels .N,. integer, but .* float64"),
        (packed(labels=[0]), r"and \(1,\) int64"),
        (packed(labels=[[1, 0], [0, 1]]), r"and \(2, 2\) int64"),
        (packed(labels=[0, 2]), "labels from 0 to 2 do not fit its 2 classes"),
        (packed(labels=[-1, 1]), "labels from -1 to 1 do not fit"),
        (packed(classes=["a", "a"]), "expected classes .C,., different strings"),
        (packed(classes=[0, 1]), "expected classes .C,., different strings, but .* int64"),
        (packed(classes=np.array(["a", "b"], object)), "is not an .npz file of plain arrays: Obj"),
        (packed(labels=np.array([0, None], object)), "is not an .npz file of plain arrays: Obj"),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": [0, 1], "classes": ["a"]},
            "labels from 0 to 1 do not fit its 1 classes",
        ),
    ],
)
def test_packed_files_of_something_else_are_errors(tmp_path, arrays, message):
    path = str(tmp_path / "x.npz")
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message):
        PackedImages(path)
    assert re.search(message, check_source(path).errors[0])


@pytest.mark.bad_input
@pytest.mark.parametrize("content", [b"not packed", b"", b"PK\x03\x04 cut", b"\x93NUMPY"])
def test_a_file_that_is_no_npz_is_an_error(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match="is not an .npz file"):
        PackedImages(str(tmp_path / "x.npz"))


def digits_cfg(*opts):
    return load_config("configs/Digits/teacher.yaml", [*DIGIT_OPTS, *opts])


def check(cfg):
    register_datasets(cfg)
    check_datasets(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    check_datasets(cfg.DATASETS.TEST, "DATASETS.TEST")
    check_classes(cfg)


def test_sets_of_the_config_are_registered_again_and_again():
    for _ in range(2):
        check(digits_cfg())
    assert len(DatasetCatalog.get("tests_digits_train")) == 60
    assert DatasetCatalog.get("tests_digits_val").classes == list("0123456789")


def test_another_number_of_classes_than_the_classifiers_is_an_error():
    with pytest.raises(ValueError, match="NUM_CLASSES is 7, but 'tests_digits_train' has 10"):
        check(digits_cfg("MODEL.CLASSIFIER.NUM_CLASSES", 7))


def test_other_classes_in_evaluation_are_an_error(folders):
    sets = [*DIGIT_OPTS[1], ["tests_folders", str(folders)]]
    opts = ["DATASETS.CLASSIFICATION", sets, "DATASETS.TEST", ("tests_folders",)]
    with pytest.raises(ValueError, match="'tests_folders' has other classes .*digit_0"):
        check(digits_cfg(*opts))


def test_sets_that_are_not_there(tmp_path):
    missing = [["tests_gone", str(tmp_path / "gone")]]
    with pytest.raises(FileNotFoundError, match="'tests_gone' are missing: expected .*gone"):
        check(digits_cfg("DATASETS.CLASSIFICATION", missing, "DATASETS.TRAIN", ("tests_gone",)))


def test_imagenet_that_is_not_there_says_where_it_is_expected(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = load_config("configs/ImageNet-Classification/resnet18.yaml")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/imagenet/train.*image-net.org"):
        check(cfg)


def test_a_flat_validation_folder_says_how_to_sort_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "imagenet" / "train" / "n01").mkdir(parents=True)
    (tmp_path / "imagenet" / "val").mkdir()
    opts = ["MODEL.CLASSIFIER.NUM_CLASSES", 1]
    cfg = load_config("configs/ImageNet-Classification/resnet18.yaml", opts)
    with pytest.raises(FileNotFoundError, match="one flat folder"):
        check(cfg)


def test_sets_for_detection_are_refused():
    cfg = digits_cfg("DATASETS.TEST", ("coco_2017_val",))
    register_datasets(cfg)
    with pytest.raises(ValueError, match="'coco_2017_val', which is no set for classification"):
        check_classes(cfg)


def test_malformed_entries_and_names_that_are_taken(folders):
    with pytest.raises(ValueError, match=r"\['x'\]: expected \[name, path"):
        register_datasets(digits_cfg("DATASETS.CLASSIFICATION", [["x"]]))
    check(digits_cfg())
    taken = [["tests_digits_train", str(folders)]]
    with pytest.raises(ValueError, match="'tests_digits_train' is taken by another data set"):
        register_datasets(digits_cfg("DATASETS.CLASSIFICATION", taken))


def test_sources_are_opened_once():
    path = str(DIGITS / "train.npz")
    assert open_source(path) is open_source(path)


@pytest.mark.bad_input
def test_a_pack_without_images_of_a_class_is_warned_of(tmp_path):
    write_packed(str(tmp_path / "x.npz"), np.zeros((1, 2, 2), np.uint8), np.array([1]), ["a", "b"])
    assert check_source(str(tmp_path / "x.npz")) == Report([], ["classes have no image (1: a)"])
