# Copyright (c) The mokd_det authors.
"""Checks that need no data and no weights: what nobody reads, and what cannot be."""

import pytest

from mokd_det.config import load_config, merge_overrides
from mokd_det.engine import prepare_datasets, validate

DETECTOR = "configs/Quick-Start/student_scratch.yaml"
CLASSIFIER = "configs/Digits/student_scratch.yaml"
CPU = ["MODEL.DEVICE", "cpu"]


@pytest.fixture
def distilled(tmp_path):
    """From overrides to a config with a teacher, whose weights are there but not read."""
    weights = tmp_path / "teacher.pth"
    weights.touch()

    def make(opts=(), kind="Quick-Start", name="student_mokd"):
        cfg = load_config(f"configs/{kind}/{name}.yaml", CPU)
        cfg.MOKD.TEACHER.WEIGHTS = str(weights)
        merge_overrides(cfg, opts)
        return cfg

    return make


@pytest.mark.parametrize("kind", ["Quick-Start", "Digits"])
def test_what_is_as_it_should_be_passes(distilled, kind):
    assert (
        validate(distilled(kind=kind)).name
        == {
            "Quick-Start": "detection",
            "Digits": "classification",
        }[kind]
    )


@pytest.mark.parametrize(
    "opts, message",
    [
        (
            ["MOKD.BALANCING.FAMO.LR", 1.0],
            "FAMO.LR is 1.0, but it is read by rule 'famo' only, and MOKD.BALANCING.RULE is 'loss",
        ),
        (["MOKD.BALANCING.FIXED.WEIGHTS", [1.0, 2.0, 3.0]], "read by rule 'fixed' only"),
        (["MOKD.BALANCING.MIN_NORM.CLIP", False], "read by rule 'min_norm' only"),
        (["MOKD.BALANCING.TORCHJD", "{c: 0.5}"], "TORCHJD.c is 0.5, .* by rule 'torchjd.X' only"),
        (
            ["MOKD.BALANCING.RULE", "fixed", "MOKD.BALANCING.LOSS_RATIO.CAP", 0.1],
            "LOSS_RATIO.CAP is 0.1, .* read by rule 'loss_ratio' only, .*RULE is 'fixed'",
        ),
        (
            ["MOKD.BALANCING.RULE", "famo", "MOKD.BALANCING.SMOOTHING", 0.9],
            "SMOOTHING is 0.9, but rule 'famo' does not look at gradients",
        ),
        (
            ["MOKD.OBJECTIVES", ["features"], "MOKD.OUTPUTS.TEMPERATURE", 2.0],
            r"TEMPERATURE is 2.0, .* objective 'outputs' only, and MOKD.OBJECTIVES is \['features'",
        ),
        (["MOKD.LOGITS.TEMPERATURE", 2.0], "read by the objective 'logits' only"),
        (["MOKD.TEACHER.IMAGE_SIZE", 96], "IMAGE_SIZE is 96, .* read for classification only"),
        (["INPUT.CLASSIFICATION.MIXUP", 0.2], "MIXUP is 0.2, .* read for classification only"),
        (["MOKD.OBJECTIVES", ["features", "boxes"]], "no objective 'boxes': known are 'features'"),
        (
            ["MOKD.OBJECTIVES", ["logits"]],
            "'logits', which is for classification, .* 'features', 'o",
        ),
        (["MOKD.OBJECTIVES", ["features", "features"]], "expected each name once"),
        (["MOKD.TEACHER.PRECISION", "fp8"], "MOKD.TEACHER.PRECISION is 'fp8'"),
        (["MOKD.TEACHER.PROPOSALS", 0], "MOKD.TEACHER.PROPOSALS is 0: expected an integer >= 1"),
        (["MOKD.FEATURES.LOSS", "l7"], "MOKD.FEATURES.LOSS is 'l7'"),
        (["MOKD.FEATURES.DIM", -1], "MOKD.FEATURES.DIM is -1"),
        (["MOKD.OUTPUTS.TEMPERATURE", 0.0], "OUTPUTS.TEMPERATURE is 0.0: expected a finite num"),
        (["MOKD.BALANCING.MEASURE_AT", "heads"], "MEASURE_AT is 'heads': expected one of"),
        (["MOKD.BALANCING.LAYERS", ["res5"]], "LAYERS is .'res5'., but features have no layers"),
        (["MOKD.BALANCING.RULE", None], "MOKD.BALANCING.RULE is null: .*; leave it out"),
        (["MOKD.OUTPUTS.BOX_WEIGHT", None], "MOKD.OUTPUTS.BOX_WEIGHT is null"),
        (["MODEL.META_ARCHITECTURE", "RCNN"], "'RCNN': expected .* registered in META_ARCH"),
        (["MOKD.BALANCING.RULE", "Torchjd"], "'min_norm' or 'torchjd.X'"),
        (["SOLVER.OPTIMIZER", "Adam"], "SOLVER.OPTIMIZER is 'Adam'"),
        (["SOLVER.UNIT", "step"], "SOLVER.UNIT is 'step'"),
        (["INPUT.COLOR_JITTER", 2.0], "INPUT.COLOR_JITTER is 2.0"),
    ],
)
def test_refused(distilled, opts, message):
    with pytest.raises(ValueError, match=message):
        validate(distilled(opts))


