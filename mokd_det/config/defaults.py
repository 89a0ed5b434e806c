# Copyright (c) The mokd_det authors.
"""Every option of mokd_det, added to Detectron2's config."""

import inspect
from typing import Any

from detectron2.config import CfgNode as CN

from ..balancing import RULES

# Options of objectives that are registered, by the name of their node.
_declared: dict[str, dict[str, Any]] = {}


def declare_options(node: str, options: dict[str, Any] | None) -> None:
    """
    Have the node ``MOKD.<node>`` with these options and defaults in every config from now on (None:
    no longer): for objectives of one's own. :func:`add_mokd_config` has the others.
    """
    _declared.pop(node, None)
    if options is not None:
        _declared[node] = dict(options)


def add_mokd_config(cfg: CN) -> None:
    """Add the options of mokd_det to a Detectron2 config, in place."""
    # ---------------------------------------------------------------------------------------- #
    # Data sets in COCO format, by name, without writing Python: a list of
    # [name, JSON file, image folder]. DATASETS.TRAIN and DATASETS.TEST then use the names.
    # "datasets://" in a path is $DETECTRON2_DATASETS, ./datasets by default. Here and wherever a
    # config names a file: what lies beside the config comes first, then what lies where one stands.
    cfg.DATASETS.COCO = []

    # Data sets for classification, by name: a list of [name, path]. The path is a folder with a
    # folder of images for each class, or a packed .npz (datasets/README.md). "imagenet_train" and
    # "imagenet_val" are there: datasets://imagenet/train and /val.
    cfg.DATASETS.CLASSIFICATION = []
    # What to do with an image file that cannot be read: "error" (names it) or "skip". Then another
    # image takes its place in training, and none in evaluation, where a detector's AP counts its
    # objects as missed; the skipped ones are counted in the log.
    cfg.DATASETS.BROKEN_IMAGES = "error"

    # Detectors: random colours in training. Contrast and each channel's brightness are multiplied
    # by factors in [1 - j, 1 + j]. 0 is off, as in Detectron2. For data of another camera, sun or
    # season.
    cfg.INPUT.COLOR_JITTER = 0.0

    # Large-scale jitter (Ghiasi et al. 2021; Detectron2's "LSJ" recipes): the image is resized by a
    # random factor and cropped or padded to SIZE x SIZE. Replaces MIN_SIZE_TRAIN and CROP.
    cfg.INPUT.LSJ = CN()
    cfg.INPUT.LSJ.ENABLED = False
    # Of the training images, in pixels.
    cfg.INPUT.LSJ.SIZE = 1024
    # Range of the factor, in units of the one that fits the image into SIZE x SIZE.
    cfg.INPUT.LSJ.SCALE = [0.1, 2.0]

    # ---------------------------------------------------------------------------------------- #
    # Images for classification, by torchvision's transforms. INPUT.FORMAT is "RGB" then, and
    # INPUT.RANDOM_FLIP counts as for detectors.
    cfg.INPUT.CLASSIFICATION = CN()
    # Side of the square images in training and in evaluation, in pixels.
    cfg.INPUT.CLASSIFICATION.SIZE_TRAIN = 224
    cfg.INPUT.CLASSIFICATION.SIZE_TEST = 224
    # In evaluation the shorter side is resized to this before the centre is cropped.
    cfg.INPUT.CLASSIFICATION.RESIZE_TEST = 256
    # "bilinear" or "bicubic".
    cfg.INPUT.CLASSIFICATION.INTERPOLATION = "bilinear"
    # In training: "resized" (a crop with an area in the range SCALE, in units of the image's, and
    # an aspect ratio in the range RATIO, resized), or "padded" (for small images: the image with
    # its shorter side resized to SIZE_TRAIN, padded by PADDING pixels, cropped).
    cfg.INPUT.CLASSIFICATION.CROP = "resized"
    cfg.INPUT.CLASSIFICATION.SCALE = [0.08, 1.0]
    cfg.INPUT.CLASSIFICATION.RATIO = [0.75, 1.3333333]
    cfg.INPUT.CLASSIFICATION.PADDING = 4
    # "", "autoaugment", "randaugment", "trivialaugment" or "augmix"; MAGNITUDE is randaugment's.
    cfg.INPUT.CLASSIFICATION.AUTO_AUGMENT = ""
    cfg.INPUT.CLASSIFICATION.MAGNITUDE = 9
    # Probability that a random rectangle is replaced by the mean colour.
    cfg.INPUT.CLASSIFICATION.ERASING = 0.0
    # Images of a batch are mixed in pairs, and so are their labels: the parameter of the Beta
    # distribution, 0 is off. With both, each batch gets one of them.
    cfg.INPUT.CLASSIFICATION.MIXUP = 0.0
    cfg.INPUT.CLASSIFICATION.CUTMIX = 0.0
    # Detectors without a teacher: the loader and the step that a distilled student has, instead of
    # Detectron2's, so that a baseline sees the same images and augmentations, and a resumed run is
    # the uninterrupted one.
    cfg.DATALOADER.RESUMABLE = False
    # Each image comes this many times in a row in the stream that the processes share, and a
    # permutation covers that part of the set (Hoffer et al. 2020, as in DeiT). 1 is off.
    cfg.DATALOADER.REPEATED_AUGMENTATION = 1

    # For MODEL.META_ARCHITECTURE "LazyConfigDetector": a Python config of Detectron2 (file, or name
    # in the model zoo), whose "model" is the detector, and overrides ["model.num_classes=3", ...].
    cfg.MODEL.LAZY_CONFIG = CN()
    cfg.MODEL.LAZY_CONFIG.FILE = ""
    cfg.MODEL.LAZY_CONFIG.OVERRIDES = []

    # ---------------------------------------------------------------------------------------- #
    # A torchvision classification model as the backbone, for MODEL.BACKBONE.NAME
    # "build_torchvision_backbone", "build_torchvision_fpn_backbone" (R-CNNs: p2-p6) or
    # "build_retinanet_torchvision_fpn_backbone" (p3-p7). MODEL.FPN.IN_FEATURES names the levels
    # as always: res2, res3, res4, res5 are those of stride 4, 8, 16, 32.
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
    # For MODEL.META_ARCHITECTURE "TorchvisionDetector": a detector of torchvision.models.detection.
    # It resizes and normalises images itself, so INPUT.MIN_SIZE_*, MAX_SIZE_* and MODEL.PIXEL_*
    # are not for it (configs/Base-TorchvisionDetector.yaml).
    cfg.MODEL.TORCHVISION_DETECTOR = CN()
    # Any name of torchvision.models.list_models(torchvision.models.detection).
    cfg.MODEL.TORCHVISION_DETECTOR.NAME = "fasterrcnn_resnet50_fpn_v2"
    # "": random; "DEFAULT" or the name of a weight enum: COCO's, which torchvision downloads; else
    # a file. For other classes than the weights', the last layers of the heads start random.
    cfg.MODEL.TORCHVISION_DETECTOR.WEIGHTS = ""
    # Without WEIGHTS, of the backbone: "", "DEFAULT" or the name of a weight enum.
    cfg.MODEL.TORCHVISION_DETECTOR.BACKBONE_WEIGHTS = ""
    # Of the data, without the background that torchvision counts as well.
    cfg.MODEL.TORCHVISION_DETECTOR.NUM_CLASSES = 80
    # The heads have COCO's category ids as labels, as those of torchvision's COCO weights: 91
    # outputs for the 80 classes. False: the labels are 1, 2, ...
    cfg.MODEL.TORCHVISION_DETECTOR.COCO_IDS = False
    # Further arguments of the constructor, e.g. {min_size: 320, max_size: 640,
    # trainable_backbone_layers: 5}. Of several values of min_size each training image gets one at
    # random, and the last one counts in evaluation.
    cfg.MODEL.TORCHVISION_DETECTOR.OPTIONS = CN(new_allowed=True)
    # False: the weights above say only what torchvision freezes with them; their values are not
    # fetched, since MODEL.WEIGHTS has all of them.
    cfg.MODEL.TORCHVISION_DETECTOR.DOWNLOAD = True

    # ---------------------------------------------------------------------------------------- #
    # For MODEL.META_ARCHITECTURE "Classifier": the network. It wants INPUT.FORMAT "RGB" and, for
    # torchvision's weights, MODEL.PIXEL_MEAN and PIXEL_STD as above (configs/Base-Classifier.yaml).
    cfg.MODEL.CLASSIFIER = CN()
    # Any classification model of torchvision, "timm.X" for timm's X (extra "timm"), or a name
    # registered in mokd_det.modeling.CLASSIFIERS.
    cfg.MODEL.CLASSIFIER.NAME = "resnet18"
    # "": random; "DEFAULT" or the name of a weight enum: torchvision downloads them (timm:
    # "DEFAULT"); else a file. If it has another number of classes, the last layer starts random.
    cfg.MODEL.CLASSIFIER.WEIGHTS = ""
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 1000
    # Name of the submodule whose input are the features before the classifier ("pre_logits") and
    # whose output are the logits. Empty: "fc", "classifier", "head" or "heads".
    cfg.MODEL.CLASSIFIER.HEAD = ""
    # Further arguments of the network's constructor, e.g. {dropout: 0.2}.
    cfg.MODEL.CLASSIFIER.OPTIONS = CN(new_allowed=True)
    # Share of each target that is spread evenly over all classes.
    cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING = 0.0

    # ---------------------------------------------------------------------------------------- #
    # How a step is computed, with and without a teacher. If MOKD.ENABLED is False, a detector has
    # Detectron2's own loader and step, unless an option that those do not know is set
    # (MICRO_BATCHES, EMA_DECAY, bfloat16, CHECKPOINTING, COMPILE, NON_FINITE_GRADIENTS), or
    # DATALOADER.RESUMABLE.
    # What SOLVER.MAX_ITER, STEPS, WARMUP_ITERS and CHECKPOINT_PERIOD, and TEST.EVAL_PERIOD count:
    # "iteration", or "epoch" (as many images as the training set has).
    cfg.SOLVER.UNIT = "iteration"
    # "SGD" (Detectron2's) or "AdamW", with MOMENTUM or BETAS.
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.SOLVER.BETAS = [0.9, 0.999]
    # Gradient accumulation: the batch of SOLVER.IMS_PER_BATCH images is processed in this many
    # parts, one after the other. Learning rate and schedule stay those of the whole batch.
    cfg.SOLVER.MICRO_BATCHES = 1
    # For SOLVER.AMP.ENABLED: "float16" (with loss scaling, as Detectron2's) or "bfloat16".
    cfg.SOLVER.AMP.PRECISION = "float16"
    # Running mean of the student's weights: mean = d * mean + (1 - d) * weights in every step,
    # d = min(EMA_DECAY, (1 + step) / (10 + step)). The mean is what is evaluated and saved as the
    # model. 0: off.
    cfg.SOLVER.EMA_DECAY = 0.0
    # A step whose gradients are infinite or NaN: "raise" ends the run before the weights change,
    # "skip" leaves the step out (weights, momentum, statistics, running mean, rule), but not more
    # than so many in a row. Of float16, the loss scaling skips steps in any case.
    cfg.SOLVER.NON_FINITE_GRADIENTS = "raise"
    cfg.SOLVER.MAX_SKIPPED_STEPS = 10
    # How many of the newest checkpoints of SOLVER.CHECKPOINT_PERIOD are kept; 0: all. With 2 or
    # more a damaged one does not end the run. model_final.pth is kept besides.
    cfg.SOLVER.KEEP_CHECKPOINTS = 0
    # Compute the inside of a ResNet's stages again in the backward pass instead of keeping it.
    cfg.MODEL.BACKBONE.CHECKPOINTING = False
    # A backend of torch.compile for the backbone, "inductor" being the usual one. "": off.
    cfg.MODEL.BACKBONE.COMPILE = ""

    # Evaluation of classifiers: images a batch and process; whether to report every class.
    cfg.TEST.BATCH_SIZE = 64
    cfg.TEST.PER_CLASS = False
    # Keep the checkpoint with the highest value of this metric as model_best.pth: "bbox/AP50",
    # "classification/top1"; with several test sets "name of the set/bbox/AP50". "": off.
    cfg.TEST.BEST_METRIC = ""
    # End training after so many evaluations in a row that are not better. 0: off.
    cfg.TEST.PATIENCE = 0

    # Where losses and results go, besides the console and balance.json: "json" (metrics.json, of
    # which reports are made), "tensorboard", "csv" (metrics.csv, a column for each scalar), and if
    # installed "wandb" and "mlflow". Project, experiment and server of these are their own
    # variables': WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME, MLFLOW_TRACKING_URI, ...
    cfg.LOGGING = CN()
    cfg.LOGGING.WRITERS = ["json", "tensorboard"]

    # ---------------------------------------------------------------------------------------- #
    # Distillation. MODEL stays the student's ordinary config.
    cfg.MOKD = CN()
    # False is stock Detectron2, bit for bit.
    cfg.MOKD.ENABLED = False
    # What is distilled: names in mokd_det.objectives.OBJECTIVES. Each has its options in a node
    # of its own below; an option of one that is not on is an error.
    #   "features"  the feature maps of the backbone (FPN), or what is tapped of a classifier
    #   "outputs"   classes and boxes of R-CNNs and RetinaNets (also one of each)
    #   "logits"    the class probabilities of classifiers
    #   "teacher_head"  what the teacher's own heads say about the student's features
    # None: ["teacher_head", "outputs"] for detectors, ["features"] with a TorchScript teacher of
    # theirs, and ["features", "logits"] for classifiers.
    cfg.MOKD.OBJECTIVES = None
    # The kind of detector that a recipe's weights were published for, "two-stage" or "one-stage": a
    # student of the other kind is an error. "": any.
    cfg.MOKD.RECIPE_FOR = ""
    # The registered meta-architecture that holds student and teacher.
    cfg.MOKD.META_ARCHITECTURE = "DistillationModel"

    cfg.MOKD.TEACHER = CN()
    # The teacher's own config file (.yaml, or Detectron2's .py), or its name in Detectron2's model
    # zoo, e.g. "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", or "mokd://..." of the configs that
    # come with mokd_det. It brings its own MODEL and INPUT.FORMAT.
    cfg.MOKD.TEACHER.CONFIG_FILE = ""
    # The teacher's weights: a file or anything that Detectron2's MODEL.WEIGHTS resolves. Loading
    # is strict. Empty: those of the model zoo, or MODEL.WEIGHTS of the teacher's config.
    cfg.MOKD.TEACHER.WEIGHTS = ""
    # Overrides of the teacher's config: [KEY, VALUE, ...] as on the command line; for a .py
    # ["model.num_classes=3", ...].
    cfg.MOKD.TEACHER.OPTS = []
    # Instead of config and weights, for detectors: a TorchScript module that maps images
    # (N, C, H, W) to dict[str, Tensor] of feature maps. Images are normalised and padded as said
    # here.
    cfg.MOKD.TEACHER.TORCHSCRIPT = CN()
    cfg.MOKD.TEACHER.TORCHSCRIPT.FILE = ""
    cfg.MOKD.TEACHER.TORCHSCRIPT.INPUT_FORMAT = "RGB"
    cfg.MOKD.TEACHER.TORCHSCRIPT.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MOKD.TEACHER.TORCHSCRIPT.PIXEL_STD = [58.395, 57.12, 57.375]
    cfg.MOKD.TEACHER.TORCHSCRIPT.SIZE_DIVISIBILITY = 32
    # Instead of a config: the name of a detector of torchvision, such as
    # "fasterrcnn_resnet50_fpn_v2". TEACHER.WEIGHTS is then "DEFAULT" (COCO's), the name of a weight
    # enum, or a file.
    cfg.MOKD.TEACHER.DETECTOR = ""
    # Instead of a config, for classifiers: the teacher's MODEL.CLASSIFIER.NAME. TEACHER.WEIGHTS is
    # then "DEFAULT", the name of a weight enum, or a file. Images are normalised as those
    # weights want (from a file: as ImageNet's weights do).
    cfg.MOKD.TEACHER.CLASSIFIER = ""
    # Classifiers: side of the images that the teacher sees, in pixels. 0: the student's.
    cfg.MOKD.TEACHER.IMAGE_SIZE = 0
    # Detectors: the most boxes an image that the teacher proposes, where an objective asks for its
    # outputs. A RetinaNet student is compared at the anchors nearest to them.
    cfg.MOKD.TEACHER.PROPOSALS = 256
    # The teacher at speed; what each may change is a test of ours (docs/distillation.md).
    # Autocast: "float16", "bfloat16", "float32", or "": as the student's (SOLVER.AMP). "auto":
    # "bfloat16" on a device that has instructions for it, unless the teacher's features then differ
    # by more than 5 % of their standard deviation; else, and with SOLVER.AMP, as "".
    cfg.MOKD.TEACHER.PRECISION = "auto"
    # Memory format of images and convolution weights, which half precision likes. None: True where
    # PRECISION "auto" has chosen "bfloat16".
    cfg.MOKD.TEACHER.CHANNELS_LAST = None
    # A backend of torch.compile for its backbone, "inductor" being the usual one. "": off.
    cfg.MOKD.TEACHER.COMPILE = ""
    # torch.inference_mode instead of no_grad.
    cfg.MOKD.TEACHER.INFERENCE_MODE = False
    # A CUDA stream of its own, on which it runs while the student's forward pass does.
    cfg.MOKD.TEACHER.STREAM = False

    # Parts of the student that start from the teacher's weights where name and shape are the same:
    # prefixes of names in the state dict, e.g. ["backbone.fpn_", "proposal_generator"].
    cfg.MOKD.INHERIT = []

    # The objective "features": feature maps are matched in a learned subspace.
    cfg.MOKD.FEATURES = CN()
    # Factor of the loss, before it is balanced. Rules that are independent of the loss's scale do
    # not see it.
    cfg.MOKD.FEATURES.LOSS_WEIGHT = 1.0
    # Level map: student's feature names, and the teacher's feature for each (same length).
    # Empty: every name that both have; if there is none, those of equal stride. Strides and
    # channels may differ.
    # Classifiers: names of submodules whose output is matched, or "pre_logits", the input of the
    # classifier's head. Empty: "pre_logits" (models whose head has hidden layers: the last map).
    cfg.MOKD.FEATURES.STUDENT = []
    cfg.MOKD.FEATURES.TEACHER = []
    # Registered in mokd_det.objectives.PROJECTORS:
    #   "SubspaceProjector"  both sides into a common subspace, by DIM and TEACHER_SIDE
    #   "FrozenProjector"    the same, but random on both sides
    #   "Linear"             the student into the teacher's channels (FitNets)
    #   "MaskedGenerator"    as Linear; then parts are masked and two convolutions fill them (MGD)
    #   "none"               equal channels are compared as they are (PKD, CWD, FGD)
    cfg.MOKD.FEATURES.PROJECTOR = "SubspaceProjector"
    # Dimension n of the common subspace. 0: the channels of the wider side,
    # the fewest that lose nothing of either.
    cfg.MOKD.FEATURES.DIM = 0
    # Teacher's side of the projector: "learned", "frozen" (a random semi-orthogonal map), or
    # "identity" (no projection; n is then the teacher's channels).
    cfg.MOKD.FEATURES.TEACHER_SIDE = "frozen"
    # "MaskedGenerator": the share of positions that is masked. Published are 0.65 for one-stage and
    # 0.45 for two-stage detectors.
    cfg.MOKD.FEATURES.MASKED = 0.65
    # Registered in mokd_det.objectives.FEATURE_LOSSES: means "smooth_l1", "mse" and "cosine";
    # "squared_sum" (MGD); "pkd" (Pearson correlation), "cwd" (where each channel looks) and "fgd"
    # (attention and foreground). configs/Recipes/ has the published weights.
    cfg.MOKD.FEATURES.LOSS = "smooth_l1"
    # "cwd": divides the features.
    cfg.MOKD.FEATURES.TEMPERATURE = 1.0
    # Detectors: weight of each level of a pyramid: "equal", or its share of all "positions", so
    # that the few positions of coarse levels count like any others.
    cfg.MOKD.FEATURES.LEVEL_WEIGHTS = "equal"
    # Detectors: weigh positions by the objects of each image: "" (all alike), "ground_truth", or
    # "teacher" (boxes of which the teacher is surer than FOREGROUND_SCORE). Positions that a box
    # touches get FOREGROUND_SHARE of the loss, the others the rest. FOREGROUND_UNIT "image": each
    # image has the weight of its positions; "box" (FGD): each box has the same, however big, and
    # so has all background.
    cfg.MOKD.FEATURES.FOREGROUND = ""
    cfg.MOKD.FEATURES.FOREGROUND_SHARE = 0.5
    cfg.MOKD.FEATURES.FOREGROUND_SCORE = 0.5
    cfg.MOKD.FEATURES.FOREGROUND_UNIT = "image"

    # The objective "outputs": classes and boxes at the teacher's proposals. Both sides are R-CNNs
    # or RetinaNets, with the same classes.
    cfg.MOKD.OUTPUTS = CN()
    cfg.MOKD.OUTPUTS.LOSS_WEIGHT = 1.0
    # Between class probabilities: "kl" (Kullback-Leibler), "dkd" (softmaxes only) or "dist".
    cfg.MOKD.OUTPUTS.LOSS = "kl"
    # "dkd": factor of what is among the other classes; published is 0.25 for Faster R-CNN.
    cfg.MOKD.OUTPUTS.DKD_BETA = 1.0
    # Divides the logits of both sides.
    cfg.MOKD.OUTPUTS.TEMPERATURE = 1.0
    # Factors of the losses inside the objective. Their sum is balanced against the others.
    # RPN_WEIGHT is of objectness and boxes at each anchor, on the levels where both sides have an
    # RPN with the same anchors; without such levels it has no effect, and the log says so.
    cfg.MOKD.OUTPUTS.CLASS_WEIGHT = 1.0
    cfg.MOKD.OUTPUTS.BOX_WEIGHT = 1.0
    cfg.MOKD.OUTPUTS.RPN_WEIGHT = 1.0

    # The objective "teacher_head": the teacher's frozen heads (an R-CNN's RPN and box head,
    # RetinaNet's head, a classifier's) read the student's features, projected to its channels. The
    # student's own heads may be of any kind, and its classes others.
    cfg.MOKD.TEACHER_HEAD = CN()
    cfg.MOKD.TEACHER_HEAD.LOSS_WEIGHT = 1.0
    # Detectors: student's feature names, and the teacher's feature that each stands for. Empty: by
    # stride. What the teacher would read on a level that the student lacks is read on the nearest.
    cfg.MOKD.TEACHER_HEAD.STUDENT = []
    cfg.MOKD.TEACHER_HEAD.TEACHER = []
    # "Linear", a learned 1 x 1 convolution for each level, or "none", for equal channels.
    cfg.MOKD.TEACHER_HEAD.PROJECTOR = "Linear"
    # Divides the logits that are compared.
    cfg.MOKD.TEACHER_HEAD.TEMPERATURE = 1.0
    # Detectors: factors of the losses inside the objective, as those of OUTPUTS.
    cfg.MOKD.TEACHER_HEAD.CLASS_WEIGHT = 1.0
    cfg.MOKD.TEACHER_HEAD.BOX_WEIGHT = 1.0
    cfg.MOKD.TEACHER_HEAD.RPN_WEIGHT = 1.0

    # The objective "logits": class probabilities of classifiers.
    cfg.MOKD.LOGITS = CN()
    cfg.MOKD.LOGITS.LOSS_WEIGHT = 1.0
    # Between class probabilities: "kl" (Kullback-Leibler), "dkd" (softmaxes only) or "dist".
    cfg.MOKD.LOGITS.LOSS = "kl"
    # "dkd": factor of what is among the other classes; published are 0.5 on ImageNet, 8 on CIFAR.
    cfg.MOKD.LOGITS.DKD_BETA = 1.0
    # Divides the logits of both sides.
    cfg.MOKD.LOGITS.TEMPERATURE = 1.0

    # How the gradients of task and distillation are weighed against each other where they meet.
    cfg.MOKD.BALANCING = CN()
    # In mokd_det.balancing.RULES. Each has its options in a node of its own below; an option of
    # another rule is an error.
    #   "loss_ratio"   the task's loss, and a multiple of it of each distillation loss whose
    #                  gradient agrees with the task's; projectors learn at the task's pace
    #   "fixed"        the same weights at every step
    #   "cosine_gate"  the same, without distillation while it conflicts with the task
    #   "min_norm"     the published rule; a small distillation gradient dominates
    #   "famo"         the published amortised rule: one more student forward a step
    #   "torchjd.X"    TorchJD's XWeighting, e.g. "torchjd.UPGrad"
    cfg.MOKD.BALANCING.RULE = "loss_ratio"
    # How the rule's weights are scaled: "none" (as the rule gives them), "convex" (they sum to
    # one), "sum" (to the number of objectives), "task_norm" (the update has the task gradient's
    # norm). "loss_ratio" gives the task weight one and wants "none".
    cfg.MOKD.BALANCING.RESCALE = "none"
    # Where gradients are measured: "features" (those of the student that are matched; nearly
    # free) or "parameters" (of the student's backbone, as in the papers; a backward pass of the
    # backbone for each objective).
    cfg.MOKD.BALANCING.MEASURE_AT = "features"
    # For MEASURE_AT "parameters": on these submodules of the backbone only, e.g.
    # ["fpn_output3", "bottom_up.res5"]. The nearer to its output, the cheaper. Empty: all.
    cfg.MOKD.BALANCING.LAYERS = []
    # EMA decay a step of what the rule sees, in [0, 1): of the ratios of norms (geometric), of the
    # cosines (arithmetic, from 0), and with "loss_ratio" of the ratios of losses (geometric). None:
    # the rule's own, 0.98 for "loss_ratio" and 0 for the others.
    cfg.MOKD.BALANCING.SMOOTHING = None
    # Measure gradients and compute weights at every k-th step (and the first), and reuse the
    # weights in between: those steps are one weighted sum, which costs less. None: the rule's own,
    # 10 for "loss_ratio" (its means span about 50 steps) and "fixed" (for the logs), 1 for others.
    cfg.MOKD.BALANCING.INTERVAL = None
    # Factor of the distillation objectives' weights, whatever the rule: [first, last] is a straight
    # line over the training; pairs [share of the training, factor] are joined by straight lines.
    # [0.0, 1.0] is a ramp, [1.0, 0.0] leaves the end to the task, and [[0.0, 0.0], [0.1, 1.0],
    # [0.8, 1.0], [1.0, 0.1]] warms up, stays and decays. (With "loss_ratio" projectors do not
    # follow it.) None: the rule's own, [0.2, 1.8] for "loss_ratio" and [1.0, 1.0] for the others.
    cfg.MOKD.BALANCING.SCHEDULE = None

    # Rule "loss_ratio".
    cfg.MOKD.BALANCING.LOSS_RATIO = CN()
    # Each weighted distillation loss in units of the task's, times SCHEDULE: with its own, 0.8 in
    # the beginning and 7.2 in the end.
    cfg.MOKD.BALANCING.LOSS_RATIO.RATIO = 4.0
    # Largest norm of the weighted distillation gradient in units of the task gradient's, before
    # SCHEDULE. None: 2 for detectors, 10 for classifiers.
    cfg.MOKD.BALANCING.LOSS_RATIO.CAP = None
    # Cosine with the task gradient from which on a distillation gradient is trusted in full; from
    # there its part falls to nothing at half of it. 0: all are trusted. None: 0.1, but 0 for a
    # detector's "teacher_head" alone. With "outputs" these two are trusted together, as the one
    # that agrees more; beside others without outputs teacher_head is always trusted.
    cfg.MOKD.BALANCING.LOSS_RATIO.AGREEMENT = None
    # Rules "fixed" and "cosine_gate": the weights of the task and of each objective, in the order
    # of MOKD.OBJECTIVES. Empty: 1 for each.
    cfg.MOKD.BALANCING.FIXED = CN()
    cfg.MOKD.BALANCING.FIXED.WEIGHTS = []
    cfg.MOKD.BALANCING.COSINE_GATE = CN()
    cfg.MOKD.BALANCING.COSINE_GATE.WEIGHTS = []
    # Rule "min_norm".
    cfg.MOKD.BALANCING.MIN_NORM = CN()
    # False is the literal formula, with weights outside [0, 1].
    cfg.MOKD.BALANCING.MIN_NORM.CLIP = True
    # False takes the losses themselves instead of their logarithms (MGDA).
    cfg.MOKD.BALANCING.MIN_NORM.LOG_LOSSES = True
    # Rule "famo": learning rate and weight decay of its shares (the paper's).
    cfg.MOKD.BALANCING.FAMO = CN()
    cfg.MOKD.BALANCING.FAMO.LR = 0.025
    cfg.MOKD.BALANCING.FAMO.WEIGHT_DECAY = 0.01
    # Rules "torchjd.X": options of the weighting, e.g. {c: 0.5} for CAGrad.
    cfg.MOKD.BALANCING.TORCHJD = CN(new_allowed=True)

    _add_nodes_of_ones_own(cfg)


def _add_nodes_of_ones_own(cfg: CN) -> None:
    """Options of rules and objectives that are registered elsewhere, from their code."""
    for name, options in _declared.items():
        if name not in cfg.MOKD:
            cfg.MOKD[name] = CN(options)
    for rule in RULES:
        if rule.upper() not in cfg.MOKD.BALANCING:
            parameters = inspect.signature(RULES.get(rule)).parameters
            options = {key.upper(): value.default for key, value in parameters.items()}
            cfg.MOKD.BALANCING[rule.upper()] = CN(options)
