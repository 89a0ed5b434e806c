# Copyright (c) The mokd_det authors.
"""tools/check_data.py, in this process."""

import json
import sys

import pytest

from .conftest import ROOT
from .data.test_coco import GOOD, changed, photos  # noqa: F401  (a fixture)

sys.path.insert(0, str(ROOT / "tools"))
import check_data

NAN = changed(("annotations", 0, "bbox"), [float("nan"), 5, 8, 6])
NO_AREA = changed(("annotations", 0, "area"), None)


@pytest.fixture
def check(tmp_path, capsys):
    """Call the tool with a JSON file and others of its arguments; its exit code and its output."""

    def run(data, *args):
        (tmp_path / "a.json").write_text(json.dumps(data))
        code = check_data.check(
            check_data.argument_parser().parse_args([str(tmp_path / "a.json"), *args])
        )
        return code, capsys.readouterr().out

    return run


def test_a_good_file(check, photos):  # noqa: F811
    code, output = check(GOOD, photos, "--images", "--masks", "polygon")
    assert code == 0
    assert "0 kinds of errors, 0 kinds of warnings; {'images': 2, 'annotations': 4}" in output


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
        assert check_data.check(check_data.argument_parser().parse_args([path])) == expected
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_data.check(check_data.argument_parser().parse_args([str(tmp_path / "no")]))


@pytest.mark.parametrize(
    "args", [[], ["a.json", "--config-file", "b.yaml"], ["setup.cfg", "--write", "x"]]
)
def test_wrong_arguments(args):
    with pytest.raises(ValueError, match="Give either a path|--write is for"):
        check_data.check(check_data.argument_parser().parse_args(args))


def test_sets_of_a_config(check, photos, tmp_path, capsys):  # noqa: F811
    (tmp_path / "a.json").write_text(json.dumps(NO_AREA))
    config = tmp_path / "config.yaml"
    sets = f"[['checked_by_the_tool', '{tmp_path}/a.json', '{photos}']]"
    config.write_text(
        f"MODEL: {{META_ARCHITECTURE: RetinaNet, RETINANET: {{NUM_CLASSES: 2}}}}\n"
        f"DATASETS: {{COCO: {sets}, TRAIN: ['checked_by_the_tool'], TEST: []}}\n"
        f"OUTPUT_DIR: {tmp_path}/out\n"
    )

    def check_config(*opts):
        arguments = ["--config-file", str(config), *opts]
        code = check_data.check(check_data.argument_parser().parse_args(arguments))
        return code, capsys.readouterr().out

    code, output = check_config()
    assert code == 0 and "warning: DATASETS.TRAIN: 'checked_by_the_tool'" in output
    code, output = check_config("--opts", "MODEL.RETINANET.NUM_CLASSES", "80")
    assert code == 1 and "error: MODEL.RETINANET.NUM_CLASSES is 80" in output
