# Copyright (c) The mokd_det authors.
"""Published methods as recipes: each is taken in beside a student's config, and trains."""

import pytest

from mokd_det.config import load_config
from mokd_det.engine import DistillationTrainer, validate

from ..conftest import CONFIGS, DIGIT_OPTS, ROOT, TREE_OPTS
from ..modeling.classifiers import digit_batch, gradients
from ..modeling.families import batch_of, step

RECIPES = {
    path.stem: load_config(str(path)).MOKD
    for path in sorted((ROOT / "configs" / "Recipes").glob("*.yaml"))
    if not path.name.startswith("Base-")
}
DETECTORS = [name for name in RECIPES if not name.endswith("imagenet")]
# What tests ask for, but not the objectives.
TREES = TREE_OPTS[: TREE_OPTS.index("MOKD.OBJECTIVES")]


@pytest.fixture
def with_recipe(tmp_path):
    """From (the student's config file, a recipe, overrides) to their config."""

    def make(student, name, opts=()):
        path = tmp_path / "student.yaml"
        bases = [str(ROOT / student), str(ROOT / "configs" / "Recipes" / f"{name}.yaml")]
        path.write_text(f"_BASE_: {bases}\nOUTPUT_DIR: {tmp_path}\n")
        return load_config(str(path), list(opts))

    return make


@pytest.fixture
def detector_cfg(with_recipe, teacher_weights):
    def make(name, family, opts=()):
        student = CONFIGS["retinanet" if family == "one-stage" else "faster_rcnn"]
        cfg = with_recipe(student, name, [*TREES, "MODEL.FPN.OUT_CHANNELS", 128, *opts])
        cfg.MOKD.TEACHER.CONFIG_FILE = CONFIGS["teacher"]
        cfg.MOKD.TEACHER.WEIGHTS = teacher_weights
        return cfg

    return make


@pytest.mark.parametrize("name", DETECTORS)
def test_recipes_of_detectors(detector_cfg, name):
    cfg = detector_cfg(name, RECIPES[name].RECIPE_FOR)
    assert cfg.MOKD.BALANCING.RULE == "fixed" and len(cfg.MOKD.OBJECTIVES) == 1
    validate(cfg)
    losses, decision = step(DistillationTrainer.build_model(cfg), batch_of(cfg))
    (objective,) = cfg.MOKD.OBJECTIVES
    assert all(0 <= loss.item() < float("inf") for loss in losses[objective].values())
    assert decision.weights.tolist() == [1.0, 1.0] and decision.gram[1, 1] > 0


OTHER = {"one-stage": "two-stage", "two-stage": "one-stage"}


@pytest.mark.parametrize("name", [n for n in DETECTORS if RECIPES[n].RECIPE_FOR])
def test_a_recipe_of_the_other_family_is_refused(detector_cfg, name):
    family = RECIPES[name].RECIPE_FOR
    cfg = detector_cfg(name, OTHER[family])
    message = f"MOKD.RECIPE_FOR is '{family}', .* is a {OTHER[family]} detector: use the recipe"
    with pytest.raises(ValueError, match=message):
        DistillationTrainer.build_model(cfg)
    if name.startswith("dkd"):
        return  # for softmaxes only
    cfg.MOKD.RECIPE_FOR = ""
    DistillationTrainer.build_model(cfg)


def test_an_unknown_family(detector_cfg):
    cfg = detector_cfg("cwd", "two-stage", ["MOKD.RECIPE_FOR", "RetinaNet"])
    with pytest.raises(ValueError, match="MOKD.RECIPE_FOR is 'RetinaNet': expected one of"):
        validate(cfg)


@pytest.mark.parametrize("name", [n for n in RECIPES if n not in DETECTORS])
def test_recipes_of_classifiers(with_recipe, digits_teacher_weights, name):
    cfg = with_recipe("configs/Digits/student_scratch.yaml", name, DIGIT_OPTS)
    cfg.MOKD.TEACHER.CONFIG_FILE = "configs/Digits/teacher.yaml"
    cfg.MOKD.TEACHER.WEIGHTS = digits_teacher_weights
    validate(cfg)
    assert gradients(DistillationTrainer.build_model(cfg).train(), batch=digit_batch())


def test_published_weights():
    """Of the papers, as they were printed; FGD's foreground 1e-3 and background 5e-4."""
    features = {name: mokd.FEATURES for name, mokd in RECIPES.items()}
    weights = {name: x.LOSS_WEIGHT for name, x in features.items()}
    assert (weights["pkd_two_stage"], weights["pkd_one_stage"]) == (6, 10)
    assert (weights["mgd_two_stage"], weights["mgd_one_stage"]) == (5e-7, 2e-5)
    masked = [features[f"mgd_{kind}_stage"].MASKED for kind in ("two", "one")]
    assert masked == [0.45, 0.65]
    for name, foreground in (("fgd_one_stage", 1e-3), ("fgd_two_stage", 5e-5)):
        share = features[name].FOREGROUND_SHARE
        assert weights[name] * share == pytest.approx(foreground)
        assert weights[name] * (1 - share) == pytest.approx(foreground / 2)
    betas = RECIPES["dkd_two_stage"].OUTPUTS.DKD_BETA, RECIPES["dkd_imagenet"].LOGITS.DKD_BETA
    assert betas == (0.25, 0.5)
