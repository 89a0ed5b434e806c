# Copyright (c) The mokd_det authors.
"""The examples of docs/architecture.md and docs/torchvision_detectors.md, as they stand there."""

import re
import shutil

import pytest
import supported
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import EventStorage

from mokd_det.balancing import RULES
from mokd_det.config import load_config
from mokd_det.data import register_datasets
from mokd_det.engine import build_trainer, validate
from mokd_det.objectives import OBJECTIVES
from mokd_det.tasks import TASKS

from .conftest import ROOT, TREES

TORCHVISION = ROOT / "docs/torchvision_detectors.md"


@pytest.fixture
def examples():
    text = (ROOT / "docs/architecture.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        exec(block, {})
    yield len(blocks)
    RULES.remove("equal_norms")
    OBJECTIVES.remove("attention")
    TASKS.remove("bottom_up_detection")
    del META_ARCH_REGISTRY._obj_map["BottomUpRCNN"]


def test_examples_train(examples, make_cfg):
    assert examples == 3
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


def test_torchvision_examples_hold(tmp_path, monkeypatch):
    """Both configs, on a set with their number of classes, and the checkpoint without mokd_det."""
    page = TORCHVISION.read_text()
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs/Base-TorchvisionDetector.yaml", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    files = re.findall(r"`(configs/my_tv_\w+\.yaml)`:\n\n```yaml\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in files] == [
        "configs/my_tv_teacher.yaml",
        "configs/my_tv_ssdlite.yaml",
    ]
    for name, text in files:
        sets = rf'"{TREES}/\1.json", "{TREES}/\1"'
        (tmp_path / name).write_text(
            re.sub(r'"/data/my/(\w+)\.json", "/data/my/images"', sets, text)
        )
    for name, _ in files:
        cfg = load_config(name, ["MODEL.DEVICE", "cpu"])
        task = validate(cfg)  # also that the teacher's weights are there
        weights = tmp_path / cfg.OUTPUT_DIR / "model_final.pth"
        weights.parent.mkdir(parents=True)
        weights.touch()
        cfg.MODEL.TORCHVISION_DETECTOR.NUM_CLASSES = 1  # the trees
        register_datasets(cfg)
        task.check_data(cfg)
    student = task.build_student(task.untrained_config(load_config(name, ["MODEL.DEVICE", "cpu"])))
    torch.save({"model": student.state_dict()}, weights)
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found = {}
    exec(block, found)
    state = found["model"].state_dict()
    assert all(torch.equal(value, state[key]) for key, value in student.state_dict().items())
