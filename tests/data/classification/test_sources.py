# Copyright (c) The mokd_det authors.
"""Labelled images: where they come from, and what is checked before any is read."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from mokd_det.config import load_config
from mokd_det.data import check_classes, check_datasets, register_datasets
from mokd_det.data.classification import ClassFolders, PackedImages, open_source, write_packed

from ...conftest import DIGITS, DIGIT_OPTS


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
    assert "1 classes have no image: digit_0" in caplog.text


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


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": np.zeros((2, 4, 4), np.uint8)}, r"lacks \['classes', 'labels'\]"),
        (
            {"images": np.zeros((2, 4, 4)), "labels": np.zeros(2, int), "classes": ["a"]},
            r"expected images \(N, H, W\)",
        ),
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


def test_a_file_that_is_no_npz_is_an_error(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"not packed")
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
