# Copyright (c) The mokd_det authors.
"""Which objectives a config can choose."""

import pytest
import torch
from detectron2.modeling import build_model

from mokd_det import readers
from mokd_det.engine import DistillationTrainer, validate
from mokd_det.objectives import OBJECTIVES, Objective

from ..conftest import OUTPUTS
from ..modeling.families import FCOS, batch_of, saved_teacher, step


@pytest.mark.parametrize(
    "names, message",
    [
        (["features", "boxes"], "there is no objective 'boxes': known are 'features', 'logits'"),
        ([["features"]], "MOKD.OBJECTIVES is .*: expected a list with each entry a str"),
        (["features", "features"], "expected each name once"),
        (["features", "logits"], "has 'logits', which is for classification, .* use one of 'feat"),
    ],
)
def test_names_that_a_detector_cannot_choose(make_cfg, names, message):
    with pytest.raises(ValueError, match=message):
        validate(make_cfg("mokd", ["MOKD.OBJECTIVES", names]))


def test_outputs_are_for_detectors(make_digits_cfg):
    message = "has 'outputs', which is for detection, .* use one of 'features', 'logits'"
    with pytest.raises(ValueError, match=message):
        validate(make_digits_cfg(["MOKD.OBJECTIVES", ["features", "outputs"]]))


def test_none_is_an_error(make_cfg):
    cfg = make_cfg("faster_rcnn", ["MOKD.ENABLED", True, "MOKD.OBJECTIVES", []])
    with pytest.raises(ValueError, match="MOKD.OBJECTIVES is empty: name what is distilled.*known"):
        DistillationTrainer(cfg)


def test_an_unknown_name_is_an_error_also_unvalidated(make_cfg):
    with pytest.raises(ValueError, match="is 'boxes', which is not in OBJECTIVES: .*--import"):
        DistillationTrainer.build_model(make_cfg("mokd", ["MOKD.OBJECTIVES", ["boxes"]]))


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MOKD.OUTPUTS.BOX_WEIGHT", 2.0], "OUTPUTS.BOX_WEIGHT is 2.0, .* add 'outputs' there"),
        (["MOKD.OBJECTIVES", ["outputs"]], "MOKD.FEATURES.STUDENT is .* by the objective 'feat"),
    ],
)
def test_options_of_an_objective_that_is_not_chosen(make_cfg, opts, message):
    with pytest.raises(ValueError, match=message):
        validate(make_cfg("mokd", opts))


def test_outputs_need_a_detector_that_is_read_on_both_sides(make_cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(readers.build, "FCOS", dict)  # a detector that no reader knows
    path = tmp_path / "fcos.py"
    path.write_text(FCOS)
    opts = ["MODEL.META_ARCHITECTURE", "LazyConfigDetector", "MODEL.LAZY_CONFIG.FILE", str(path)]
    cfg = make_cfg("faster_rcnn", [*opts, "MOKD.ENABLED", True, *OUTPUTS])
    message = "heads of the {}, a FCOS, cannot be read, which .outputs. in MOKD.OBJECTIVES"
    with pytest.raises(ValueError, match=message.format("student")):
        DistillationTrainer.build_model(cfg)
    opts = saved_teacher(cfg, build_model(cfg), tmp_path)
    with pytest.raises(ValueError, match=message.format("teacher")):
        DistillationTrainer.build_model(make_cfg("mokd", [*opts, *OUTPUTS]))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf")])
def test_a_loss_weight_that_is_no_positive_number(make_cfg, weight):
    cfg = make_cfg("mokd", ["MOKD.FEATURES.LOSS_WEIGHT", weight])
    with pytest.raises(ValueError, match="FEATURES.LOSS_WEIGHT is .*: expected a finite number >"):
        DistillationTrainer.build_model(cfg)


def test_the_loss_weight_multiplies(make_cfg):
    values = []
    for weight in (1.0, 8.0):
        cfg = make_cfg("mokd", ["MOKD.FEATURES.LOSS_WEIGHT", weight])
        torch.manual_seed(0)
        model = DistillationTrainer.build_model(cfg)
        values.append(step(model, batch_of(cfg))[0]["features"]["loss_features"])
    assert torch.equal(8 * values[0], values[1])


def test_a_name_stands_for_one_objective():
    with pytest.raises(KeyError, match="OBJECTIVES has an object named 'features' already"):
        OBJECTIVES.register("features")(Objective)
