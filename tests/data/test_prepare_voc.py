# Copyright (c) The mokd_det authors.
"""VOC-style folders as people have them, through datasets/prepare_voc.py."""

import json
import re
import sys

import prepare_voc  # of datasets/
import pytest
from PIL import Image

from .images import SIZE, encoded

pytestmark = pytest.mark.bad_input

OBJECT = """<object><name>{0}</name><bndbox><xmin>{1}</xmin><ymin>{2}</ymin><xmax>{3}</xmax>
<ymax>{4}</ymax></bndbox></object>"""
BOX = (2, 2, 9, 7)


def xml(*classes, filename=None, size=None, boxes=(BOX,)):
    """Return an annotation with these boxes of each class."""
    parts = [OBJECT.format(name, *box) for name in classes or ("cat",) for box in boxes]
    if filename:
        parts.insert(0, f"<filename>{filename}</filename>")
    if size:
        parts.insert(0, "<size><width>{}</width><height>{}</height></size>".format(*size))
    return f"<annotation>{''.join(parts)}</annotation>"


def write_all(root, files):
    """Write files by path; images are None, and written by their suffix."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            content = encoded(path.suffix[1:].lower())
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def voc(root, names, **lists):
    """A VOC folder with a class "cat" in each image; ``lists`` are of ImageSets/Main."""
    files = {f"ImageSets/Main/{name}.txt": content for name, content in lists.items()}
    for name in names:
        files[f"JPEGImages/{name}.png"] = None
        files[f"Annotations/{name}.xml"] = xml()
    return write_all(root, files)


def names_in(output, split):
    coco = json.loads((output / f"{split}.json").read_text())
    for image in coco["images"]:
        assert (output / "images" / image["file_name"]).is_file()
    return [image["file_name"] for image in coco["images"]]


def classes_in(output, split):
    return [c["name"] for c in json.loads((output / f"{split}.json").read_text())["categories"]]


BOM = "\ufeff"
LISTS = {
    "plain": ("a\nb\n", ["a", "b"], ["a.png", "b.png"]),
    "byte-order mark": (BOM + "a\nb\n", ["a", "b"], ["a.png", "b.png"]),
    "of Windows": (BOM + "a\r\nb\r\n\r\n", ["a", "b"], ["a.png", "b.png"]),
    "no line end": ("a\n\n  b", ["a", "b"], ["a.png", "b.png"]),
    "spaces": ("img 1\nimg 2\n", ["img 1", "img 2", "img"], ["img 1.png", "img 2.png"]),
    "brackets": ("photo (1)\n", ["photo (1)", "photo"], ["photo (1).png"]),
    "dots": ("a.rf.1\n", ["a.rf.1", "a"], ["a.rf.1.png"]),
    "of a class": ("a  1\nb -1\n", ["a", "b"], ["a.png", "b.png"]),
    "of a class, spaces": ("a b  1\na  0\n", ["a b", "a"], ["a b.png", "a.png"]),
    "umlauts": ("bär\n", ["bär"], ["bär.png"]),
    "folders": ("s/a\nt/a\n", ["s/a", "t/a"], ["s/a.png", "t/a.png"]),
    "without their folders": ("a\nb\n", ["s/a", "t/b"], ["s/a.png", "t/b.png"]),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists(tmp_path, kind):
    content, names, expected = LISTS[kind]
    root = voc(tmp_path / "voc", names, train=content)
    prepare_voc.prepare(root, tmp_path / "out")
    assert names_in(tmp_path / "out", "train") == expected


BAD_LISTS = {
    "twice": ("a\na\n", ["a"], ValueError, "train.txt lists an image twice"),
    "twice, by class": ("a\na 1\n", ["a"], ValueError, "train.txt lists an image twice"),
    "absent": ("a\nc\n", ["a"], FileNotFoundError, "c.xml does not exist, but split 'train' lists"),
    "absent with spaces": ("photo (1)\n", ["photo"], FileNotFoundError, r"photo \(1\).xml does no"),
    "two folders": ("a\n", ["s/a", "t/a"], ValueError, "'a' could be .*s/a.xml or .*t/a.xml: list"),
    "empty": ("\n", ["a"], ValueError, "split 'train' has no annotation file"),
    "Latin-1": ("bär\n".encode("latin-1"), ["a"], ValueError, "train.txt is no text in UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_bad_lists(tmp_path, kind):
    content, names, error, message = BAD_LISTS[kind]
    root = voc(tmp_path / "voc", names, train=content)
    with pytest.raises(error, match=message):
        prepare_voc.prepare(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


J, A = "JPEGImages/", "Annotations/"
# Files, the images that are converted, and the warning.
IMAGES = {
    "its name": ({J + "a.png": None, A + "a.xml": xml(filename="a.png")}, ["a.png"], ""),
    "another suffix": ({J + "a.png": None, A + "a.xml": xml(filename="a.jpg")}, ["a.png"], ""),
    "no suffix": ({J + "a.b.png": None, A + "a.b.xml": xml(filename="a.b")}, ["a.b.png"], ""),
    "two of a name": (
        {J + "a.png": None, J + "a.jpg": None, A + "a.xml": xml(filename="a.jpg")},
        ["a.jpg"],
        "images without an XML file are left out .1: .*a.png",
    ),
    "by filename": (
        {J + "photo.png": None, A + "1.xml": xml(filename="photo.png")},
        ["photo.png"],
        "",
    ),
    "by a path": ({J + "p.png": None, A + "p.xml": xml(filename=r"C:\x\p.png")}, ["p.png"], ""),
    "renamed": (
        {J + "a.png": None, A + "a.xml": xml(filename="IMG_7.png")},
        ["a.png"],
        r"the image of the XML's name is taken, not <filename>'s .1: .*a.xml names 'IMG_7.png'",
    ),
    "copied": (
        {J + "a.png": None, J + "a_turned.png": None, A + "a.xml": xml(filename="a.png")}
        | {A + "a_turned.xml": xml(filename="a.png")},
        ["a.png", "a_turned.png"],
        "not <filename>'s .1: .*a_turned.xml names 'a.png'",
    ),
    "sub-folders": (
        {J + "s/a.png": None, J + "c.png": None, A + "s/a.xml": xml(), A + "c.xml": xml()},
        ["c.png", "s/a.png"],
        "",
    ),
    "sub-folders of images": ({J + "s/a.png": None, A + "a.xml": xml()}, ["s/a.png"], ""),
    "one name in two folders": (
        {J + "s/a.png": None, J + "t/a.png": None, A + "s/a.xml": xml(), A + "t/a.xml": xml()},
        ["s/a.png", "t/a.png"],
        "",
    ),
    "upper case": ({J + "a.JPG": None, A + "a.XML": xml()}, ["a.JPG"], ""),
    "jfif, webp": (
        {J + "a.jfif": None, J + "b.webp": None, A + "a.xml": xml(), A + "b.xml": xml()},
        ["a.jfif", "b.webp"],
        "",
    ),
    "hidden": (
        {J + "a.png": None, J + "._a.png": "", A + "a.xml": xml(), A + "._a.xml": "\x00"}
        | {A + ".ipynb_checkpoints/a-checkpoint.xml": xml(), "__MACOSX/a.xml": ""},
        ["a.png"],
        "",
    ),
    "unlabelled": (
        {J + "a.png": None, J + "b.png": None, A + "a.xml": xml()},
        ["a.png"],
        "all: images without an XML file are left out .1: .*b.png",
    ),
    "byte-order mark": (
        {J + "a.png": None, A + "a.xml": BOM + '<?xml version="1.0"?>' + xml()},
        ["a.png"],
        "",
    ),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_which_image_is_whose(tmp_path, caplog, kind):
    files, expected, warning = IMAGES[kind]
    root = write_all(tmp_path / "voc", files)
    prepare_voc.prepare(root, tmp_path / "out")
    assert names_in(tmp_path / "out", "all") == expected
    assert len(caplog.records) == bool(warning) and re.search(warning, caplog.text)
    report = prepare_voc.check(root)
    assert not report.errors and all(told in caplog.text for told in report.warnings)


BAD_IMAGES = {
    "two of a name": (
        {J + "a.png": None, J + "a.jpg": None, A + "a.xml": xml()},
        "a.xml could be of .*a.jpg or .*a.png, and its <filename> '' does not say which",
    ),
    "of two XML files": (
        {J + "a.png": None, A + "a.xml": xml(), A + "b.xml": xml(filename="a.png")},
        "b.xml and .*a.xml are both of .*a.png: remove one",
    ),
    "name or filename": (
        {J + "a.png": None, J + "b.png": None, A + "a.xml": xml(filename="b.png")},
        "a.xml could be of .*a.png, which has its name, or of .*b.png, which its <filename> names",
    ),
    "exchanged": (
        {J + "a.png": None, J + "b.png": None, A + "a.xml": xml(filename="b.png")}
        | {A + "b.xml": xml(filename="a.png")},
        "a.xml could be of .*a.png, which has its name, or of .*b.png, which its <filename> names",
    ),
    "none": ({J + "b.png": None, A + "a.xml": xml()}, "a.xml: there is no image of that name in"),
    "none named": (
        {J + "b.png": None, A + "a.xml": xml(filename="c.png")},
        "a.xml: there is no image .*, nor 'c.png', which its <filename> names",
    ),
    "photo (1)": (
        {J + "photo.png": None, A + "photo (1).xml": xml()},
        r"photo \(1\).xml: there is no image of that name",
    ),
    "no image": ({J + "a.png": "text", A + "a.xml": xml()}, "a.png cannot be read: it is no image"),
    "no XML": ({J + "a.png": None, A + "a.txt": ""}, "split 'all' has no annotation file"),
    "broken XML": ({J + "a.png": None, A + "a.xml": "<annotation>"}, "a.xml is not well-formed XM"),
    "lying": (
        {J + "a.png": encoded("png", orientation=6), A + "a.xml": xml(size=SIZE)},
        "a.xml: its boxes are of .*a.png as it lies, 12 x 8, but .* turn it to 8 x 12",
    ),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_images_that_cannot_be_told(tmp_path, kind):
    files, message = BAD_IMAGES[kind]
    root = write_all(tmp_path / "voc", files)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare_voc.prepare(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = prepare_voc.check(root)
    assert re.search(message, report.errors[0])


# Boxes, those that are left, and the warning.
BOXES = {
    "fine": ([BOX, (1, 1, 12, 8), (0, 0, 12, 8)], 3, ""),
    "bad": (
        [BOX, (5, 5, 5, 7), (9, 7, 2, 2), (20, 1, 30, 8), (-9, 1, -2, 8)],
        1,
        r"boxes are dropped, .* .4: .*a.xml: .5, 5, 5, 7. of 'cat'.*, \.\.\.\)",
    ),
    "cut": ([(-5, 1, 9, 7), (2, 2, 13, 7)], 2, r"boxes are cut .* .1: .*a.xml: .-5, 1, 9, 7. of"),
    "decimals": ([(1.5, 1.5, 9.25, 7)], 1, ""),
}


@pytest.mark.parametrize("kind", BOXES)
def test_boxes_are_counted_and_named(tmp_path, caplog, kind):
    boxes, left, warning = BOXES[kind]
    files = {J + "a.png": None, A + "a.xml": xml(boxes=boxes)}
    result = prepare_voc.prepare(write_all(tmp_path / "voc", files), tmp_path / "out")
    assert result["splits"]["all"]["boxes"] == left
    assert len(caplog.records) == bool(warning) and re.search(warning, caplog.text)


def test_a_bad_box_in_two_lists_is_counted_once(tmp_path, caplog):
    root = voc(tmp_path / "voc", ["a"], train="a\n", trainval="a\n")
    (root / "Annotations/a.xml").write_text(xml(boxes=[BOX, (5, 5, 5, 7)]))
    prepare_voc.prepare(root, tmp_path / "out")
    assert "outside their image (1: " in caplog.text


BAD_BOXES = {
    "nan": ([("nan", 1, 5, 5)], "object 0 .'cat'. needs numbers in bndbox"),
    "infinite": ([(1, 1, "inf", 5)], "object 0 .'cat'. needs numbers in bndbox"),
    "text": ([(1, 1, "wide", 5)], "object 0 .'cat'. needs numbers in bndbox"),
    "none left": ([(5, 5, 5, 7)], r"classes have empty, .* boxes only \(1: cat\)"),
    "parts of the image": ([(0.1, 0.1, 0.5, 0.9)], "all boxes are within one pixel"),
    "none": ([], "no XML file has an object"),
}


@pytest.mark.parametrize("kind", BAD_BOXES)
def test_bad_boxes(tmp_path, kind):
    boxes, message = BAD_BOXES[kind]
    files = {J + "a.png": None, A + "a.xml": xml(boxes=boxes)}
    with pytest.raises(ValueError, match=message):
        prepare_voc.prepare(write_all(tmp_path / "voc", files), tmp_path / "out")


def test_a_class_of_bad_boxes_only_is_an_error(tmp_path):
    content = "<annotation>" + OBJECT.format("cat", *BOX) + OBJECT.format("dog", 5, 5, 5, 7)
    files = {J + "a.png": None, A + "a.xml": content + "</annotation>"}
    with pytest.raises(ValueError, match=r"boxes only \(1: dog\)"):
        prepare_voc.prepare(write_all(tmp_path / "voc", files), tmp_path / "out")


@pytest.mark.parametrize(
    "size, told", [(SIZE, False), ((0, 0), False), ((24, 16), True), (SIZE[::-1], True)]
)
def test_another_size_in_the_xml_is_told(tmp_path, caplog, size, told):
    files = {J + "a.png": None, A + "a.xml": xml(size=size)}
    prepare_voc.prepare(write_all(tmp_path / "voc", files), tmp_path / "out")
    assert ("another size than their image has" in caplog.text) == told


def test_classes_alike_are_told(tmp_path, caplog):
    files = {J + "a.png": None, A + "a.xml": xml("cat", "Cat")}
    prepare_voc.prepare(write_all(tmp_path / "voc", files), tmp_path / "out")
    assert "classes differ in capitals or spaces only (1: Cat and cat)" in caplog.text


def roboflow(root):
    return write_all(
        root,
        {
            "train/a.png": None,
            "train/a.xml": xml("apple", "pear", filename="a.png"),
            "valid/a.png": None,
            "valid/a.xml": xml("apple", "plum"),
            "test/b_jpg.rf.7.png": None,
            "test/b_jpg.rf.7.xml": xml("plum"),
            "README.roboflow.txt": "",
        },
    )


def test_images_and_xml_side_by_side(tmp_path):
    root = roboflow(tmp_path / "rf") / "train"
    for output, folders in (("x", {}), ("y", {"annotations": ".", "images": "."})):
        result = prepare_voc.prepare(root, tmp_path / output, **folders)
        assert result["splits"] == {"all": {"images": 1, "boxes": 2}}
        assert names_in(tmp_path / output, "all") == ["a.png"]


def test_three_folders_get_the_same_classes(tmp_path):
    root, output = roboflow(tmp_path / "rf"), tmp_path / "out"
    result = prepare_voc.prepare(root, output)
    assert result["splits"].keys() == {"train", "valid", "test"}
    assert names_in(output, "train") == ["train/a.png"]
    assert names_in(output, "valid") == ["valid/a.png"]
    for split in result["splits"]:
        assert classes_in(output, split) == ["apple", "pear", "plum"]
    prepare_voc.prepare(root, output, splits=["valid"])  # again, with the classes that are there
    assert classes_in(output, "valid") == ["apple", "pear", "plum"]
    assert names_in(output, "valid") == ["valid/a.png"]
    with pytest.raises(FileNotFoundError, match="dev does not exist; there are test, train, valid"):
        prepare_voc.prepare(root, output, splits=["dev"])


def test_folders_of_splits_of_other_forms(tmp_path, caplog):
    voc(tmp_path / "set/train", ["a"])
    write_all(tmp_path / "set", {"val/deep/b.png": None, "val/deep/b.xml": xml()})
    write_all(tmp_path / "set", {"test/c.png": None})
    result = prepare_voc.prepare(tmp_path / "set", tmp_path / "out")
    assert result["splits"].keys() == {"train", "val"}
    assert names_in(tmp_path / "out", "train") == ["train/JPEGImages/a.png"]
    assert names_in(tmp_path / "out", "val") == ["val/deep/b.png"]
    assert "set/test has no XML files and is left out" in caplog.text


@pytest.mark.parametrize(
    "files", [{}, {"x/a.png": None}, {"2007/a.png": None, "2007/a.xml": xml()}]
)
def test_folders_of_nothing_known(tmp_path, files):
    (tmp_path / "set").mkdir()
    write_all(tmp_path / "set", files)
    with pytest.raises(FileNotFoundError, match="set is no VOC-style folder: expected Annotations"):
        prepare_voc.prepare(tmp_path / "set", tmp_path / "out")


def test_splits_one_by_one_keep_the_classes(tmp_path):
    root = voc(tmp_path / "voc", ["a", "b", "c"], train="a\n", val="b\n", test="c\n")
    (root / "Annotations/a.xml").write_text(xml("cat", "dog"))
    (root / "Annotations/b.xml").write_text(xml("dog"))
    (root / "Annotations/c.xml").write_text(xml("bird"))
    output = tmp_path / "out"
    prepare_voc.prepare(root, output, splits=["train"])
    prepare_voc.prepare(root, output, splits=["val"])
    assert classes_in(output, "val") == ["cat", "dog"]
    for options in ({"splits": ["test"]}, {"splits": ["val"], "classes": ["dog", "cat"]}):
        with pytest.raises(
            ValueError, match="train.json has the classes cat, dog, and .* one comm"
        ):
            prepare_voc.prepare(root, output, **options)
    prepare_voc.prepare(root, output, splits=["val"], classes=["cat", "dog"])
    prepare_voc.prepare(root, output)  # all of them: no old ones are left to agree with
    assert classes_in(output, "train") == ["bird", "cat", "dog"]


def test_a_second_root_does_not_take_the_first_ones_images(tmp_path):
    roots = [voc(tmp_path / name, [name], **{f"train{name}": f"{name}\n"}) for name in "AB"]
    prepare_voc.prepare(roots[0], tmp_path / "out")
    before = (tmp_path / "out/trainA.json").read_text()
    with pytest.raises(
        FileExistsError, match="is a link to .*A/JPEGImages, .* not to .*B/JPEGImag"
    ):
        prepare_voc.prepare(roots[1], tmp_path / "out")
    assert (tmp_path / "out/trainA.json").read_text() == before
    assert names_in(tmp_path / "out", "trainA") == ["A.png"]
    assert not (tmp_path / "out/trainB.json").exists()
    roots[0].rename(tmp_path / "C")  # one that has moved
    prepare_voc.prepare(tmp_path / "C", tmp_path / "out")
    assert names_in(tmp_path / "out", "trainA") == ["A.png"]


def test_the_command_prints_one_message(tmp_path, monkeypatch, capsys):
    root = roboflow(tmp_path / "rf")
    args = ["prepare_voc.py", "--name", "rf", "--output", str(tmp_path / "out"), "--root"]
    monkeypatch.setattr(sys, "argv", [*args, str(root)])
    prepare_voc.main()
    assert "# classes: apple, pear, plum" in capsys.readouterr().out
    Image.new("RGB", (3, 3)).save(root / "train/a.bmp")
    (root / "train/a.xml").write_text(xml())
    with pytest.raises(SystemExit) as stop:
        prepare_voc.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("prepare_voc.py: ")
    assert error.count("\n") == 2 and "Traceback" not in error
