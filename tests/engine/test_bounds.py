# Copyright (c) The mokd_det authors.
"""Wrong values of options, each with the option's name in one message before a model is built."""

import re

import pytest

from mokd_det.config import get_cfg, load_config, merge_overrides
from mokd_det.engine import validate
from mokd_det.engine.bounds import BOUNDS

NAN, INF = float("nan"), float("inf")

# (option, value): the message has to begin with the option and to say what is expected.
WRONG = [
    # How long, and how fast.
    ("SOLVER.MAX_ITER", 0),
    ("SOLVER.MAX_ITER", -5),
    ("SOLVER.MAX_ITER", 10.0),
    ("SOLVER.MAX_ITER", "10k"),
    ("SOLVER.MAX_ITER", True),
    ("SOLVER.MAX_ITER", None),
    ("SOLVER.IMS_PER_BATCH", 0),
    ("SOLVER.IMS_PER_BATCH", -2),
    ("SOLVER.IMS_PER_BATCH", 2.5),
    ("SOLVER.MICRO_BATCHES", 0),
    ("SOLVER.MICRO_BATCHES", 5),
    ("SOLVER.REFERENCE_WORLD_SIZE", -1),
    ("SOLVER.REFERENCE_WORLD_SIZE", 7),
    ("SOLVER.CHECKPOINT_PERIOD", 0),
    ("SOLVER.CHECKPOINT_PERIOD", -1),
    ("SOLVER.UNIT", "epochs"),
    ("SOLVER.BASE_LR", 0.0),
    ("SOLVER.BASE_LR", -0.01),
    ("SOLVER.BASE_LR", NAN),
    ("SOLVER.BASE_LR", "0,01"),
    ("SOLVER.BIAS_LR_FACTOR", -1.0),
    ("SOLVER.OPTIMIZER", "SDG"),
    ("SOLVER.MOMENTUM", 1.0),
    ("SOLVER.MOMENTUM", -0.9),
    ("SOLVER.BETAS", [0.9]),
    ("SOLVER.BETAS", [0.9, 1.0]),
    ("SOLVER.WEIGHT_DECAY", -0.0001),
    ("SOLVER.WEIGHT_DECAY_NORM", -1.0),
    ("SOLVER.WEIGHT_DECAY_BIAS", "no"),
    ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosine"),
    ("SOLVER.STEPS", (20, 10)),
    ("SOLVER.STEPS", (10, 10)),
    ("SOLVER.STEPS", (0, 10)),
    ("SOLVER.STEPS", ("10",)),
    ("SOLVER.STEPS", 10),
    ("SOLVER.GAMMA", -1.0),
    ("SOLVER.GAMMA", 0.0),
    ("SOLVER.WARMUP_ITERS", -3),
    ("SOLVER.WARMUP_FACTOR", -0.5),
    ("SOLVER.WARMUP_FACTOR", 2.0),
    ("SOLVER.WARMUP_METHOD", "cosine"),
    ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "values"),
    ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.0),
    ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", -2.0),
    ("SOLVER.CLIP_GRADIENTS.ENABLED", "yes"),
    ("SOLVER.AMP.ENABLED", 1),
    ("SOLVER.AMP.PRECISION", "bf16"),
    ("SOLVER.EMA_DECAY", 1.0),
    ("SOLVER.EMA_DECAY", -0.1),
    ("SOLVER.NESTEROV", None),
    ("SEED", -2),
    ("SEED", 1.5),
    ("SEED", 2**40),
    ("OUTPUT_DIR", ""),
    ("OUTPUT_DIR", 5),
    ("OUTPUT_DIR", "a\nFAKE line"),
    ("MODEL.WEIGHTS", "a\u2028b"),
    ("VIS_PERIOD", -1),
    # Data.
    ("DATASETS.TRAIN", "my_train"),
    ("DATASETS.TRAIN", (5,)),
    ("DATASETS.TRAIN", ("a\x1b[2J",)),
    ("DATASETS.TEST", (None,)),
    ("DATASETS.BROKEN_IMAGES", "ignore"),
    ("DATALOADER.NUM_WORKERS", -1),
    ("DATALOADER.NUM_WORKERS", "all"),
    ("DATALOADER.SAMPLER_TRAIN", "RandomSampler"),
    ("DATALOADER.REPEAT_THRESHOLD", -0.1),
    ("INPUT.FORMAT", "RBG"),
    ("INPUT.MASK_FORMAT", "polygons"),
    ("INPUT.RANDOM_FLIP", "both"),
    ("INPUT.MIN_SIZE_TRAIN", ()),
    ("INPUT.MIN_SIZE_TRAIN", (0,)),
    ("INPUT.MIN_SIZE_TRAIN", (-640,)),
    ("INPUT.MIN_SIZE_TRAIN", 640),
    ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "uniform"),
    ("INPUT.MAX_SIZE_TRAIN", 0),
    ("INPUT.MAX_SIZE_TRAIN", 10),
    ("INPUT.MIN_SIZE_TEST", -1),
    ("INPUT.MAX_SIZE_TEST", 10),
    ("INPUT.CROP.TYPE", "random"),
    ("INPUT.CROP.SIZE", [0.9]),
    ("INPUT.CROP.SIZE", [0.0, 0.9]),
    ("INPUT.CROP.SIZE", [300, 300]),
    ("INPUT.COLOR_JITTER", 1.0),
    ("INPUT.COLOR_JITTER", -0.1),
    ("INPUT.LSJ.SIZE", 0),
    ("INPUT.LSJ.SCALE", [2.0, 0.1]),
    ("INPUT.LSJ.SCALE", [0.5]),
    # Evaluation.
    ("TEST.EVAL_PERIOD", -1),
    ("TEST.DETECTIONS_PER_IMAGE", 0),
    ("TEST.DETECTIONS_PER_IMAGE", -2),
    ("TEST.BATCH_SIZE", 0),
    ("TEST.AUG.MIN_SIZES", ()),
    ("TEST.KEYPOINT_OKS_SIGMAS", [0.0]),
    # Models.
    ("MODEL.DEVICE", "gpu"),
    ("MODEL.DEVICE", "cuda:x"),
    ("MODEL.META_ARCHITECTURE", "GeneralisedRCNN"),
    ("MODEL.PIXEL_STD", [0.0, 1.0, 1.0]),
    ("MODEL.PIXEL_STD", []),
    ("MODEL.PIXEL_STD", [-1.0, 1.0, 1.0]),
    ("MODEL.PIXEL_MEAN", ["a", 1.0, 1.0]),
    ("MODEL.PIXEL_MEAN", [100.0]),
    ("MODEL.BACKBONE.NAME", "build_resnet_fpn"),
    ("MODEL.BACKBONE.FREEZE_AT", -1),
    ("MODEL.RESNETS.DEPTH", 51),
    ("MODEL.RESNETS.RES2_OUT_CHANNELS", 0),
    ("MODEL.RESNETS.NORM", "BatchNorm"),
    ("MODEL.RESNETS.OUT_FEATURES", []),
    ("MODEL.RESNETS.NUM_GROUPS", 0),
    ("MODEL.RESNETS.RES5_DILATION", 3),
    ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False]),
    ("MODEL.FPN.OUT_CHANNELS", 0),
    ("MODEL.FPN.NORM", "GroupNorm"),
    ("MODEL.FPN.FUSE_TYPE", "mean"),
    ("MODEL.ANCHOR_GENERATOR.NAME", "AnchorGenerator"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", []),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[]]),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[-32]]),
    ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.0, 1.0]]),
    ("MODEL.PROPOSAL_GENERATOR.NAME", "RNP"),
    ("MODEL.RPN.HEAD_NAME", "RPNHead"),
    ("MODEL.RPN.IN_FEATURES", []),
    ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 0),
    ("MODEL.RPN.POSITIVE_FRACTION", 1.5),
    ("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 0),
    ("MODEL.RPN.POST_NMS_TOPK_TEST", -1),
    ("MODEL.RPN.NMS_THRESH", 7.0),
    ("MODEL.RPN.IOU_THRESHOLDS", [0.7, 0.3]),
    ("MODEL.RPN.IOU_LABELS", [0, 1]),
    ("MODEL.RPN.LOSS_WEIGHT", -1.0),
    ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "l1"),
    ("MODEL.ROI_HEADS.NAME", "StandardHeads"),
    ("MODEL.ROI_HEADS.NUM_CLASSES", 0),
    ("MODEL.ROI_HEADS.NUM_CLASSES", -1),
    ("MODEL.ROI_HEADS.NUM_CLASSES", 2.0),
    ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 0),
    ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 5.0),
    ("MODEL.ROI_HEADS.NMS_THRESH_TEST", -0.5),
    ("MODEL.ROI_BOX_HEAD.NAME", ""),
    ("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNHead"),
    ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 0),
    ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "RoIAlign"),
    ("MODEL.ROI_BOX_HEAD.NUM_FC", -1),
    ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (10.0, 10.0)),
    ("MODEL.RETINANET.NUM_CLASSES", 0),
    ("MODEL.RETINANET.PRIOR_PROB", 0.0),
    ("MODEL.RETINANET.FOCAL_LOSS_GAMMA", -2.0),
    ("MODEL.RETINANET.TOPK_CANDIDATES_TEST", 0),
    ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 0),
    ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 0),
    ("MODEL.TORCHVISION.NAME", "mobilenet_v22"),
    ("MODEL.TORCHVISION.NORM", "GN"),
    # Distillation.
    ("MOKD.OBJECTIVES", []),
    ("MOKD.OBJECTIVES", "features"),
    ("MOKD.OBJECTIVES", ["feature"]),
    ("MOKD.OBJECTIVES", [1]),
    ("MOKD.INHERIT", [None]),
    ("MOKD.INHERIT", "backbone."),
    ("MOKD.RECIPE_FOR", "two_stage"),
    ("MOKD.META_ARCHITECTURE", "Distillation"),
    ("MOKD.TEACHER.PROPOSALS", 0),
    ("MOKD.TEACHER.PRECISION", "fp8"),
    ("MOKD.TEACHER.OPTS", [5, 6]),
    ("MOKD.TEACHER.OPTS", ["MODEL.DEVICE"]),
    ("MOKD.TEACHER.WEIGHTS", None),
    ("MOKD.FEATURES.LOSS_WEIGHT", 0.0),
    ("MOKD.FEATURES.LOSS_WEIGHT", -1),
    ("MOKD.FEATURES.LOSS", "l2"),
    ("MOKD.FEATURES.PROJECTOR", "linear"),
    ("MOKD.FEATURES.DIM", -1),
    ("MOKD.FEATURES.DIM", 1.5),
    ("MOKD.FEATURES.TEACHER_SIDE", "fixed"),
    ("MOKD.FEATURES.MASKED", 1.0),
    ("MOKD.FEATURES.STUDENT", [3]),
    ("MOKD.FEATURES.STUDENT", "p3"),
    ("MOKD.FEATURES.LEVEL_WEIGHTS", "same"),
    ("MOKD.FEATURES.FOREGROUND", "gt"),
    ("MOKD.FEATURES.FOREGROUND_UNIT", "boxes"),
    ("MOKD.FEATURES.FOREGROUND_SHARE", 1.5),
    ("MOKD.FEATURES.FOREGROUND_SCORE", -0.5),
    ("MOKD.OUTPUTS.LOSS", "kld"),
    ("MOKD.OUTPUTS.TEMPERATURE", 0.0),
    ("MOKD.OUTPUTS.TEMPERATURE", INF),
    ("MOKD.OUTPUTS.DKD_BETA", -1.0),
    ("MOKD.OUTPUTS.CLASS_WEIGHT", -1.0),
    ("MOKD.OUTPUTS.RPN_WEIGHT", "one"),
    ("MOKD.BALANCING.RULE", "los_ratio"),
    ("MOKD.BALANCING.RULE", "torchjd.UPGrd"),
    ("MOKD.BALANCING.RESCALE", "norm"),
    ("MOKD.BALANCING.MEASURE_AT", "feature"),
    ("MOKD.BALANCING.LAYERS", [1]),
    ("MOKD.BALANCING.SMOOTHING", 1.0),
    ("MOKD.BALANCING.SMOOTHING", "0.9x"),
    ("MOKD.BALANCING.INTERVAL", 0),
    ("MOKD.BALANCING.INTERVAL", 1.5),
    ("MOKD.BALANCING.SCHEDULE", [1.0]),
    ("MOKD.BALANCING.SCHEDULE", ["a", "b"]),
    ("MOKD.BALANCING.SCHEDULE", [[0.0, 1.0], [0.5, 1.0]]),
    ("MOKD.BALANCING.LOSS_RATIO.RATIO", 0.0),
    ("MOKD.BALANCING.LOSS_RATIO.RATIO", "4x"),
    ("MOKD.BALANCING.LOSS_RATIO.CAP", -1.0),
    ("MOKD.BALANCING.LOSS_RATIO.AGREEMENT", 2.0),
]

