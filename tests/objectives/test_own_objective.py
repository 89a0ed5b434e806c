# Copyright (c) The mokd_det authors.
"""An objective of one's own: one small file, chosen by name in a config."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from mokd_det.config import get_cfg, load_config
from mokd_det.engine import build_trainer, validate
from mokd_det.objectives import OBJECTIVES, Objective

from ..conftest import CONFIGS, DIGIT_OPTS, ROOT, TREE_OPTS
from ..engine.helpers import train, train_and_stop

FILE = Path(__file__).parent / "own_objective.py"
CONFIG = """
_BASE_: "{base}"
MOKD:
  ENABLED: True
  OBJECTIVES: ["features", "attention"]
  ATTENTION: {{STUDENT: ["{level}"], TEACHER: ["{other}"], LOSS_WEIGHT: 2.0}}
  BALANCING: {{RULE: "fixed", INTERVAL: 1, FIXED: {{WEIGHTS: [1.0, 1.0, 0.5]}}}}
"""
FIXED = ["MOKD.BALANCING.RULE", "fixed", "MOKD.BALANCING.FIXED.WEIGHTS", [1.0, 1.0, 0.5]]
FIXED += ["MOKD.BALANCING.INTERVAL", 2]  # the second step measures as well


class HintObjective(Objective):
    """FitNets (Romero et al., ICLR 2015): a regressor from the student's map to the teacher's."""

    options = {"LEVEL": "p3"}

    def __init__(self, level, channels, teacher_channels):
        super().__init__()
        self.level = level
        self.regressor = nn.Conv2d(channels, teacher_channels, 1)

    @classmethod
    def check_config(cls, cfg):
        if cfg.MOKD.HINT.LEVEL == "p2":
            raise ValueError("MOKD.HINT.LEVEL is 'p2'")

    @classmethod
    def from_config(cls, cfg, task, student, teacher):
        name = cfg.MOKD.HINT.LEVEL
        shapes = student.backbone.output_shape(), teacher.feature_shapes()
        return cls(name, *(shape[name].channels for shape in shapes))

    def forward(self, student, teacher):
        ours, theirs = student.features[self.level], teacher.features[self.level]
        return {"loss_hint": (self.regressor(ours) - theirs).square().mean()}


@pytest.fixture(autouse=True)
def registered():
    """As a user's script registers them, until the test ends."""
    spec = importlib.util.spec_from_file_location("own_objective", FILE)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    OBJECTIVES.register("hint")(HintObjective)
    yield
    for name in ("attention", "hint"):
        OBJECTIVES.remove(name)


def test_it_is_one_small_file():
    assert len(FILE.read_text().splitlines()) <= 40


