# Copyright (c) The mokd_det authors.
"""The door for COCO's format: a table of files that people have, and what becomes of each."""

import copy
import json
import math
import re

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as coco_mask

from mokd_det.config import get_cfg
from mokd_det.data import register_datasets
from mokd_det.data.coco import check_coco, class_names, read_class_names, read_coco, with_classes
from mokd_det.data.coco_segmentations import _decoded

# Two photos of 40 x 30 pixels with an apple and a pear each.
GOOD = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 2, "file_name": "b.png", "width": 40, "height": 30},
    ],
    "categories": [{"id": 1, "name": "apple"}, {"id": 2, "name": "pear"}],
    "annotations": [
        {"id": i, "image_id": i % 2 + 1, "category_id": (i + 1) // 2, "bbox": [4, 5, 8, 6]}
        | {"iscrowd": 0, "area": 48, "segmentation": [[4, 5, 12, 5, 12, 11, 4, 11]]}
        for i in (1, 2, 3, 4)
    ],
}


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(folder / name)
    return str(folder)


def changed(path, value):
    """The good file with another value at a path such as ("annotations", 0, "bbox"); DROP: none."""
    data = copy.deepcopy(GOOD)
    *parents, key = path
    node = data
    for parent in parents:
        node = node[parent]
    if value is DROP:
        del node[key]
    else:
        node[key] = value
    return data


def everywhere(rows, key, values):
    """The good file with other values in all rows of a list; DROP: none."""
    data = copy.deepcopy(GOOD)
    for row, value in zip(data[rows], values):
        row[key] = value
        if value is DROP:
            del row[key]
    return data


DROP = object()
A0 = ("annotations", 0)
BOX = (*A0, "bbox")
NORMALISED = [[0.1, 0.2, 0.3, 0.2]] * 4
SUPER = [
    {"id": 0, "name": "fruit", "supercategory": "none"},
    {"id": 1, "name": "apple", "supercategory": "fruit"},
    {"id": 2, "name": "pear", "supercategory": "fruit"},
]
OTHER_IDS = everywhere("images", "id", ["img_1", "img_2"])
for annotation in OTHER_IDS["annotations"]:
    annotation["image_id"] = f"img_{annotation['image_id']}"

