# Copyright (c) The mokd_det authors.
"""
The table of what every option may be, Detectron2's and ours. An option that is not in it keeps the
type of its default. Options of rules are checked by the rules (balancing/rules), names in our
registries by those, options of several by combinations.py.
"""

from typing import Any

import detectron2.solver.build
import torch
import torchvision
from detectron2.layers import get_norm
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.modeling.proposal_generator import RPN_HEAD_REGISTRY
from detectron2.solver.build import GradientClipType
from PIL import Image
from torchvision.models import list_models

from ..config.bounds import TEXT, Bound, exactly, increasing, integer, interval, like, number
from ..config.bounds import one_of
from ..config.bounds import rows
from ..data import BROKEN_IMAGES, SAMPLERS, UNITS, classification
from ..modeling import CLASSIFIERS, TIMM_PREFIX
from ..objectives import CLASS_LOSSES, LEVEL_WEIGHTS, SOURCES, TEACHER_SIDES
from ..objectives import UNITS as FOREGROUND_UNITS
from ..tasks import RECIPES_FOR
from ..teachers import PRECISIONS as TEACHER_PRECISIONS
from .finite import ON_NON_FINITE
from .optimizer import OPTIMIZERS
from .step import PRECISIONS
from .tracking import WRITERS

# Upstream's main has a third one.
SCHEDULERS = ["WarmupMultiStepLR", "WarmupCosineLR"]
if hasattr(detectron2.solver.build, "StepWithFixedGammaParamScheduler"):
    SCHEDULERS.append("WarmupStepWithFixedGammaLR")
NAMES = rows(TEXT)
SOME_NAMES = rows(TEXT, least=1)
SHARE = number(0, 1)
BELOW_ONE = number(0, 1, below=True)
POSITIVE = number(0, above=True)
FACTOR = number(0)
COUNT = integer(1)
NULL = exactly(None)
PIXELS = rows(number(), least=1)
LOSS_TYPE = one_of(("smooth_l1", "giou", "diou", "ciou"))
POOLER = one_of(("ROIAlign", "ROIAlignV2", "ROIAlignRotated", "ROIPool"))
IOUS = increasing(SHARE)
BOX_WEIGHTS = rows(POSITIVE, least=4)


def _has_norm(name: Any) -> bool:
    try:
        return isinstance(name, str) and (not name or get_norm(name, 32) is not None)
    except KeyError:
        return False


def _is_device(name: Any) -> bool:
    try:
        return isinstance(name, str) and bool(torch.device(name))
    except RuntimeError:
        return False


def _registered(registry: Any, *others: str) -> Bound:
    what = f"a name that is registered in {registry._name}; import the module that registers yours"
    return one_of(lambda: [*others, *(name for name, _ in registry)], what)


def _torchvision_names() -> list[str]:
    return list_models(module=torchvision.models)


def _is_classifier(name: Any) -> bool:
    return isinstance(name, str) and (name in CLASSIFIERS or name.startswith(TIMM_PREFIX))


NORM = Bound(_has_norm, "'' or a norm of Detectron2, such as 'BN', 'SyncBN', 'FrozenBN' or 'GN'")
# Pillow converts to any mode of its own.
FORMATS = ("RGB", "BGR", "YUV-BT.601", *Image.MODES)
SIZES = rows(POSITIVE | rows(POSITIVE, least=1), least=1)

