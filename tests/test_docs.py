# Copyright (c) The mokd_det authors.
"""The examples of docs/architecture.md, as they stand there."""

import re

import pytest
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import EventStorage

from mokd_det.balancing import RULES
from mokd_det.engine import build_trainer, validate
from mokd_det.objectives import OBJECTIVES
from mokd_det.tasks import TASKS

from .conftest import ROOT


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
    cfg = make_cfg("mokd", [*opts, "MOKD.OBJECTIVES", ["features"]])
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
