# Copyright (c) The mokd_det authors.
"""`mokd check-data`, in this process."""

import json

import pytest
from PIL import Image

from mokd_det.commands.check_data import argument_parser, run

from ..conftest import ROOT
from ..data.test_coco import GOOD, changed, photos  # noqa: F401  (a fixture)

NAN = changed(("annotations", 0, "bbox"), [float("nan"), 5, 8, 6])
NO_AREA = changed(("annotations", 0, "area"), None)


@pytest.fixture
def check(tmp_path, capsys):
    """Call the tool with a JSON file and others of its arguments; its exit code and its output."""

    def check_file(data, *args):
        (tmp_path / "a.json").write_text(json.dumps(data))
        code = run(argument_parser().parse_args([str(tmp_path / "a.json"), *args]))
        return code, capsys.readouterr().out

    return check_file


def test_a_good_file(check, photos):  # noqa: F811
    code, output = check(GOOD, photos, "--images", "--masks", "polygon")
    assert code == 0
    assert "no problems; {'images': 2, 'annotations': 4}" in output


def test_errors(check, photos, tmp_path):  # noqa: F811
    report = tmp_path / "report.json"
    code, output = check(NAN, photos, "--write", str(tmp_path / "b.json"), "--report", str(report))
    assert code == 1
    assert output.startswith("error: annotations whose bbox is not finite (1: id 1 in b.png")
    assert json.loads(report.read_text())["errors"][0] in output
    assert not (tmp_path / "b.json").exists()


def test_what_can_be_completed_is_written(check, photos, tmp_path):  # noqa: F811
    code, output = check(NO_AREA, photos, "--write", str(tmp_path / "b.json"))
    assert code == 0
    assert output.startswith("warning: annotations without an area")
    assert json.loads((tmp_path / "b.json").read_text()) == GOOD


def test_class_folders_and_packed_files(capsys, tmp_path):
    digits = str(ROOT / "tests" / "data" / "digits" / "train.npz")
    for path, expected in ((digits, 0), (str(tmp_path), 1)):
        assert run(argument_parser().parse_args([path])) == expected
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run(argument_parser().parse_args([str(tmp_path / "no")]))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Give either a path or"),
        (["a.json", "--config-file", "b.yaml"], "Give either a path or"),
        (["setup.cfg", "--write", "x"], "--write is not read for what is no .json"),
        (["tests", "--masks", "polygon"], "--masks is not read for what is no .json"),
        (["tests", "--keypoints"], "--keypoints is not read for what is no .json"),
        (["tests", "images"], "The folder of images is not read for what is no .json"),
        (["{voc}", "--images"], "--images is not read for a Pascal VOC folder"),
        (["{voc}", "--opts", "SEED", "1"], "--opts is not read for a path"),
        (["--config-file", "b.yaml", "--masks", "polygon"], "--masks is not read for a config"),
        (["--config-file", "b.yaml", "--keypoints"], "--keypoints is not read for a config"),
        (["--config-file", "b.yaml", "--write", "x"], "--write is not read for a config"),
    ],
)
def test_options_that_nobody_reads(args, message, tmp_path):
    (tmp_path / "a.xml").touch()
    args = [arg.format(voc=tmp_path) for arg in args]
    with pytest.raises(ValueError, match=message):
        run(argument_parser().parse_args(args))


def test_sets_of_a_config(check, photos, tmp_path, capsys):  # noqa: F811
    (tmp_path / "a.json").write_text(json.dumps(NO_AREA))
    config = tmp_path / "config.yaml"
    names = "checked_by_the_tool", "checked_again"  # one process checks a set once
    sets = [[name, f"{tmp_path}/a.json", photos] for name in names]
    config.write_text(
        f"MODEL: {{META_ARCHITECTURE: RetinaNet, RETINANET: {{NUM_CLASSES: 2}}}}\n"
        f"DATASETS: {{COCO: {sets}, TRAIN: ['checked_by_the_tool'], TEST: []}}\n"
        f"OUTPUT_DIR: {tmp_path}/out\n"
    )

    def check_config(*opts):
        arguments = ["--config-file", str(config), *opts]
        code = run(argument_parser().parse_args(arguments))
        return code, capsys.readouterr().out

    code, output = check_config()
    assert not (tmp_path / "out").exists() and "where this is corrected" not in output
    assert code == 0 and "warning: DATASETS.TRAIN: 'checked_by_the_tool'" in output
    other = ["MODEL.RETINANET.NUM_CLASSES", "80", "DATASETS.TRAIN", "('checked_again',)"]
    code, output = check_config("--opts", *other)
    assert code == 1 and "error: MODEL.RETINANET.NUM_CLASSES is 80" in output


def test_images_of_a_config_are_decoded(tmp_path, capsys):
    """The size of this one is in its header, and its pixels are cut off."""
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "photos" / name / "1.png")
    whole = (tmp_path / "photos" / "a" / "1.png").read_bytes()
    boxes = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "iscrowd": 0}]
    images = [{"id": 1, "file_name": "1.png", "width": 64, "height": 64}]
    data = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(data))
    detector = [
        *("--config-file", "configs/Quick-Start/student_scratch.yaml", "--opts"),
        *("DATASETS.COCO", f"[['decoded', '{tmp_path}/a.json', '{tmp_path}/photos/a']]"),
        *("DATASETS.TRAIN", "('decoded',)", "DATASETS.TEST", "()"),
    ]
    classifier = [
        *("--config-file", "configs/Digits/student_scratch.yaml", "--opts"),
        *("DATASETS.CLASSIFICATION", f"[['decoded too', '{tmp_path}/photos']]"),
        *("DATASETS.TRAIN", "('decoded too',)", "DATASETS.TEST", "()"),
        *("MODEL.CLASSIFIER.NUM_CLASSES", "2"),
    ]
    for pixels, expected in ((whole, 0), (whole[:-40], 1)):
        (tmp_path / "photos" / "a" / "1.png").write_bytes(pixels)
        for args in (detector, classifier):
            args = argument_parser().parse_args(["--images", *args])
            assert run(args) == expected, capsys.readouterr().out