def assert_measured_weighed_and_logged(trainer, name, weight):
    decision, index = trainer.model.boundary.last, trainer.model.names.index(name)
    assert decision.gram[index, index] > 0 and decision.weights[index] == weight
    logged = json.loads(Path(trainer.cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()[-1])
    assert logged[f"loss_{name}"] > 0
    assert logged[f"balance/features/weight_{name}"] == weight
    assert -1 <= logged[f"balance/features/cosine_{name}"] <= 1
    assert logged[f"balance/features/dominance_{name}"] > 0


def test_it_is_chosen_measured_weighed_and_logged_by_name(tmp_path, teacher_weights):
    path = tmp_path / "student.yaml"
    path.write_text(CONFIG.format(base=ROOT / CONFIGS["mokd"], level="p4", other="p4"))
    chosen = TREE_OPTS.index("MOKD.OBJECTIVES")  # the file's
    opts = TREE_OPTS[:chosen] + TREE_OPTS[chosen + 2 :]
    opts += ["MOKD.TEACHER.WEIGHTS", teacher_weights, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", ()]
    cfg = load_config(str(path), [*opts, "OUTPUT_DIR", str(tmp_path / "run")])
    trainer = train(cfg)
    assert trainer.model.names == ["task", "features", "attention"]
    assert [x.student for x in trainer.model.objectives["attention"].levels] == ["p4"]
    assert_measured_weighed_and_logged(trainer, "attention", 0.5)


def test_it_serves_classifiers(tmp_path, digits_teacher_weights):
    path = tmp_path / "student.yaml"
    path.write_text(
        CONFIG.format(
            base=ROOT / "configs/Digits/student_mokd.yaml", level="stage3", other="layer3"
        )
    )
    opts = [*DIGIT_OPTS, "MOKD.TEACHER.WEIGHTS", digits_teacher_weights, "DATASETS.TEST", ()]
    opts += ["MOKD.FEATURES.STUDENT", ["stage3", "stage4"], "SOLVER.MAX_ITER", 2]
    opts += ["MOKD.FEATURES.TEACHER", ["layer3", "layer4"], "MOKD.LOGITS.TEMPERATURE", 1.0]
    trainer = train(load_config(str(path), [*opts, "OUTPUT_DIR", str(tmp_path / "run")]))
    assert trainer.model.objectives["attention"].taps == ["stage3"]
    assert_measured_weighed_and_logged(trainer, "attention", 0.5)


def test_its_options_are_checked_like_all_others(make_cfg):
    with pytest.raises(ValueError, match="no option MOKD.HINT.LEVLE.*Did you mean MOKD.HINT.LEVEL"):
        load_config(CONFIGS["mokd"], ["MOKD.HINT.LEVLE", "p4"])
    with pytest.raises(ValueError, match="MOKD.HINT.LEVEL is 'p4', but it is read by the obj.*add"):
        validate(make_cfg("mokd", ["MOKD.HINT.LEVEL", "p4"]))
    opts = ["MOKD.OBJECTIVES", ["features", "hint"], "MOKD.HINT.LEVEL", "p2"]
    with pytest.raises(ValueError, match="MOKD.HINT.LEVEL is 'p2'"):
        validate(make_cfg("mokd", opts))


HINT = ["MOKD.OBJECTIVES", ["features", "hint"], "TEST.EVAL_PERIOD", 0]


def test_its_own_parameters_train_and_stay_out_of_the_model(make_cfg):
    cfg = make_cfg("mokd", [*HINT, *FIXED, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", ()])
    trainer = build_trainer(cfg)
    weight = trainer.model.objectives["hint"].regressor.weight
    before = weight.clone()
    trainer.resume_or_load(False)
    trainer.train()
    assert_measured_weighed_and_logged(trainer, "hint", 0.5)
    assert weight.grad.any() and not torch.equal(weight, before)
    saved = torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=False)
    assert torch.equal(saved["objectives"]["hint.regressor.weight"], weight)
    assert not any("regressor" in key for key in saved["model"])
    assert saved["model"].keys() == trainer.model.student.state_dict().keys()


def test_a_resumed_run_is_the_uninterrupted_one(make_cfg):
    """Attention without the features, and hints with parameters of their own."""
    opts = ["MOKD.OBJECTIVES", ["attention", "hint"], "MOKD.FEATURES.STUDENT", []]
    opts += ["MOKD.FEATURES.DIM", 0, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", ()]
    whole = train(make_cfg("mokd", [*opts, *FIXED], "whole"))
    cfg = make_cfg("mokd", [*opts, *FIXED], "stopped")
    train_and_stop(cfg, 2)
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 2
    state = resumed.model.state_dict()
    assert any(key.startswith("objectives.hint.") for key in state)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", ["task", "teacher", "Balancing"])
def test_a_name_with_a_meaning_is_refused(name):
    with pytest.raises(KeyError, match=f"cannot be called '{name}'"):
        OBJECTIVES.register(name)(type("Own", (Objective,), {}))
    assert name not in OBJECTIVES


@pytest.mark.parametrize(
    "losses, got",
    [
        ({}, "{}"),
        (torch.ones(2), "Tensor"),
        ({"loss_same": torch.ones(2)}, "{'loss_same': torch.Size"),
        ({"loss_same": 1.0}, "{'loss_same': 1.0}"),
        ({"total": torch.ones(())}, "{'total': torch.Size"),
    ],
)
def test_what_is_no_named_losses_is_refused(make_cfg, losses, got):
    OBJECTIVES.register("same")(type("Same", (Objective,), {"forward": lambda *_: losses}))
    try:
        trainer = build_trainer(make_cfg("mokd", ["MOKD.OBJECTIVES", ["features", "same"]]))
        message = re.escape(f"The objective 'same' returned {got}")
        with EventStorage(), pytest.raises(ValueError, match=message):
            trainer.run_step()
    finally:
        OBJECTIVES.remove("same")


def test_losses_of_one_name_are_refused(make_cfg):
    """The later one would hide the other, in the total and in the logs."""

    class Same(Objective):
        def forward(self, student, teacher):
            return {"loss_features": sum(x.mean() for x in student.features.values())}

    OBJECTIVES.register("same")(Same)
    try:
        cfg = make_cfg("mokd", ["MOKD.OBJECTIVES", ["features", "same"]])
        with EventStorage(), pytest.raises(ValueError, match="loss_features come from several"):
            build_trainer(cfg).run_step()
    finally:
        OBJECTIVES.remove("same")
    assert "SAME" not in get_cfg().MOKD
