# Copyright (c) The mokd_det authors.
"""The examples of README.md and docs/, as they stand there."""

import re
import shutil

import numpy as np
import pytest
import supported
import torch
import torchvision
import yaml
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import EventStorage

from mokd_det.balancing import RULES
from mokd_det.config import load_config
from mokd_det.data import register_datasets
from mokd_det.engine import build_trainer, validate
from mokd_det.objectives import OBJECTIVES
from mokd_det.tasks import TASKS

from .conftest import DIGITS, ROOT, TREES
from .test_tools import run_here

TORCHVISION = ROOT / "docs/torchvision_detectors.md"
TUTORIALS = ROOT / "docs/tutorials"
CONFIG = re.compile(
    r"`(configs/my_\w+\.yaml)`[^`]*(?:`\w+`[^`]*)?:\n\n```yaml\n(.*?)```", re.DOTALL
)


def code_of(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture
def examples():
    blocks, names = code_of(TUTORIALS / "extend.md"), {}
    for block in blocks:
        exec(block, names)
    yield len(blocks)
    RULES.remove("equal_norms")
    OBJECTIVES.remove("attention")
    TASKS.remove("bottom_up_detection")
    del META_ARCH_REGISTRY._obj_map["BottomUpRCNN"]


def test_examples_train(examples, make_cfg):
    assert examples == 4
    opts = ["MODEL.META_ARCHITECTURE", "BottomUpRCNN", "INPUT.COLOR_JITTER", 0.1]
    opts += ["MOKD.BALANCING.RULE", "equal_norms", "MOKD.BALANCING.EQUAL_NORMS.POWER", 0.5]
    opts += ["MOKD.FEATURES.STUDENT", ["res4"], "MOKD.FEATURES.TEACHER", ["p4"]]
    cfg = make_cfg("mokd", [*opts, "MOKD.OBJECTIVES", None])
    assert validate(cfg).name == "bottom_up_detection"
    with EventStorage() as storage:
        build_trainer(cfg).run_step()
    weights = {name: value for name, (value, _) in storage.latest().items() if "weight_" in name}
    assert (
        weights["balance/features/weight_task"] == 1 != weights["balance/features/weight_features"]
    )
    cfg = make_cfg(
        "mokd", ["MOKD.OBJECTIVES", ["features", "attention"], "MOKD.ATTENTION.POWER", 3.0]
    )
    with EventStorage() as storage:
        build_trainer(cfg).run_step()
    assert storage.latest()["loss_attention"][0] > 0


def test_heads_that_read_other_features_are_refused(examples, make_cfg):
    opts = ["MODEL.META_ARCHITECTURE", "BottomUpRCNN", "MOKD.OBJECTIVES", ["features", "outputs"]]
    cfg = make_cfg(
        "mokd", [*opts, "MOKD.FEATURES.STUDENT", ["res4"], "MOKD.FEATURES.TEACHER", ["p4"]]
    )
    with pytest.raises(
        ValueError, match=r"heads of the student read \['p3', .* meet at \['res3', "
    ):
        build_trainer(cfg)


@pytest.mark.slow
def test_table_of_torchvisions_detectors_is_what_the_code_says():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    before, written, after = supported.parts_of_page()
    assert written == supported.table(), "run docs/supported.py"
    assert before and after
    assert len(TORCHVISION.read_text().splitlines()) <= 120


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder like a checkout, with the configs that others begin with."""
    (tmp_path / "configs").mkdir()
    for base in (ROOT / "configs").glob("Base-*.yaml"):
        shutil.copy(base, tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def validated(folder, page, *replaced):
    """
    Write the configs of a page, teacher first, with some paths replaced; validate them on their
    data, and return those that were read. The teacher's weights are an empty file.
    """
    files = CONFIG.findall(page.read_text())
    for name, text in files:
        for pattern, other in replaced:
            text = re.sub(pattern, other, text)
        (folder / name).write_text(text)
    cfgs = []
    for name, _ in files:
        cfg = load_config(name, ["MODEL.DEVICE", "cpu"])
        task = validate(cfg)  # also that the teacher's weights are there
        weights = folder / cfg.OUTPUT_DIR / "model_final.pth"
        weights.parent.mkdir(parents=True)
        weights.touch()
        cfgs.append(cfg.clone())
        if cfg.MODEL.META_ARCHITECTURE == "TorchvisionDetector":
            cfg.MODEL.TORCHVISION_DETECTOR.NUM_CLASSES = 1  # the trees
        register_datasets(cfg)
        task.check_data(cfg)
    return cfgs


def save_student(cfg, weights):
    """Write a checkpoint of the student with random weights, and return its state."""
    task = validate(cfg)
    state = task.build_student(task.untrained_config(cfg)).state_dict()
    torch.save({"model": state}, weights)
    return state


def loads_in_its_library(block, name, state):
    """Run a block, and compare the model of that name with the state."""
    found = {}
    exec(block, found)
    loaded = found[name].state_dict()
    return all(torch.equal(value, loaded[key]) for key, value in state.items())


def test_torchvision_examples_hold(folder):
    """Both configs, on a set with their number of classes, and the checkpoint without mokd_det."""
    sets = r'"/data/my/(\w+)\.json", "/data/my/images"', rf'"{TREES}/\1.json", "{TREES}/\1"'
    teacher, student = validated(folder, TORCHVISION, sets)
    assert student.MOKD.TEACHER.CONFIG_FILE == "configs/my_tv_teacher.yaml"
    state = save_student(student, "output/my_tv_ssdlite/model_final.pth")
    assert loads_in_its_library(code_of(TORCHVISION)[0], "model", state)


MOKD = "mokd_det/__main__.py"


@pytest.fixture
def trees_of_the_page(folder, monkeypatch):
    """What the scripts of its first commands make: a few trees, and weights (here random)."""
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    (folder / "datasets/pretrained").mkdir(parents=True)
    shutil.copytree(TREES, folder / "datasets/neon_trees")
    weights = torchvision.models.mobilenet_v2().state_dict()
    torch.save(weights, folder / "datasets/pretrained/mobilenet_v2-b0353104.pth")
    return next((folder / "datasets/neon_trees/val").iterdir())


@pytest.fixture
def digits_as_files(folder, catalogs_restored):
    """The files of the page's script, of the packed digits; returned is a photo."""
    (folder / "datasets/mnist").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copy(DIGITS / f"{split}.npz", folder / "datasets/mnist")
    exec(code_of(TUTORIALS / "classifier.md")[0], {})
    files = list((folder / "datasets/photos/train").glob("*/*.png"))
    assert len(files) == len(np.load(DIGITS / "train.npz")["labels"])
    return next((folder / "datasets/photos/val/7").iterdir())


PAGES = {"detector": "trees_of_the_page", "classifier": "digits_as_files"}


def plain_blocks(page):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in fenced if not language]


