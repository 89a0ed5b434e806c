# Copyright (c) The mokd_det authors.
import pytest
import yaml
from detectron2.config import get_cfg as get_detectron2_cfg

from mokd_det.config import (
    config_path,
    find_config,
    get_cfg,
    load_config,
    split_overrides,
    stock_config,
)
from mokd_det.tasks import task_of

from ..conftest import CONFIGS, ROOT


def write(tmp_path, text, name="config.yaml"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_five_lines_are_enough(tmp_path):
    path = write(
        tmp_path,
        "MODEL:\n  META_ARCHITECTURE: RetinaNet\n"
        "MOKD:\n  ENABLED: True\n  TEACHER:\n    CONFIG_FILE: t.yaml\n    WEIGHTS: t.pth\n",
    )
    cfg = load_config(path)
    assert cfg.MOKD.ENABLED and cfg.MOKD.TEACHER.WEIGHTS == "t.pth"
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet"


@pytest.mark.parametrize(
    "text, message",
    [
        ("MOKD:\n  ENABELD: True\n", "no option MOKD.ENABELD. Did you mean MOKD.ENABLED"),
        (
            "MOKD:\n  TEACHER:\n    WEIGTHS: x\n",
            "no option MOKD.TEACHER.WEIGTHS. Did you mean MOKD.TEACHER.WEIGHTS",
        ),
        ("MOKD:\n  ATTENTION:\n    POWER: 2\n", "no option MOKD.ATTENTION.* .--import"),
        ("MOKDD:\n  ENABLED: True\n", "no option MOKDD"),
        ("MODEL:\n  WEIGTHS: x\n", "no option MODEL.WEIGTHS. Did you mean MODEL.WEIGHTS"),
        ("MODEL: [\n", "is not valid YAML"),
        ("just text\n", "holds no options"),
        ("INPUT: {MIN_SIZE_TRAIN: (640, 672)}\n", r"'\(640' is half a tuple.* write \[1, 2\]"),
        ("DATASETS: {TRAIN: ('a',), TEST: ('b',)}\n", r"is half a tuple.* write \[1, 2\] there"),
        ('DATASETS: {TRAIN: ("a", "b")}\n', r"is not valid YAML(.|\n)* write \[1, 2\] there"),
        ("MODEL:\n  ANCHOR_GENERATOR:\n    SIZES: [(32, 64), (1, 2)]\n", r"'\(32' is half a tuple"),
        ("MODEL: {CLASSIFIER: {OPTIONS: {sizes: (1, 2)}}}\n", r"'\(1' is half a tuple"),
    ],
)
def test_bad_files_are_explained(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        load_config(path)
    assert path in str(error.value)


@pytest.mark.parametrize(
    "text", ["INPUT:\n  MIN_SIZE_TRAIN: (640, 672)\n", "INPUT: {MIN_SIZE_TRAIN: [640, 672]}\n"]
)
def test_tuples_are_read_outside_flow_style(tmp_path, text):
    assert tuple(load_config(write(tmp_path, text)).INPUT.MIN_SIZE_TRAIN) == (640, 672)


def test_misspelt_key_in_a_base_is_found(tmp_path):
    write(tmp_path, "MOKD:\n  BALANCE:\n    RULE: fixed\n", "base.yaml")
    path = write(tmp_path, "_BASE_: base.yaml\nMOKD:\n  ENABLED: True\n")
    with pytest.raises(ValueError, match="no option MOKD.BALANCE. Did you mean MOKD.BALANCING"):
        load_config(path)


def test_bad_overrides_are_explained():
    with pytest.raises(ValueError, match="no option MOKD.ENABLE. Did you mean MOKD.ENABLED"):
        load_config("", ["MOKD.ENABLE", True])
    with pytest.raises(ValueError, match="pairs KEY VALUE"):
        load_config("", ["MOKD.ENABLED"])
    for value in ({"TEMPERATURE": 2.0}, "{TEMPERATURE: 2.0}"):
        with pytest.raises(ValueError, match="MOKD.OUTPUTS holds several options .LOSS"):
            load_config("", ["MOKD.OUTPUTS", value])


def test_an_option_of_many_values_leaves_the_overrides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SEED").touch()
    files, opts = ["a.jpg", "SEED"], ["MODEL.DEVICE", "cpu"]
    assert split_overrides([*files, *opts]) == (files, opts)
    assert split_overrides(("a.jpg",)) == (["a.jpg"], [])


def test_missing_file_names_its_option():
    with pytest.raises(FileNotFoundError, match="--config-file 'no.yaml' does not exist"):
        load_config("no.yaml")


def test_yaml_that_runs_code_is_never_loaded(tmp_path):
    marker = tmp_path / "ran"
    path = write(
        tmp_path,
        f'MODEL:\n  WEIGHTS: !!python/object/apply:os.mkdir ["{marker}"]\n',
    )
    with pytest.raises(ValueError, match="runs Python code, which is never loaded"):
        load_config(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_stock_config_is_read_by_detectron2_alone(name, tmp_path):
    cfg = load_config(CONFIGS[name])
    stock = stock_config(cfg)
    dumped = get_detectron2_cfg()
    if name == "teacher":  # a torchvision backbone needs our builder, and its options
        dumped.MODEL.TORCHVISION = cfg.MODEL.TORCHVISION.clone()
    dumped.merge_from_file(write(tmp_path, stock.dump()))
    assert yaml.safe_load(dumped.dump()) == yaml.safe_load(stock.dump())
    assert "MOKD" in cfg  # the original is untouched


def test_defaults_are_detectron2s_where_detectron2_has_them():
    assert stock_config(get_cfg()) == get_detectron2_cfg()


def test_a_classifiers_schedule_stays_in_its_unit():
    """Its config needs mokd_det in any case; without the unit, epochs would be iterations."""
    cfg = load_config("configs/Digits/student_mokd.yaml")
    assert task_of(cfg).stock_config(cfg).SOLVER.UNIT == cfg.SOLVER.UNIT == "epoch"


@pytest.mark.parametrize(
    "key, message",
    [
        ("MOKD.OUTPUTS.ENABLED", "no option MOKD.OUTPUTS.ENABLED any more: name 'outputs'"),
        ("MOKD.BALANCING.PLACE", "it is MOKD.BALANCING.MEASURE_AT now"),
        ("MOKD.BALANCING.DOMINANCE", "rule 'constant_dominance' is gone"),
        ("MOKD.BALANCING.LOOK_AHEAD.LR", "rule 'look_ahead' is gone"),
    ],
)
def test_options_of_the_version_before_say_what_became_of_them(key, message):
    with pytest.raises(ValueError, match=message):
        load_config("", [key, 1.0])


BAD_FILES = {
    "empty": "",
    "a list": "- SOLVER\n",
    "a number": "5\n",
    "no YAML": "SOLVER: {MAX_ITER: 5\n",
    "a tab": "SOLVER:\n\tMAX_ITER: 5\n",
    "a cycle": "_BASE_: config.yaml\n",
    "no base": "_BASE_: gone.yaml\n",
    "a base that is a number": "_BASE_: 5\n",
    "a group for a value": "SOLVER:\n  MAX_ITER: {A: 5}\n",
    "a value for a group": "SOLVER: 5\n",
    "null for a group": "SOLVER:\n",
    "a list for a group": "MOKD: [1, 2]\n",
    "a number as a key": "SOLVER: {5: 5}\n",
    "a date": "OUTPUT_DIR: 2024-01-01\n",
    "text for a number": "SOLVER:\n  BASE_LR: fast\n",
    "text for a list": "DATASETS:\n  TRAIN: my_set\n",
    "a date in a dict": "MODEL:\n  CLASSIFIER:\n    OPTIONS: {x: 2024-01-01}\n",
    "another version": "VERSION: 3\n",
    "a version that is none": "VERSION: two\n",
    "two documents": "SEED: 1\n---\nSEED: 2\n",
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_name_themselves(tmp_path, name):
    path = write(tmp_path, BAD_FILES[name])
    with pytest.raises(ValueError, match="--config-file '.*config.yaml'"):
        load_config(path)


@pytest.mark.bad_input
def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match="config.yaml.*(UTF-8|YAML)"):
        load_config(str(tmp_path / "config.yaml"))


def test_integers_are_numbers(tmp_path):
    path = write(tmp_path, "SOLVER:\n  BASE_LR: 1\nMOKD:\n  FEATURES: {LOSS_WEIGHT: 10}\n")
    cfg = load_config(path, ["SOLVER.GAMMA", "1", "SOLVER.WEIGHT_DECAY", 0])
    found = cfg.SOLVER.BASE_LR, cfg.MOKD.FEATURES.LOSS_WEIGHT, cfg.SOLVER.GAMMA
    assert found == (1.0, 10.0, 1.0) and all(isinstance(x, float) for x in found)
    with pytest.raises(ValueError, match="override: SOLVER.MAX_ITER is '5.0': expected an integer"):
        load_config("", ["SOLVER.MAX_ITER", "5.0"])


def test_what_lies_beside_a_config_is_found_from_any_folder(tmp_path, monkeypatch):
    """Also beside a base in another folder; what does not is as before: where one stands."""
    (tmp_path / "base").mkdir()
    (tmp_path / "stand").mkdir()
    for name in ("base/a.json", "base/t.pth", "student.pth", "stand/other.yaml", "x.npz"):
        (tmp_path / name).touch()
    (tmp_path / "base/images").mkdir()
    base = "DATASETS: {COCO: [[a.json, a.json, images], [b, datasets://a.json, 'no']]}\n"
    base += "MOKD: {TEACHER: {WEIGHTS: t.pth, CONFIG_FILE: other.yaml}}\n"
    write(tmp_path / "base", base, "base.yaml")
    text = "_BASE_: base/base.yaml\nMODEL: {WEIGHTS: student.pth}\nOUTPUT_DIR: base\n"
    path = write(tmp_path, text + "DATASETS: {CLASSIFICATION: [[x, x.npz]]}\n")
    monkeypatch.chdir(tmp_path / "stand")
    for name in (path, "../config.yaml"):
        cfg = load_config(name)
        assert cfg.MODEL.WEIGHTS == f"{tmp_path}/student.pth" and cfg.OUTPUT_DIR == "base"
        assert cfg.MOKD.TEACHER.WEIGHTS == f"{tmp_path}/base/t.pth"
        assert cfg.MOKD.TEACHER.CONFIG_FILE == "other.yaml"
        assert cfg.DATASETS.CLASSIFICATION == [["x", f"{tmp_path}/x.npz"]]
        assert cfg.DATASETS.COCO == [
            ["a.json", f"{tmp_path}/base/a.json", f"{tmp_path}/base/images"],
            ["b", "datasets://a.json", "no"],
        ]
    monkeypatch.chdir(tmp_path)  # the same file: as it is written
    assert load_config(path).MODEL.WEIGHTS == "student.pth"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Digits/teacher.yaml", "{configs}/Digits/teacher.yaml"),
        ("configs/Digits/teacher.yaml", "{configs}/Digits/teacher.yaml"),
        ("mokd://Digits/teacher.yaml", "{configs}/Digits/teacher.yaml"),
        ("mine.yaml", "mine.yaml"),
        ("no.yaml", "no.yaml"),
        ("https://host/Digits/teacher.yaml", "https://host/Digits/teacher.yaml"),
        ("", ""),
    ],
)
def test_the_file_of_a_config(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "SEED: 3\n", "mine.yaml")
    assert config_path(name) == expected.format(configs=ROOT / "configs")


def test_a_base_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "mokd://COCO-Detection/retinanet_R_18_FPN_1x.yaml"
    path = write(tmp_path, f'_BASE_: "{name}"\nSEED: 3\n')
    expected = load_config(name, ["SEED", 3])
    assert load_config(path) == expected and expected.MODEL.RESNETS.DEPTH == 18
    assert find_config(name, "x")[0].endswith("configs/COCO-Detection/retinanet_R_18_FPN_1x.yaml")
    with pytest.raises(FileNotFoundError, match="x 'mokd://no.yaml' is no config that comes with"):
        find_config("mokd://no.yaml", "x")
    path = write(tmp_path, '_BASE_: "mokd://no.yaml"\n')
    with pytest.raises(ValueError, match="its _BASE_ is missing or does not fit: 'mokd://no.yaml'"):
        load_config(path)
    with pytest.raises(FileNotFoundError, match="--config-file 'mokd://no.yaml' does not exist"):
        load_config("mokd://no.yaml")