ERRORS = {
    "box of NaN": (changed(BOX, [math.nan, 5, 8, 6]), "not finite .*id 1 in b.png"),
    "box of infinity": (changed(BOX, [4, 5, math.inf, 6]), "not finite .*id 1 in b.png"),
    "box null": (changed(BOX, None), "not four numbers.*id 1 in b.png: None"),
    "box of strings": (changed(BOX, ["4", "5", "8", "6"]), "not four numbers.*id 1"),
    "box of one string": (changed(BOX, "4 5 8 6"), "not four numbers.*id 1"),
    "box of a null": (changed(BOX, [4, None, 8, 6]), "not four numbers.*id 1"),
    "box of three": (changed(BOX, [4, 5, 8]), "not four numbers.*id 1"),
    "box of five": (changed(BOX, [4, 5, 8, 6, 0]), "not four numbers.*id 1"),
    "box too large for a float": (changed(BOX, [4, 5, 10**400, 6]), "not four numbers.*id 1"),
    "box of no number": (changed(BOX, []), "not four numbers.*id 1"),
    "box of dicts": (changed(BOX, {"x": 1}), "not four numbers.*id 1"),
    "no box": (changed(BOX, DROP), "not four numbers.*id 1"),
    "all boxes null": (everywhere("annotations", "bbox", [None] * 4), "not four numbers.*4: id 1"),
    "all boxes empty": (everywhere("annotations", "bbox", [[5, 5, 0, 0]] * 4), "no box that can"),
    "all boxes outside": (
        everywhere("annotations", "bbox", [[50, 5, 9, 9]] * 4),
        "no box that can",
    ),
    "all boxes negative": (
        everywhere("annotations", "bbox", [[9, 9, -5, 4]] * 4),
        "no box that can",
    ),
    "normalised": (everywhere("annotations", "bbox", NORMALISED), "normalised to .0, 1.*pixels"),
    "normalised, one in pixels": (
        everywhere("annotations", "bbox", [*NORMALISED[:3], [4, 5, 8, 6]]),
        "normalised to .0, 1",
    ),
    "corners": (
        everywhere("annotations", "bbox", [[20, 15, 38, 28], [25, 16, 30, 29]] * 2),
        r"look like \[x1, y1, x2, y2\]",
    ),
    "a class without any box": (
        everywhere("annotations", "bbox", [[4, 5, 0, 6], [4, 5, 0, 6], [4, 5, 8, 6], [4, 5, 8, 6]]),
        "classes of which no box can be used .*apple",
    ),
    "no annotations": (changed(("annotations",), DROP), "no 'annotations'"),
    "no image id": (changed(("images", 0, "id"), DROP), "images without an id .*a.png"),
    "image id null": (changed(("images", 0, "id"), None), "images without an id .*a.png"),
    "image ids twice": (everywhere("images", "id", [1, 1]), "ids of several images .*1: 1"),
    "image ids 1 and '1'": (everywhere("images", "id", [1, "1"]), "ids of several images .*1: 1"),
    "category ids twice": (everywhere("categories", "id", [1, 1]), "ids of several categories"),
    "no category id": (changed(("categories", 0, "id"), DROP), "categories without an id .*apple"),
    "category names twice": (everywhere("categories", "name", ["a", "a"]), "names of several"),
    "no category name": (changed(("categories", 0, "name"), DROP), "without a name"),
    "category name null": (changed(("categories", 0, "name"), None), "without a name"),
    "category name a number": (changed(("categories", 0, "name"), 7), "without a name"),
    "no image of an annotation": (changed((*A0, "image_id"), DROP), "without image_id .*id 1"),
    "no category of an annotation": (
        changed((*A0, "category_id"), DROP),
        "without category_id .*id 1 in b.png",
    ),
    "unknown category": (changed((*A0, "category_id"), 9), "no category has .*id 1 in b.png"),
    "category of a list": (changed((*A0, "category_id"), [1]), "no category has .*id 1"),
    "all of unknown images": (
        everywhere("annotations", "image_id", [7] * 4),
        "no image has .*4: id",
    ),
    "crowd of text": (changed((*A0, "iscrowd"), "yes"), "iscrowd is not 0 or 1 .*id 1 .*'yes'"),
    "crowd 2": (changed((*A0, "iscrowd"), 2), "iscrowd is not 0 or 1 .*id 1"),
    "ignored": (changed((*A0, "ignore"), 1), "'ignore'.*id 1"),
    "no file name": (changed(("images", 0, "file_name"), DROP), "without a file_name .*1: 1"),
    "file name null": (changed(("images", 0, "file_name"), None), "without a file_name"),
    "no such file": (changed(("images", 0, "file_name"), "c.png"), "not in .*1: c.png"),
    "no such folder": (changed(("images", 0, "file_name"), "x/a.png"), "not in .*1: x/a.png"),
    "folder of Windows": (changed(("images", 0, "file_name"), "x\\a.png"), "not in .*a.png"),
    "other size": (changed(("images", 0, "width"), 41), "than their file .*a.png"),
    "no images": (changed(("images",), []), "no images"),
}