@pytest.mark.parametrize("kind", ["Quick-Start", "Blood-Cells", "Digits"])
def test_every_recipe_can_be_told_to_match_features_only(distilled, kind):
    """As our own messages advise; what to add to the command line is in the message."""
    name = "mokd_mobilenet" if kind == "Blood-Cells" else "student_mokd"
    opts = ["MOKD.OBJECTIVES", ["features"]]
    if kind == "Digits":
        with pytest.raises(ValueError, match=r"set it to 1.0 \(the default\); or add 'logits'"):
            validate(distilled(opts, kind, name))
        opts += ["MOKD.LOGITS.TEMPERATURE", 1.0]
    validate(distilled(opts, kind, name))


@pytest.mark.parametrize(
    "opts, message",
    [
        (["INPUT.COLOR_JITTER", 0.3], "INPUT.COLOR_JITTER is 0.3, .* read for detection only"),
        (["INPUT.LSJ.SIZE", 640], "INPUT.LSJ.SIZE is 640"),
        (["MOKD.FEATURES.FOREGROUND", "teacher"], "FOREGROUND is 'teacher', .* detection only"),
        (["MOKD.TEACHER.PROPOSALS", 8], "PROPOSALS is 8, .* read for detection only"),
        (["MODEL.BACKBONE.COMPILE", "eager"], "MODEL.BACKBONE.COMPILE is 'eager', .* detection"),
        (
            ["MOKD.OUTPUTS.TEMPERATURE", 4.0],
            "set it to 1.0 .*; for classif.* is MOKD.LOGITS.TEMPERATURE",
        ),
        (["MOKD.TEACHER.IMAGE_SIZE", -1], "MOKD.TEACHER.IMAGE_SIZE is -1"),
        (["INPUT.CLASSIFICATION.CROP", "none"], "INPUT.CLASSIFICATION.CROP is 'none'"),
    ],
)
def test_refused_for_classifiers(distilled, opts, message):
    with pytest.raises(ValueError, match=message):
        validate(distilled(opts, "Digits"))


def test_options_of_classifiers_are_refused_without_a_teacher():
    for opts in (
        ["DATALOADER.REPEATED_AUGMENTATION", 3],
        ["MODEL.CLASSIFIER.OPTIONS", {"dropout": 0.2}],
    ):
        with pytest.raises(ValueError, match="read for classification only"):
            validate(load_config(DETECTOR, [*CPU, *opts]))
        merge_overrides(cfg := load_config(CLASSIFIER, CPU), opts)
        validate(cfg)


def test_without_a_teacher_its_options_do_not_matter(distilled):
    """So a baseline is the distilled config with one override."""
    cfg = distilled(["MOKD.ENABLED", False, "MOKD.BALANCING.FAMO.LR", 1.0])
    cfg.MOKD.TEACHER.WEIGHTS = "no.pth"
    validate(cfg)


@pytest.mark.bad_input
@pytest.mark.parametrize("metric", ["segm/AP", "keypoints/AP", "bbox/AP-shrub", "bbox/top1"])
def test_metrics_that_a_detector_does_not_give(make_cfg, metric):
    opts = ["DATASETS.TEST", ("tests_trees_val",), "TEST.EVAL_PERIOD", 1]
    cfg = make_cfg("faster_rcnn", [*opts, "TEST.BEST_METRIC", metric])
    with pytest.raises(ValueError, match="such as 'bbox/AP'"):
        prepare_datasets(cfg, validate(cfg))