# The same for classifiers.
WRONG_FOR_CLASSIFIERS = [
    ("INPUT.FORMAT", "BGR"),
    ("INPUT.CLASSIFICATION.SIZE_TRAIN", 0),
    ("INPUT.CLASSIFICATION.SIZE_TEST", 0),
    ("INPUT.CLASSIFICATION.RESIZE_TEST", 8),
    ("INPUT.CLASSIFICATION.INTERPOLATION", "nearest"),
    ("INPUT.CLASSIFICATION.CROP", "center"),
    ("INPUT.CLASSIFICATION.SCALE", [0.5, 2.0]),
    ("INPUT.CLASSIFICATION.RATIO", [2.0, 1.0]),
    ("INPUT.CLASSIFICATION.PADDING", -1),
    ("INPUT.CLASSIFICATION.AUTO_AUGMENT", "auto"),
    ("INPUT.CLASSIFICATION.MAGNITUDE", 31),
    ("INPUT.CLASSIFICATION.ERASING", 2.0),
    ("INPUT.CLASSIFICATION.MIXUP", -0.2),
    ("INPUT.CLASSIFICATION.CUTMIX", NAN),
    ("DATALOADER.REPEATED_AUGMENTATION", 0),
    ("MODEL.CLASSIFIER.NAME", "resnet19"),
    ("MODEL.CLASSIFIER.NUM_CLASSES", 0),
    ("MODEL.CLASSIFIER.LABEL_SMOOTHING", 1.0),
    ("MODEL.CLASSIFIER.OPTIONS", "{dropout: (1, 2)}"),
    ("MODEL.CLASSIFIER.OPTIONS", "dropout"),
    ("MOKD.TEACHER.IMAGE_SIZE", -1),
    ("MOKD.LOGITS.TEMPERATURE", -1.0),
    ("MOKD.LOGITS.LOSS", "ce"),
    ("SOLVER.WARMUP_ITERS", 1000),
]