# What is completed: the file, words of its warning, and what is asked of the result.
COMPLETED = {
    "empty box": (changed(BOX, [4, 5, 0, 6]), "without width or height.*id 1", (0, "id", 2)),
    "negative box": (changed(BOX, [9, 9, -4, 6]), "without width or height.*id 1", (0, "id", 2)),
    "box outside": (changed(BOX, [45, 5, 8, 6]), "outside their image.*id 1", (0, "id", 2)),
    "box above": (changed(BOX, [4, -9, 8, 6]), "outside their image.*id 1", (0, "id", 2)),
    "box in the first pixel": (changed(BOX, [0.1, 0.1, 0.5, 0.5]), "first pixel", (0, "id", 2)),
    "box beyond": (changed(BOX, [30, 5, 20, 6]), "reach beyond.*id 1", (0, "id", 1)),
    "orphan": (changed((*A0, "image_id"), 7), "no image has.*id 1", (0, "id", 2)),
    "no id": (changed((*A0, "id"), DROP), "numbered anew", (0, "id", 1)),
    "id null": (changed((*A0, "id"), None), "numbered anew", (0, "id", 1)),
    "id 0": (changed((*A0, "id"), 0), "numbered anew", (0, "id", 1)),
    "id twice": (changed((*A0, "id"), 2), "numbered anew", (0, "id", 1)),
    "id of text": (changed((*A0, "id"), "x"), "numbered anew", (0, "id", 1)),
    "id of 64 bit": (changed((*A0, "id"), 2**63), "numbered anew", (0, "id", 1)),
    "no area": (changed((*A0, "area"), DROP), "without an area.*id 1", (0, "area", 48)),
    "area 0": (changed((*A0, "area"), 0), "without an area.*id 1", (0, "area", 48)),
    "area negative": (changed((*A0, "area"), -1), "without an area.*id 1", (0, "area", 48)),
    "area of text": (changed((*A0, "area"), "48"), "without an area.*id 1", (0, "area", 48)),
    "area too large": (changed((*A0, "area"), 10**400), "without an area.*id 1", (0, "area", 48)),
    "area null": (changed((*A0, "area"), None), "without an area.*id 1", (0, "area", 48)),
    "area of NaN": (changed((*A0, "area"), math.nan), "without an area.*id 1", (0, "area", 48)),
    "no crowd": (changed((*A0, "iscrowd"), DROP), "without iscrowd.*id 1", (0, "iscrowd", 0)),
    "crowd null": (changed((*A0, "iscrowd"), None), "without iscrowd.*id 1", (0, "iscrowd", 0)),
    "crowd false": (changed((*A0, "iscrowd"), False), None, (0, "iscrowd", 0)),
    "crowd '1'": (changed((*A0, "iscrowd"), "1"), None, (0, "iscrowd", 1)),
    "images of text ids": (OTHER_IDS, "replaced.*'img_1' is 1", (0, "image_id", 2)),
    "an annotation's ids of text": (
        everywhere("annotations", "image_id", ["2", "1", "2", "1"]),
        None,
        (0, "image_id", 2),
    ),
    "an annotation's category of text": (
        everywhere("annotations", "category_id", ["1", 1.0, "2", 2]),
        None,
        (0, "category_id", 1),
    ),
    "parent of all classes": (changed(("categories",), SUPER), "'fruit' .0. is the parent", None),
    "no size": (changed(("images", 0, "width"), DROP), "which are the file's.*a.png", None),
    "size null": (everywhere("images", "height", [None, None]), "which are the file's.*2: ", None),
    "size of text": (
        everywhere("images", "height", ["x", 30]),
        "which are the file's.*a.png",
        None,
    ),
    "size 0": (everywhere("images", "height", [0, 30]), "which are the file's.*a.png", None),
    "a class without annotation": (
        changed(("categories",), [*GOOD["categories"], {"id": 3, "name": "plum"}]),
        "classes without a box .*plum",
        None,
    ),
    "two images of one file": (
        everywhere("images", "file_name", ["a.png", "a.png"]),
        "files of",
        None,
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ERRORS)
def test_wrong_files_are_errors(name, photos):
    data, message = ERRORS[name]
    _, report = check_coco(data, photos)
    with pytest.raises(ValueError, match=message):
        report.raise_for_errors("set")


@pytest.mark.bad_input
@pytest.mark.parametrize("name", COMPLETED)
def test_incomplete_files_are_completed(name, photos):
    data, message, expected = COMPLETED[name]
    before = copy.deepcopy(data)
    completed, report = check_coco(data, photos)
    assert report.errors == []
    if message is not None:
        (warning,) = report.warnings
        assert re.search(message, warning)
    if expected is not None:
        row, key, value = expected
        assert completed["annotations"][row][key] == value
    assert class_names(completed)[:2] == ["apple", "pear"]
    json.dumps(completed, allow_nan=False)
    # What is complete stays as it is, and what was given is not changed.
    again, report = check_coco(completed, photos)
    assert again is completed
    assert repr(data) == repr(before)


def test_a_good_file_is_returned_itself(photos):
    for options in ({}, {"training": False}, {"masks": "polygon"}, {"read_images": False}):
        completed, report = check_coco(GOOD, photos, **options)
        assert completed is GOOD
        assert report.errors == report.warnings == []


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "has a list at its top"),
        (b"3", "has a int at its top"),
        (b"", "no JSON"),
        (b'{"images": [', "no JSON"),
        (b"[" * 100000, "no JSON"),
        (b'{"images": [' + b"7" * 5000 + b"]}", "no JSON"),
        (b"<html></html>", "no JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "no JSON"),
        (json.dumps(GOOD).replace("apple", "Äpfel").encode("latin1"), "is not UTF-8 .*iconv"),
        (b'{"images": [], "annotations": []}', "'categories' is missing"),
        (b'{"images": [], "categories": []}', "'categories' is empty"),
        (b'{"images": {}, "categories": [{}]}', "'images' is no list of dicts"),
        (b'{"images": [1], "categories": [{}]}', "'images' is no list of dicts"),
        (b'{"images": [{}, null], "categories": [{}]}', "'images' is no list of dicts"),
        (b'{"categories": [{}]}', "'images' is missing"),
        (b'{"images": [], "categories": [{}], "annotations": null}', "'annotations' is"),
    ],
)
def test_files_that_are_no_coco(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json.*{message}"):
        read_coco(str(tmp_path / "a.json"))


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_coco(str(tmp_path / "a.json")) == GOOD
    assert read_class_names(str(tmp_path / "a.json")) == ["apple", "pear"]


def test_turned_photos(tmp_path):
    """Their sizes are those of the picture that is seen, as Detectron2 reads it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(tmp_path / name, exif=exif)
    assert check_coco(GOOD, str(tmp_path))[1].errors == []
    wrong = changed(("images",), [{**i, "width": 30, "height": 40} for i in GOOD["images"]])
    (error,) = check_coco(wrong, str(tmp_path))[1].errors
    assert "exchanged" in error and "EXIF" in error
    assert check_coco(wrong, str(tmp_path), read_images=False)[1].errors == []


@pytest.mark.bad_input
def test_files_that_are_no_images(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("no image")
    (error,) = check_coco(GOOD, str(tmp_path))[1].errors
    assert re.search("cannot be read .2: The image .*a.png cannot be read: ", error)
    _, report = check_coco(GOOD, str(tmp_path), broken="skip")
    assert report.errors == [] and report.warnings == [error]
    no_size = changed(("images", 0, "width"), DROP)
    (error,) = check_coco(no_size, str(tmp_path), broken="skip")[1].errors
    assert "without width and height" in error


RLE = {"size": [30, 40], "counts": [100, 50, 1050]}
CODE = coco_mask.frPyObjects(RLE, 30, 40)["counts"].decode()
MASKS = {
    "none": (DROP, "without a segmentation .*id 1", None),
    "null": (None, "without a segmentation .*id 1", None),
    "empty": ([], "without a segmentation .*id 1", None),
    "two points": ([[4, 5, 12, 5]], "without a segmentation .*id 1", None),
    "odd": ([[4, 5, 12, 5, 12, 11, 4]], "without a segmentation .*id 1", None),
    "text": ("x", "without a segmentation .*id 1", None),
    "texts": ([["4", "5", "12", "5", "12", "11"]], "without a segmentation .*id 1", None),
    "NaN": ([[4, 5, math.nan, 5, 12, 11]], "without a segmentation .*id 1", None),
    "flat": ([4, 5, 12, 5, 12, 11], None, [[4, 5, 12, 5, 12, 11]]),
    "code": (RLE, "set it to 'bitmask'", None),
    "code of another size": ({**RLE, "size": [40, 30]}, "another size", None),
    "code that is too short": ({**RLE, "counts": [100]}, "without a segmentation", None),
    "code of no pixel": ({**RLE, "counts": [1200]}, "without a segmentation", None),
    "code of negative sizes": ({"size": [-30, -40], "counts": [100, 1100]}, "without a seg", None),
    "code of garbage": ({**RLE, "counts": "abc"}, "without a segmentation .*id 1", None),
    "code of nothing": ({**RLE, "counts": ""}, "without a segmentation .*id 1", None),
    "code that is cut": ({**RLE, "counts": CODE[:-1]}, "without a segmentation .*id 1", None),
    "code of a line end": ({**RLE, "counts": CODE + "\n"}, "without a segmentation .*id 1", None),
    "compressed code": ({**RLE, "counts": CODE}, "set it to 'bitmask'", None),
    "numbers too large": ([[4, 5, 10**400, 5, 12, 11]], "without a segmentation .*id 1", None),
    "code without size": ({"counts": [1200]}, "without a segmentation", None),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, photos):
    segmentation, message, expected = MASKS[name]
    data = changed((*A0, "segmentation"), segmentation)
    completed, report = check_coco(data, photos, masks="polygon")
    if message is None:
        assert report.errors == []
        assert completed["annotations"][0]["segmentation"] == expected
    else:
        with pytest.raises(ValueError, match=message):
            report.raise_for_errors("set")
    # A detector of boxes needs no mask, and loses no box for a bad one.
    completed, report = check_coco(data, photos)
    assert report.errors == []
    assert len(completed["annotations"]) == 4
    # ... also without an area, which is that of the mask, or else of the box.
    del data["annotations"][0]["area"]
    assert check_coco(data, photos)[0]["annotations"][0]["area"] > 0


def test_codes_are_masks_too(photos):
    data = changed((*A0, "segmentation"), RLE)
    assert check_coco(data, photos, masks="bitmask")[1].errors == []
    del data["annotations"][0]["area"]
    assert check_coco(data, photos, masks="bitmask")[0]["annotations"][0]["area"] == 50


def test_compressed_codes_are_read_as_pycocotools_does():
    random = np.random.default_rng(0)
    for _ in range(50):
        h, w = random.integers(1, 60, 2)
        mask = random.random((h, w)) < random.random()
        mask[random.integers(h) :] = random.random() < 0.5
        code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        counts = _decoded(code["counts"].decode())
        assert sum(counts) == h * w and sum(counts[1::2]) == mask.sum()
        assert np.array_equal(np.repeat(np.arange(len(counts)) % 2, counts), mask.T.ravel())


def with_keypoints(first, count=2):
    data = copy.deepcopy(GOOD)
    for category in data["categories"]:
        category["keypoints"] = ["left", "right"]
    for row in data["annotations"]:
        row |= {"keypoints": [5, 6, 2, 7, 8, 1], "num_keypoints": 2}
    data["annotations"][0] |= {"keypoints": first, "num_keypoints": count}
    return data


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "keypoints", [[1, 2], "x", [5, 6, 2, 7, 8, None], [5, 6, 2, 7, math.nan, 1], [10**400] * 6]
)
def test_wrong_keypoints(keypoints, photos):
    (error,) = check_coco(with_keypoints(keypoints), photos, keypoints=True)[1].errors
    assert "not 6 numbers" in error and "id 1 in b.png" in error
    completed, report = check_coco(with_keypoints(keypoints), photos)  # of a detector of boxes
    assert report.errors == []
    assert "keypoints" not in completed["annotations"][0]


@pytest.mark.bad_input
@pytest.mark.parametrize("names", [3, "left", [1, 2], {"left": 1}])
def test_wrong_names_of_keypoints(names, photos, tmp_path):
    data = with_keypoints([5, 6, 2, 7, 8, 1])
    for category in data["categories"]:
        category["keypoints"] = names
    message = "keypoints are no list of names: " + re.escape(repr(names))
    with pytest.raises(ValueError, match=message):
        check_coco(data, photos, keypoints=True)[1].raise_for_errors("set")
    assert check_coco(data, photos)[1].errors == []
    (tmp_path / "set.json").write_text(json.dumps(data))
    cfg = get_cfg()
    cfg.DATASETS.COCO = [["tests_odd_keypoints", str(tmp_path / "set.json"), photos]]
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(ValueError, match=message):
        register_datasets(cfg)
    DatasetCatalog.remove("tests_odd_keypoints")
    MetadataCatalog.remove("tests_odd_keypoints")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("keypoints", "count", "expected"),
    [
        (None, None, ([0] * 6, 0)),
        ([], 0, ([0] * 6, 0)),
        ([5, 6, 2, 0, 0, 0], None, ([5, 6, 2, 0, 0, 0], 1)),
        ([5, 6, 2, 7, 8, 1], "2", ([5, 6, 2, 7, 8, 1], 2)),
    ],
)
def test_keypoints_are_counted(keypoints, count, expected, photos):
    completed, report = check_coco(with_keypoints(keypoints, count), photos, keypoints=True)
    row = completed["annotations"][0]
    assert (row["keypoints"], row["num_keypoints"]) == expected
    assert report.errors == [] and report.warnings


def test_classes_get_the_numbers_of_the_model():
    assert with_classes(GOOD, ["apple", "pear"]) is GOOD
    turned = with_classes(GOOD, ["pear", "plum", "apple"])
    assert class_names(turned) == ["pear", "plum", "apple"]
    assert [row["category_id"] for row in turned["annotations"]] == [3, 3, 1, 1]
    with pytest.raises(ValueError, match="'pear'.* are not among"):
        with_classes(GOOD, ["apple"])