def commands_of(page):
    """The words of each command that a page has or prints, but for the scripts that bring data."""
    lines = "".join(plain_blocks(page)).replace("\\\n", "").splitlines()
    commands = [line.split() for line in lines if line.strip().startswith(("mokd ", "python "))]
    return [
        words[1:] if "python" in words else [MOKD, *words[1:]]
        for words in commands
        if "datasets/prepare" not in words[1]
    ]


@pytest.mark.parametrize("name", PAGES)
def test_tutorials_hold(folder, request, name):
    """What `mokd init` says and writes, and the configs."""
    request.getfixturevalue(PAGES[name])
    page = TUTORIALS / f"{name}.md"
    init, *others = commands_of(page)
    said = run_here(*init)
    (shown,) = (block for block in plain_blocks(page) if "Next:" in block)
    assert re.sub(r"\d+", "1", said) == re.sub(r"\d+", "1", shown)
    for words in others:
        if "--config-file" in words:
            assert (folder / words[words.index("--config-file") + 1]).is_file()
    made = folder / init[init.index("--output") + 1]
    example, *_ = map(yaml.safe_load, code_of(page, "yaml"))
    written = (made / "student_mokd.yaml").read_text().replace(f"{folder}/", "")
    assert yaml.safe_load(written) == example
    (made / "runs/teacher").mkdir(parents=True)
    (made / "runs/teacher/model_final.pth").touch()
    for config in ("teacher", "student_scratch", "student_mokd"):
        cfg = load_config(str(made / f"{config}.yaml"))
        register_datasets(cfg)
        validate(cfg).check_data(cfg)
    if name == "classifier":
        (made / "runs/mokd").mkdir()
        state = save_student(cfg, "digits/runs/mokd/model_final.pth")
        assert loads_in_its_library(code_of(page)[1], "network", state)


def test_the_backbone_of_the_detector_tutorial_is_read(folder):
    *_, backbone = code_of(TUTORIALS / "detector.md", "yaml")
    (folder / "backbone.yaml").write_text(backbone)
    assert load_config("backbone.yaml").MODEL.TORCHVISION.NORM == "FrozenBN"


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_tutorials_run(folder, request, name):
    """Every command as it stands, but for two steps."""
    photo = request.getfixturevalue(PAGES[name])
    for words in commands_of(TUTORIALS / f"{name}.md"):
        if words[1] == "train":
            words += ["SOLVER.MAX_ITER", "2"]
        run_here(*(str(photo) if word.endswith(".png") else word for word in words))
    for made in ("report.html", "predictions", "out/model.ts"):
        assert (folder / made).exists()


def test_readme_is_a_page_and_its_configs_are_read(folder):
    readme = ROOT / "README.md"
    assert len(readme.read_text().split()) <= 700
    mokd, *students = map(yaml.safe_load, code_of(readme, "yaml"))
    tables = re.findall(r"(?:^\|.*\n)+", readme.read_text(), re.MULTILINE)
    assert len(students) == 2 and all(table.count("\n") <= 6 for table in tables)
    for student in students:
        (folder / "configs/my_student.yaml").write_text(yaml.dump({**student, **mokd}))
        cfg = load_config("configs/my_student.yaml")
        assert cfg.MOKD.ENABLED and cfg.MOKD.TEACHER.WEIGHTS