RESNET18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
# Several options: what the message has to hold.
TOGETHER = [
    (["MOKD.BALANCING.RULE", "fixed", "MOKD.BALANCING.FIXED.WEIGHTS", ["a"]], "FIXED.WEIGHTS is"),
    (["MOKD.BALANCING.RULE", "fixed", "MOKD.BALANCING.FIXED.WEIGHTS", [1]], "FIXED.WEIGHTS has 1"),
    (["MOKD.BALANCING.RULE", "torchjd.CAGrad", "MOKD.BALANCING.TORCHJD", "{c: (1}"], "TORCHJD"),
    (["MOKD.BALANCING.RULE", "torchjd.CAGrad", "MOKD.BALANCING.TORCHJD", "{c: x}"], "TORCHJD"),
    (["MOKD.BALANCING.RULE", "torchjd.CAGrad", "MOKD.BALANCING.TORCHJD", "{c: 0.5"], "not valid Y"),
    (["MOKD.BALANCING.RULE", "torchjd.CAGrad", "MOKD.BALANCING.TORCHJD", {1: 2}], "TORCHJD"),
    (["MOKD.BALANCING.RULE", "torchjd.CAGrad", "MOKD.BALANCING.TORCHJD", "{d: 1}"], "TORCHJD"),
    (["MOKD.BALANCING.RULE", "torchjd.CAGrad", "MOKD.BALANCING.TORCHJD.c", 0.5], "TORCHJD"),
    (["SOLVER.NESTEROV", True, "SOLVER.MOMENTUM", 0.0], "SOLVER.NESTEROV is True, which needs"),
    (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], "INPUT.MIN_SIZE_TRAIN is (256,)"),
    (["INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [0.9, 0.9]], "INPUT.CROP.SIZE is"),
    (["INPUT.LSJ.ENABLED", True, "INPUT.CROP.ENABLED", True], "INPUT.LSJ.ENABLED and INPUT.CROP"),
    (["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"], "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is"),
    (["MODEL.RESNETS.DEPTH", 18], "MODEL.RESNETS.RES2_OUT_CHANNELS is 32, but MODEL.RESNETS.DEP"),
    (
        [*RESNET18, "MODEL.RESNETS.NUM_GROUPS", 32],
        "MODEL.RESNETS.DEPTH 18 has neither DEFORM_ON",
    ),
    (["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32]]], "ANCHOR_GENERATOR.SIZES is [[8], [16"),
    (["MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.4, 0.6]], "MODEL.ROI_HEADS.IOU_LABELS is [0, 1] and"),
    (["MOKD.TEACHER.OPTS", ["MODEL.PIXEL_STD", [0.0, 1.0, 1.0]]], "MODEL.PIXEL_STD is [0.0"),
    (["MOKD.TEACHER.OPTS", ["MODEL.RESNETS.DEPTH", "x"]], "MODEL.RESNETS.DEPTH is 'x'"),
    (["MODEL.BACKBONE.COMPILE", "inducter"], "MODEL.BACKBONE.COMPILE is 'inducter'"),
    (["SOLVER.MAX_ITER"], "must be pairs KEY VALUE"),
    (["SOLVER", 5], "SOLVER holds several options"),
    (["SOLVER.MAX_ITERS", 5], "no option SOLVER.MAX_ITERS. Did you mean SOLVER.MAX_ITER"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Two configs with teachers, as strings: reading files takes most of the time."""
    weights = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    weights.touch()
    opts = ["MODEL.DEVICE", "cpu", "MOKD.TEACHER.WEIGHTS", str(weights)]
    return {
        kind: load_config(f"configs/{kind}/student_mokd.yaml", opts)
        for kind in ("Quick-Start", "Digits")
    }


def check(base, opts, kind="Quick-Start"):
    cfg = base[kind].clone()
    merge_overrides(cfg, opts)
    return validate(cfg)


@pytest.mark.bad_input
@pytest.mark.parametrize("option, value", WRONG, ids=lambda x: str(x))
def test_wrong(base, option, value):
    with pytest.raises(ValueError, match=rf"(^|: |\b){re.escape(option)}\b") as refused:
        check(base, [option, value])
    assert re.search(
        "expected|there are|leave it out|exclude|set it|pairs|known are|name what",
        str(refused.value),
    )


@pytest.mark.bad_input
@pytest.mark.parametrize("option, value", WRONG_FOR_CLASSIFIERS, ids=lambda x: str(x))
def test_wrong_for_classifiers(base, option, value):
    with pytest.raises(ValueError, match=re.escape(option)):
        check(base, [option, value], "Digits")


@pytest.mark.bad_input
@pytest.mark.parametrize("opts, message", TOGETHER, ids=lambda x: str(x))
def test_wrong_together(base, opts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(base, opts)


def test_rpn_weight_without_an_rpn():
    file = "configs/Blood-Cells/mokd_mobilenet_retinanet.yaml"
    cfg = load_config(file, ["MOKD.OUTPUTS.RPN_WEIGHT", 2.0, "MOKD.OBJECTIVES", ["outputs"]])
    with pytest.raises(ValueError, match="OUTPUTS.RPN_WEIGHT is 2.0, .* 'RetinaNet' has no RPN"):
        validate(cfg)


@pytest.mark.parametrize(
    "opts",
    [
        ["MOKD.OUTPUTS.LOSS_WEIGHT", 10],  # an integer where a number is wanted
        ["SOLVER.BASE_LR", "1"],
        ["SOLVER.WEIGHT_DECAY_NORM", None],
        ["SOLVER.STEPS", (10, 10**6)],  # beyond MAX_ITER: Detectron2 says that it ignores those
        ["TEST.DETECTIONS_PER_IMAGE", -1],  # no limit
        ["INPUT.MIN_SIZE_TEST", 0],  # no resizing
        ["MODEL.ANCHOR_GENERATOR.SIZES", [[32]]],
        ["MOKD.BALANCING.SCHEDULE", [[0, 0], [0.1, 1], [1, 0.1]]],
        ["MOKD.BALANCING.SMOOTHING", 0],
    ],
    ids=str,
)
def test_right(base, opts):
    check(base, opts)


def test_the_nearest_names_are_said(base):
    with pytest.raises(ValueError, match="did you mean 'build_resnet_fpn_backbone'"):
        check(base, ["MODEL.BACKBONE.NAME", "build_resnet_fpn"])
    with pytest.raises(ValueError, match="did you mean 'WarmupCosineLR'"):
        check(base, ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosine"])


def test_defaults_are_within_bounds_and_the_table_has_no_other_options():
    validate(get_cfg())
    newer = {"SOLVER.BASE_LR_END", "DATALOADER.RANDOM_SUBSET_RATIO"}  # of upstream's Detectron2
    for key in set(BOUNDS) - newer:
        node = get_cfg()
        for part in key.split("."):
            if key.split(".")[0] == "MOKD" and part not in node:
                break  # not every objective has all
            node = node[part]


def test_evaluation_reads_no_options_of_training(base):
    cfg = base["Quick-Start"].clone()
    cfg.SOLVER.MAX_ITER = 0
    cfg.MOKD.TEACHER.WEIGHTS = "gone.pth"
    validate(cfg, is_training=False)
    cfg.MODEL.PIXEL_STD = [0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="MODEL.PIXEL_STD"):
        validate(cfg, is_training=False)