BOUNDS: dict[str, Bound] = {
    "SEED": integer(-1, 2**31 - 1),
    "VIS_PERIOD": integer(0),
    "OUTPUT_DIR": Bound(
        lambda value: TEXT.holds(value) and bool(value),
        "a folder, without line ends and control characters",
    ),
    # ---- training ----
    "SOLVER.MAX_ITER": COUNT,
    "SOLVER.IMS_PER_BATCH": COUNT,
    "SOLVER.REFERENCE_WORLD_SIZE": integer(0),
    "SOLVER.MICRO_BATCHES": COUNT,
    "SOLVER.CHECKPOINT_PERIOD": COUNT,
    "SOLVER.UNIT": one_of(UNITS),
    "SOLVER.OPTIMIZER": one_of(OPTIMIZERS),
    "SOLVER.BASE_LR": POSITIVE,
    "SOLVER.BASE_LR_END": FACTOR,
    "SOLVER.BIAS_LR_FACTOR": POSITIVE,
    "SOLVER.MOMENTUM": BELOW_ONE,
    "SOLVER.BETAS": rows(BELOW_ONE, 2),
    "SOLVER.WEIGHT_DECAY": FACTOR,
    "SOLVER.WEIGHT_DECAY_NORM": FACTOR | NULL,
    "SOLVER.WEIGHT_DECAY_BIAS": FACTOR | NULL,
    "SOLVER.LR_SCHEDULER_NAME": one_of(SCHEDULERS),
    "SOLVER.STEPS": increasing(COUNT),
    "SOLVER.GAMMA": POSITIVE,
    "SOLVER.WARMUP_ITERS": integer(0),
    "SOLVER.WARMUP_FACTOR": SHARE,
    "SOLVER.WARMUP_METHOD": one_of(("linear", "constant")),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of([kind.value for kind in GradientClipType]),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": POSITIVE | exactly(float("inf")),
    "SOLVER.AMP.PRECISION": one_of(PRECISIONS),
    "SOLVER.EMA_DECAY": BELOW_ONE,
    "SOLVER.KEEP_CHECKPOINTS": integer(0),
    "SOLVER.NON_FINITE_GRADIENTS": one_of(ON_NON_FINITE),
    "SOLVER.MAX_SKIPPED_STEPS": COUNT,
    "LOGGING.WRITERS": rows(one_of(WRITERS)),
    # ---- data ----
    "DATASETS.TRAIN": NAMES,
    "DATASETS.TEST": NAMES,
    "DATASETS.PROPOSAL_FILES_TRAIN": NAMES,
    "DATASETS.PROPOSAL_FILES_TEST": NAMES,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": COUNT,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": COUNT,
    "DATASETS.BROKEN_IMAGES": one_of(BROKEN_IMAGES),
    "DATALOADER.NUM_WORKERS": integer(0),
    "DATALOADER.SAMPLER_TRAIN": one_of(SAMPLERS),
    "DATALOADER.REPEAT_THRESHOLD": FACTOR,
    "DATALOADER.RANDOM_SUBSET_RATIO": number(0, 1, above=True),
    "DATALOADER.REPEATED_AUGMENTATION": COUNT,
    "INPUT.FORMAT": one_of(FORMATS),
    "INPUT.MASK_FORMAT": one_of(("polygon", "bitmask")),
    "INPUT.RANDOM_FLIP": one_of(("none", "horizontal", "vertical")),
    "INPUT.MIN_SIZE_TRAIN": rows(COUNT, least=1),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of(("choice", "range")),
    "INPUT.MAX_SIZE_TRAIN": COUNT,
    "INPUT.MIN_SIZE_TEST": integer(0),
    "INPUT.MAX_SIZE_TEST": COUNT,
    "INPUT.CROP.TYPE": one_of(("relative_range", "relative", "absolute", "absolute_range")),
    "INPUT.CROP.SIZE": rows(POSITIVE, 2),
    "INPUT.COLOR_JITTER": BELOW_ONE,
    "INPUT.LSJ.SIZE": COUNT,
    "INPUT.LSJ.SCALE": interval(POSITIVE, "0 < low <= high"),
    "INPUT.CLASSIFICATION.SIZE_TRAIN": COUNT,
    "INPUT.CLASSIFICATION.SIZE_TEST": COUNT,
    "INPUT.CLASSIFICATION.RESIZE_TEST": COUNT,
    "INPUT.CLASSIFICATION.INTERPOLATION": one_of(classification.INTERPOLATIONS),
    "INPUT.CLASSIFICATION.CROP": one_of(classification.CROPS),
    "INPUT.CLASSIFICATION.SCALE": interval(number(0, 1, above=True), "0 < low <= high <= 1"),
    "INPUT.CLASSIFICATION.RATIO": interval(POSITIVE, "0 < low <= high"),
    "INPUT.CLASSIFICATION.PADDING": integer(0),
    "INPUT.CLASSIFICATION.AUTO_AUGMENT": one_of(classification.AUTO_AUGMENTS),
    "INPUT.CLASSIFICATION.MAGNITUDE": integer(0, 30),
    "INPUT.CLASSIFICATION.ERASING": SHARE,
    "INPUT.CLASSIFICATION.MIXUP": FACTOR,
    "INPUT.CLASSIFICATION.CUTMIX": FACTOR,
    # ---- evaluation ----
    "TEST.EVAL_PERIOD": integer(0),
    "TEST.DETECTIONS_PER_IMAGE": COUNT | exactly(-1),
    "TEST.BATCH_SIZE": COUNT,
    "TEST.BEST_METRIC": TEXT,
    "TEST.PATIENCE": integer(0),
    "TEST.AUG.MIN_SIZES": rows(COUNT, least=1),
    "TEST.AUG.MAX_SIZE": COUNT,
    "TEST.PRECISE_BN.NUM_ITER": COUNT,
    "TEST.KEYPOINT_OKS_SIGMAS": rows(POSITIVE),
    # ---- models ----
    "MODEL.DEVICE": Bound(_is_device, "a device of torch, such as 'cpu', 'cuda' or 'cuda:1'"),
    "MODEL.META_ARCHITECTURE": _registered(META_ARCH_REGISTRY),
    "MODEL.PIXEL_MEAN": PIXELS,
    "MODEL.PIXEL_STD": rows(POSITIVE, least=1),
    "MODEL.BACKBONE.NAME": _registered(BACKBONE_REGISTRY),
    "MODEL.BACKBONE.FREEZE_AT": integer(0),
    "MODEL.TORCHVISION.NAME": one_of(_torchvision_names, "a classification model of torchvision"),
    "MODEL.TORCHVISION_DETECTOR.NUM_CLASSES": COUNT,
    "MODEL.TORCHVISION.NORM": one_of(("BN", "FrozenBN")),
    "MODEL.TORCHVISION.OUT_FEATURES": NAMES,
    "MODEL.TORCHVISION.NODES": NAMES,
    "MODEL.LAZY_CONFIG.OVERRIDES": NAMES,
    "MODEL.CLASSIFIER.NAME": one_of(_torchvision_names, "a classification model of torchvision")
    | Bound(_is_classifier, "'timm.X' or a name in CLASSIFIERS"),
    "MODEL.CLASSIFIER.NUM_CLASSES": COUNT,
    "MODEL.CLASSIFIER.LABEL_SMOOTHING": BELOW_ONE,
    "MODEL.RESNETS.OUT_FEATURES": SOME_NAMES,
    "MODEL.RESNETS.NORM": NORM,
    "MODEL.RESNETS.NUM_GROUPS": COUNT,
    "MODEL.RESNETS.WIDTH_PER_GROUP": COUNT,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": COUNT,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": COUNT,
    "MODEL.RESNETS.RES5_DILATION": integer(1, 2),
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": COUNT,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": rows(exactly(True) | exactly(False), 4),
    "MODEL.FPN.IN_FEATURES": NAMES,
    "MODEL.FPN.OUT_CHANNELS": COUNT,
    "MODEL.FPN.NORM": NORM,
    "MODEL.FPN.FUSE_TYPE": one_of(("sum", "avg")),
    "MODEL.ANCHOR_GENERATOR.NAME": _registered(ANCHOR_GENERATOR_REGISTRY),
    "MODEL.ANCHOR_GENERATOR.SIZES": SIZES,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": SIZES,
    "MODEL.ANCHOR_GENERATOR.OFFSET": BELOW_ONE,
    "MODEL.PROPOSAL_GENERATOR.NAME": _registered(
        PROPOSAL_GENERATOR_REGISTRY, "PrecomputedProposals"
    ),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": FACTOR,
    "MODEL.RPN.HEAD_NAME": _registered(RPN_HEAD_REGISTRY),
    "MODEL.RPN.IN_FEATURES": SOME_NAMES,
    "MODEL.RPN.IOU_THRESHOLDS": IOUS,
    "MODEL.RPN.IOU_LABELS": rows(integer(-1, 1)),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": COUNT,
    "MODEL.RPN.POSITIVE_FRACTION": SHARE,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": COUNT,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TEST": COUNT,
    "MODEL.RPN.NMS_THRESH": SHARE,
    "MODEL.RPN.LOSS_WEIGHT": FACTOR,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": FACTOR,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": LOSS_TYPE,
    "MODEL.RPN.BBOX_REG_WEIGHTS": BOX_WEIGHTS,
    "MODEL.RPN.SMOOTH_L1_BETA": FACTOR,
    "MODEL.RPN.CONV_DIMS": rows(COUNT | exactly(-1), least=1),
    "MODEL.ROI_HEADS.NAME": _registered(ROI_HEADS_REGISTRY),
    "MODEL.ROI_HEADS.NUM_CLASSES": COUNT,
    "MODEL.ROI_HEADS.IN_FEATURES": SOME_NAMES,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": IOUS,
    "MODEL.ROI_HEADS.IOU_LABELS": rows(integer(-1, 1)),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": COUNT,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": SHARE,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": SHARE,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": SHARE,
    "MODEL.ROI_BOX_HEAD.NAME": _registered(ROI_BOX_HEAD_REGISTRY, ""),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": LOSS_TYPE,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": FACTOR,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": BOX_WEIGHTS,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": FACTOR,
    "MODEL.ROI_BOX_HEAD.NUM_FC": integer(0),
    "MODEL.ROI_BOX_HEAD.FC_DIM": COUNT,
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": rows(SHARE, least=1),
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": rows(BOX_WEIGHTS, least=1),
    "MODEL.ROI_MASK_HEAD.NAME": _registered(ROI_MASK_HEAD_REGISTRY),
    "MODEL.ROI_KEYPOINT_HEAD.NAME": _registered(ROI_KEYPOINT_HEAD_REGISTRY),
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": rows(COUNT),
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": COUNT,
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": integer(0),
    "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": FACTOR,
    **{
        f"MODEL.{head}.{key}": bound
        for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD")
        for key, bound in {
            "POOLER_RESOLUTION": COUNT,
            "POOLER_SAMPLING_RATIO": integer(0),
            "POOLER_TYPE": POOLER,
        }.items()
    },
    **{
        f"MODEL.{head}.{key}": bound
        for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD")
        for key, bound in {"NUM_CONV": integer(0), "CONV_DIM": COUNT, "NORM": NORM}.items()
    },
    "MODEL.SEM_SEG_HEAD.NAME": _registered(SEM_SEG_HEADS_REGISTRY),
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": SOME_NAMES,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": COUNT,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": COUNT,
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": COUNT,
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": FACTOR,
    "MODEL.SEM_SEG_HEAD.NORM": NORM,
    "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT": FACTOR,
    "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH": SHARE,
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": SHARE,
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": integer(0),
    "MODEL.RETINANET.NUM_CLASSES": COUNT,
    "MODEL.RETINANET.IN_FEATURES": SOME_NAMES,
    "MODEL.RETINANET.NUM_CONVS": integer(0),
    "MODEL.RETINANET.NORM": NORM,
    "MODEL.RETINANET.IOU_THRESHOLDS": IOUS,
    "MODEL.RETINANET.IOU_LABELS": rows(integer(-1, 1)),
    "MODEL.RETINANET.PRIOR_PROB": number(0, 1, above=True, below=True),
    "MODEL.RETINANET.SCORE_THRESH_TEST": SHARE,
    "MODEL.RETINANET.NMS_THRESH_TEST": SHARE,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": COUNT,
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": SHARE | exactly(-1.0),
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": FACTOR,
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": LOSS_TYPE,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": BOX_WEIGHTS,
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": FACTOR,
    # ---- distillation ----
    "MOKD.OBJECTIVES": NAMES | NULL,
    "MOKD.INHERIT": NAMES,
    "MOKD.RECIPE_FOR": one_of(RECIPES_FOR),
    "MOKD.META_ARCHITECTURE": _registered(META_ARCH_REGISTRY),
    "MOKD.TEACHER.IMAGE_SIZE": integer(0),
    "MOKD.TEACHER.PROPOSALS": COUNT,
    "MOKD.TEACHER.PRECISION": one_of(TEACHER_PRECISIONS),
    "MOKD.TEACHER.CHANNELS_LAST": like(True) | NULL,
    "MOKD.TEACHER.TORCHSCRIPT.INPUT_FORMAT": one_of(FORMATS),
    "MOKD.TEACHER.TORCHSCRIPT.PIXEL_MEAN": PIXELS,
    "MOKD.TEACHER.TORCHSCRIPT.PIXEL_STD": rows(POSITIVE, least=1),
    "MOKD.TEACHER.TORCHSCRIPT.SIZE_DIVISIBILITY": integer(0),
    **{
        f"MOKD.{objective}.{key}": bound
        for objective in ("FEATURES", "OUTPUTS", "TEACHER_HEAD", "LOGITS")
        for key, bound in {
            "LOSS_WEIGHT": POSITIVE,
            "TEMPERATURE": POSITIVE,
            "CLASS_WEIGHT": FACTOR,
            "BOX_WEIGHT": FACTOR,
            "RPN_WEIGHT": FACTOR,
            "DKD_BETA": FACTOR,
            "STUDENT": NAMES,
            "TEACHER": NAMES,
        }.items()
    },
    "MOKD.OUTPUTS.LOSS": one_of(CLASS_LOSSES),
    "MOKD.LOGITS.LOSS": one_of(CLASS_LOSSES),
    "MOKD.FEATURES.DIM": integer(0),
    "MOKD.FEATURES.TEACHER_SIDE": one_of(TEACHER_SIDES),
    "MOKD.FEATURES.MASKED": BELOW_ONE,
    "MOKD.FEATURES.LEVEL_WEIGHTS": one_of(LEVEL_WEIGHTS),
    "MOKD.FEATURES.FOREGROUND": one_of(SOURCES),
    "MOKD.FEATURES.FOREGROUND_UNIT": one_of(FOREGROUND_UNITS),
    "MOKD.FEATURES.FOREGROUND_SHARE": SHARE,
    "MOKD.FEATURES.FOREGROUND_SCORE": SHARE,
    "MOKD.BALANCING.INTERVAL": COUNT | NULL,
    "MOKD.BALANCING.LAYERS": NAMES,
    "MOKD.BALANCING.SMOOTHING": BELOW_ONE | NULL,
    "MOKD.BALANCING.SCHEDULE": rows(FACTOR, 2) | rows(rows(FACTOR, 2), least=2) | NULL,
    "MOKD.BALANCING.LOSS_RATIO.CAP": POSITIVE | NULL,
    "MOKD.BALANCING.LOSS_RATIO.AGREEMENT": SHARE | NULL,
    "MOKD.BALANCING.FIXED.WEIGHTS": rows(FACTOR),
    "MOKD.BALANCING.COSINE_GATE.WEIGHTS": rows(FACTOR),
}
