# Copyright (c) The mokd_det authors.
"""Options that each are within their bounds (bounds.py) and do not go together."""

from collections.abc import Callable, Iterable, Sequence

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..config import get_cfg

Rows = Sequence[tuple[Callable[[CfgNode], bool], str]]

USUAL = get_cfg()
DENSE = ("RetinaNet", "FCOS")
RESNET_DEPTHS = (18, 34, 50, 101, 152)
RESNETS = tuple(f"build_{x}_backbone" for x in ("resnet", "resnet_fpn", "retinanet_resnet_fpn"))


def _is_classifier(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE == "Classifier"


def _has_resnet(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKBONE.NAME in RESNETS


def _has_small_resnet(cfg: CfgNode) -> bool:
    return _has_resnet(cfg) and cfg.MODEL.RESNETS.DEPTH < 50


def _has_roi_heads(cfg: CfgNode, *names: str) -> bool:
    is_two_stage = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN")
    return is_two_stage and cfg.MODEL.ROI_HEADS.NAME in names


def _anchor_maps(cfg: CfgNode) -> Sequence[str]:
    """The maps with anchors; empty: the model has none."""
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        return cfg.MODEL.RETINANET.IN_FEATURES
    has_rpn = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN", "ProposalNetwork")
    return cfg.MODEL.RPN.IN_FEATURES if has_rpn else ()


def _anchors_do_not_fit(cfg: CfgNode, values: Sequence[object]) -> bool:
    is_nested = isinstance(values[0], Sequence)  # else they are every map's
    maps = _anchor_maps(cfg)
    return bool(maps) and is_nested and len(values) not in (1, len(maps))


def _fits(labels: Sequence[int], thresholds: Sequence[float]) -> bool:
    return len(labels) == len(thresholds) + 1


# (whether it is wrong, the message, in which c is the config).
OF_MODELS: Rows = (
    (
        lambda c: len(c.MODEL.PIXEL_MEAN) != len(c.MODEL.PIXEL_STD),
        "MODEL.PIXEL_MEAN is {c.MODEL.PIXEL_MEAN} and MODEL.PIXEL_STD {c.MODEL.PIXEL_STD}: "
        "expected an entry in both for each channel.",
    ),
    (
        lambda c: c.INPUT.FORMAT in ("RGB", "BGR") and len(c.MODEL.PIXEL_MEAN) != 3,
        "MODEL.PIXEL_MEAN is {c.MODEL.PIXEL_MEAN}, but INPUT.FORMAT '{c.INPUT.FORMAT}' has 3 "
        "channels: give 3 numbers, in that order.",
    ),
    (
        lambda c: _has_resnet(c) and c.MODEL.RESNETS.DEPTH not in RESNET_DEPTHS,
        f"MODEL.RESNETS.DEPTH is {{c.MODEL.RESNETS.DEPTH}}: expected one of {RESNET_DEPTHS}.",
    ),
    (
        lambda c: _has_small_resnet(c) and c.MODEL.RESNETS.RES2_OUT_CHANNELS != 64,
        "MODEL.RESNETS.RES2_OUT_CHANNELS is {c.MODEL.RESNETS.RES2_OUT_CHANNELS}, but "
        "MODEL.RESNETS.DEPTH {c.MODEL.RESNETS.DEPTH} has 64: set it to 64.",
    ),
    (
        lambda c: (
            _has_small_resnet(c)
            and (
                any(c.MODEL.RESNETS.DEFORM_ON_PER_STAGE)
                or c.MODEL.RESNETS.RES5_DILATION != 1
                or c.MODEL.RESNETS.NUM_GROUPS != 1
            )
        ),
        "MODEL.RESNETS.DEPTH {c.MODEL.RESNETS.DEPTH} has neither DEFORM_ON_PER_STAGE nor "
        "RES5_DILATION nor NUM_GROUPS: leave these out, or use 50 or more.",
    ),
    (
        lambda c: (
            _has_roi_heads(c, "StandardROIHeads", "CascadeROIHeads")
            and not c.MODEL.ROI_BOX_HEAD.NAME
        ),
        "MODEL.ROI_BOX_HEAD.NAME is '', but MODEL.ROI_HEADS.NAME '{c.MODEL.ROI_HEADS.NAME}' needs "
        "one: set it to 'FastRCNNConvFCHead'.",
    ),
    (
        lambda c: (
            _has_roi_heads(c, "CascadeROIHeads") and not c.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG
        ),
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is False, but MODEL.ROI_HEADS.NAME "
        "'CascadeROIHeads' needs it: set it to True.",
    ),
    *(
        (
            lambda c, node=node: not _fits(c.MODEL[node].IOU_LABELS, c.MODEL[node].IOU_THRESHOLDS),
            f"MODEL.{node}.IOU_LABELS is {{c.MODEL.{node}.IOU_LABELS}} and MODEL.{node}."
            f"IOU_THRESHOLDS {{c.MODEL.{node}.IOU_THRESHOLDS}}: expected one label more than "
            "thresholds.",
        )
        for node in ("RPN", "ROI_HEADS", "RETINANET")
    ),
    *(
        (
            lambda c, key=key: _anchors_do_not_fit(c, c.MODEL.ANCHOR_GENERATOR[key]),
            f"MODEL.ANCHOR_GENERATOR.{key} is {{c.MODEL.ANCHOR_GENERATOR.{key}}}: expected one "
            "list, or one for each map of IN_FEATURES (MODEL.RETINANET's or MODEL.RPN's).",
        )
        for key in ("SIZES", "ASPECT_RATIOS")
    ),
    (
        lambda c: bool(c.INPUT.MIN_SIZE_TEST) and c.INPUT.MAX_SIZE_TEST < c.INPUT.MIN_SIZE_TEST,
        "INPUT.MAX_SIZE_TEST is {c.INPUT.MAX_SIZE_TEST}: expected INPUT.MIN_SIZE_TEST "
        "({c.INPUT.MIN_SIZE_TEST}) or more.",
    ),
    (
        lambda c: _is_classifier(c) and c.INPUT.FORMAT != "RGB",
        "INPUT.FORMAT is '{c.INPUT.FORMAT}': expected 'RGB' for a classifier, with "
        "MODEL.PIXEL_MEAN in that order.",
    ),
    (
        lambda c: c.INPUT.CLASSIFICATION.RESIZE_TEST < c.INPUT.CLASSIFICATION.SIZE_TEST,
        "INPUT.CLASSIFICATION.RESIZE_TEST is {c.INPUT.CLASSIFICATION.RESIZE_TEST}: expected "
        "SIZE_TEST ({c.INPUT.CLASSIFICATION.SIZE_TEST}) or more.",
    ),
)

OF_TRAINING: Rows = (
    (
        lambda c: (
            c.SOLVER.NON_FINITE_GRADIENTS == "raise"
            and c.SOLVER.MAX_SKIPPED_STEPS != USUAL.SOLVER.MAX_SKIPPED_STEPS
        ),
        "SOLVER.MAX_SKIPPED_STEPS is {c.SOLVER.MAX_SKIPPED_STEPS}, but it is read with "
        "SOLVER.NON_FINITE_GRADIENTS 'skip' only: set that, or set it to "
        f"{USUAL.SOLVER.MAX_SKIPPED_STEPS} (the default).",
    ),
    (
        lambda c: bool(c.TEST.BEST_METRIC) and not c.TEST.EVAL_PERIOD,
        "TEST.BEST_METRIC is '{c.TEST.BEST_METRIC}', but TEST.EVAL_PERIOD is 0, so nothing is "
        "evaluated during training: set the steps between two evaluations.",
    ),
    (
        lambda c: bool(c.TEST.PATIENCE) and not c.TEST.BEST_METRIC,
        "TEST.PATIENCE is {c.TEST.PATIENCE}, but TEST.BEST_METRIC, which it waits for, is '': set "
        "it, or PATIENCE 0.",
    ),
    (
        lambda c: bool(c.VIS_PERIOD) and "tensorboard" not in c.LOGGING.WRITERS,
        "VIS_PERIOD is {c.VIS_PERIOD}, but only the writer 'tensorboard' shows pictures, and "
        "LOGGING.WRITERS is {c.LOGGING.WRITERS}: add it, or set VIS_PERIOD to 0.",
    ),
    (
        lambda c: c.SOLVER.NESTEROV and not c.SOLVER.MOMENTUM,
        "SOLVER.NESTEROV is True, which needs SOLVER.MOMENTUM above 0: set it, or NESTEROV False.",
    ),
    (
        lambda c: c.SOLVER.UNIT == "epoch" and c.SOLVER.WARMUP_ITERS >= c.SOLVER.MAX_ITER,
        "SOLVER.UNIT is 'epoch', so SOLVER.WARMUP_ITERS {c.SOLVER.WARMUP_ITERS} (Detectron2's "
        "default: 1000) of MAX_ITER {c.SOLVER.MAX_ITER} are epochs: set it to fewer, or 0.",
    ),
    (
        lambda c: bool(
            c.SOLVER.REFERENCE_WORLD_SIZE and c.SOLVER.IMS_PER_BATCH % c.SOLVER.REFERENCE_WORLD_SIZE
        ),
        "SOLVER.REFERENCE_WORLD_SIZE is {c.SOLVER.REFERENCE_WORLD_SIZE}: expected a divisor of "
        "SOLVER.IMS_PER_BATCH ({c.SOLVER.IMS_PER_BATCH}), or 0.",
    ),
    (
        lambda c: c.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(c.INPUT.MIN_SIZE_TRAIN) != 2,
        "INPUT.MIN_SIZE_TRAIN is {c.INPUT.MIN_SIZE_TRAIN}: expected (low, high) for "
        "INPUT.MIN_SIZE_TRAIN_SAMPLING 'range'.",
    ),
    (
        lambda c: c.INPUT.MAX_SIZE_TRAIN < min(c.INPUT.MIN_SIZE_TRAIN),
        "INPUT.MAX_SIZE_TRAIN is {c.INPUT.MAX_SIZE_TRAIN}: expected the smallest of "
        "INPUT.MIN_SIZE_TRAIN {c.INPUT.MIN_SIZE_TRAIN} or more.",
    ),
    (
        lambda c: c.INPUT.CROP.TYPE.startswith("relative") and max(c.INPUT.CROP.SIZE) > 1,
        "INPUT.CROP.SIZE is {c.INPUT.CROP.SIZE}: expected shares of the image, up to 1, for "
        "INPUT.CROP.TYPE '{c.INPUT.CROP.TYPE}'.",
    ),
    (
        lambda c: (
            c.INPUT.CROP.TYPE.startswith("absolute") and any(x % 1 for x in c.INPUT.CROP.SIZE)
        ),
        "INPUT.CROP.SIZE is {c.INPUT.CROP.SIZE}: expected whole pixels for INPUT.CROP.TYPE "
        "'{c.INPUT.CROP.TYPE}'.",
    ),
    (
        lambda c: c.INPUT.LSJ.ENABLED and c.INPUT.CROP.ENABLED,
        "INPUT.LSJ.ENABLED and INPUT.CROP.ENABLED exclude each other.",
    ),
)

OF_DISTILLATION: Rows = (
    (
        lambda c: c.MODEL.META_ARCHITECTURE in DENSE and c.MOKD.OUTPUTS.RPN_WEIGHT not in (0, 1),
        "MOKD.OUTPUTS.RPN_WEIGHT is {c.MOKD.OUTPUTS.RPN_WEIGHT}, but MODEL.META_ARCHITECTURE "
        "'{c.MODEL.META_ARCHITECTURE}' has no RPN: set it to 1.",
    ),
)


def check_combinations(cfg: CfgNode, rows: Iterable[Rows], source: str = "") -> None:
    """Raise ValueError for the first row that is wrong; ``source`` is put before the message."""
    for is_wrong, message in (row for part in rows for row in part):
        if is_wrong(cfg):
            raise ValueError(source + message.format(c=cfg))


def images_at_once(cfg: CfgNode) -> int:
    """Return how many images a process runs at once in training."""
    processes = cfg.SOLVER.REFERENCE_WORLD_SIZE or comm.get_world_size()
    return cfg.SOLVER.IMS_PER_BATCH // processes // cfg.SOLVER.MICRO_BATCHES


def check_batch(cfg: CfgNode) -> None:
    """Raise ValueError unless the batch can be shared by the processes and their micro-batches."""
    solver = cfg.SOLVER
    # With a reference, the batch and the number of processes will be scaled together.
    processes = solver.REFERENCE_WORLD_SIZE or comm.get_world_size()
    if solver.IMS_PER_BATCH % processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}: expected a multiple of the "
            f"{processes} processes (--num-gpus, or torchrun's)."
        )
    size = solver.IMS_PER_BATCH // processes
    if size % solver.MICRO_BATCHES:
        raise ValueError(
            f"SOLVER.MICRO_BATCHES is {solver.MICRO_BATCHES}: expected a divisor of the {size} "
            f"images that each process gets (SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH})."
        )
