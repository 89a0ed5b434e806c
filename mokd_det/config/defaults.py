# Copyright (c) The mokd_det authors.
"""Every option of mokd_det, added to Detectron2's config."""

from detectron2.config import CfgNode as CN

__all__ = ["add_mokd_config"]


def add_mokd_config(cfg):
    """
    Add the options of mokd_det to a Detectron2 config, in place.

    Args:
        cfg (CfgNode): as from ``detectron2.config.get_cfg()``.
    """
    # ---------------------------------------------------------------------------------------- #
    # Data sets in COCO format, by name, without writing Python: a list of
    # [name, JSON file, image folder]. DATASETS.TRAIN and DATASETS.TEST then use the names.
    # "datasets://" in a path is $DETECTRON2_DATASETS, ./datasets by default.
    # ---------------------------------------------------------------------------------------- #
    cfg.DATASETS.COCO = []

    # Random colours in training: contrast and each channel's brightness are multiplied by factors
    # in [1 - j, 1 + j]. 0 is off, as in Detectron2. For data of another camera, sun or season.
    cfg.INPUT.COLOR_JITTER = 0.0

    # ---------------------------------------------------------------------------------------- #
    # A torchvision classification model as the backbone, for MODEL.BACKBONE.NAME
    # "build_torchvision_backbone", "build_torchvision_fpn_backbone" (R-CNNs: p2-p6) or
    # "build_retinanet_torchvision_fpn_backbone" (p3-p7). MODEL.FPN.IN_FEATURES names the levels
    # as always: res2, res3, res4, res5 are those of stride 4, 8, 16, 32.
    # ---------------------------------------------------------------------------------------- #
    cfg.MODEL.TORCHVISION = CN()
    # Any name of torchvision.models.list_models(torchvision.models).
    cfg.MODEL.TORCHVISION.NAME = "mobilenet_v2"
    # "": random; "DEFAULT" or the name of a weight enum: torchvision downloads them; else a file.
    # These weights want INPUT.FORMAT "RGB", PIXEL_MEAN [123.675, 116.28, 103.53] and
    # PIXEL_STD [58.395, 57.12, 57.375].
    cfg.MODEL.TORCHVISION.WEIGHTS = ""
    # "BN" or "FrozenBN" (statistics and affine of the weights stay; right for small batches).
    cfg.MODEL.TORCHVISION.NORM = "BN"
    # Only without FPN: the stages to output. Empty: all of res2 ... res5.
    cfg.MODEL.TORCHVISION.OUT_FEATURES = []
    # Graph nodes to read the stages at, one for each, if the default (the last node of each
    # resolution) is not wanted. Names: torchvision.models.feature_extraction's.
    cfg.MODEL.TORCHVISION.NODES = []

    # ---------------------------------------------------------------------------------------- #
    # Distillation. MODEL stays the student's ordinary config.
    # ---------------------------------------------------------------------------------------- #
    cfg.MOKD = CN()
    # False is stock Detectron2, bit for bit.
    cfg.MOKD.ENABLED = False
    # The registered meta-architecture that holds student and teacher.
    cfg.MOKD.META_ARCHITECTURE = "DistillationModel"

    cfg.MOKD.TEACHER = CN()
    # The teacher's own config file. It brings its own MODEL and INPUT.FORMAT.
    cfg.MOKD.TEACHER.CONFIG_FILE = ""
    # The teacher's weights: a file or anything that Detectron2's MODEL.WEIGHTS resolves. Loading
    # is strict. Empty: MODEL.WEIGHTS of the teacher's config.
    cfg.MOKD.TEACHER.WEIGHTS = ""
    # Overrides of the teacher's config: [KEY, VALUE, ...] as on the command line.
    cfg.MOKD.TEACHER.OPTS = []

    # Matching the backbone's (FPN) feature maps in a learned subspace.
    cfg.MOKD.FEATURES = CN()
    # Level map: student's feature names, and the teacher's feature for each (same length).
    # Empty: every name that both have. Strides and channels may differ.
    cfg.MOKD.FEATURES.STUDENT = []
    cfg.MOKD.FEATURES.TEACHER = []
    # Registered in mokd_det.subspace.PROJECTORS.
    cfg.MOKD.FEATURES.PROJECTOR = "SubspaceProjector"
    # Dimension n of the common subspace. 0: twice the wider side's channels.
    cfg.MOKD.FEATURES.DIM = 0
    # Teacher's side of the projector: "learned", "frozen" (a random semi-orthogonal map), or
    # "identity" (no projection; n is then the teacher's channels).
    cfg.MOKD.FEATURES.TEACHER_SIDE = "frozen"
    # Registered in mokd_det.subspace.FEATURE_LOSSES: "smooth_l1", "mse", "cosine".
    cfg.MOKD.FEATURES.LOSS = "smooth_l1"

    # How the gradients of task and distillation are weighed against each other where they meet.
    cfg.MOKD.BALANCING = CN()
    # Registered in mokd_det.balancing.BALANCERS:
    #   "protected_min_norm"  min-norm on log-losses with at least half of it for the task
    #   "min_norm"            the published rule, literally; it can starve the task
    #   "anchored"            the distillation gradient at CAP times the task gradient's norm
    #   "fixed"               WEIGHTS at every step
    cfg.MOKD.BALANCING.RULE = "protected_min_norm"
    # How the rule's weights are scaled: "none" (as the rule gives them), "convex" (they sum to
    # one), "sum" (to the number of objectives), "task_norm" (the update has the task gradient's
    # norm). The protected rules give the task weight one, so that the learning rate keeps its
    # meaning, and want "none".
    cfg.MOKD.BALANCING.RESCALE = "none"
    # Rule "fixed": the weights of task and distillation.
    cfg.MOKD.BALANCING.WEIGHTS = [1.0, 1.0]
    # Rules "protected_min_norm" and "anchored": largest norm of the weighted distillation
    # gradient, in units of the task gradient's. Below 1 the task descends in every step.
    cfg.MOKD.BALANCING.CAP = 0.5
    # Rule "min_norm": False is the literal formula, with weights outside [0, 1].
    cfg.MOKD.BALANCING.CLIP = True
