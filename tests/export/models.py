# Copyright (c) The mokd_det authors.
"""
Small detectors of every family with weights that find something in photos and nothing in an image
of one colour: random layers, BatchNorm statistics of real tiles, and a score threshold between.
"""

import cv2
import torch
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from torch import nn

from mokd_det.config import load_config
from mokd_det.export import ExportOptions, export_model
from mokd_det.export.detector import detect
from mokd_det.tasks import task_of

from ..conftest import CONFIGS, ROOT, TREE_OPTS, TREES
from ..modeling.families import FAMILIES
from ..modeling.test_families import FCOS

TORCHVISION = ["MODEL.TORCHVISION.WEIGHTS", "", "MODEL.TORCHVISION.NAME"]
MORE = {
    "mask_rcnn_C4": [*FAMILIES["faster_rcnn_C4"], *FAMILIES["mask_rcnn"]]
    + ["MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 7],
    "faster_rcnn_MobileNetV2": [*TORCHVISION, "mobilenet_v2"]
    + ["MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone", "INPUT.FORMAT", "RGB"],
    "fcos": ["MODEL.META_ARCHITECTURE", "LazyConfigDetector"],
}
ALL = {**FAMILIES, **MORE}

TILE = TREES / "train" / "2.jpg"  # 192 x 160
# Not the tile's own size, so that boxes are scaled back.
RESIZE = ["INPUT.MIN_SIZE_TEST", 224, "INPUT.MAX_SIZE_TEST", 260]


def export(cfg, folder, format="torchscript", method="", images=(), **options):
    """Export the model of a config, by its task."""
    options = ExportOptions(format, method, **options)
    return export_model(task_of(cfg), cfg, str(folder), options, images)


def load(cfg):
    """Return the trained model of a config."""
    return task_of(cfg).load_trained(cfg)


def tile(name="0.jpg", size=None):
    """Return a photo as a (3, H, W) uint8 BGR tensor, resized to (width, height) if given."""
    image = cv2.imread(str(TREES / "train" / name))
    image = image if size is None else cv2.resize(image, size)
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def three_sizes():
    return [tile(), tile("1.jpg", (150, 110)), tile("2.jpg", (260, 217))]


def blank_like(model, image):
    return model.pixel_mean.round().to(torch.uint8).expand_as(image).contiguous()


def detector(family, folder, opts=()):
    """
    Returns:
        CfgNode: of a small detector, its weights in ``folder``.
    """
    base = "retinanet" if family.startswith("retinanet") else "faster_rcnn"
    cfg = load_config(str(ROOT / CONFIGS[base]), [*TREE_OPTS, *RESIZE, *ALL[family], *opts])
    if family == "fcos":
        (folder / "fcos.py").write_text(FCOS)
        cfg.MODEL.LAZY_CONFIG.FILE = str(folder / "fcos.py")
    seed_all_rng(0)
    model = build_model(cfg).eval()
    _spread_features(model)
    threshold = _calibrate(model)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = threshold
    if family == "fcos":
        cfg.MODEL.LAZY_CONFIG.OVERRIDES = [f"model.test_score_thresh={threshold}"]
    cfg.MODEL.WEIGHTS = str(folder / f"{family}.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    return cfg


@torch.no_grad()
def _spread_features(model):
    """Give BatchNorm the statistics of photos; at random, deep features hardly vary."""
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over all batches
        norm.reset_running_stats()
        norm.train()
    images = torch.stack([tile(name, (192, 192)).float() for name in ("0.jpg", "1.jpg", "3.jpg")])
    model.backbone((images - model.pixel_mean) / model.pixel_std)
    model.eval()


@torch.no_grad()
def _calibrate(model):
    """Make the classifiers tell photos from one colour, and return a threshold between both."""
    photos = three_sizes()
    blanks = [blank_like(model, photo) for photo in photos]
    named = dict(model.named_modules())
    _set_threshold(model, 0.0)
    for name, layer in named.items():
        if name.endswith("cls_score"):
            _discriminate(model, layer, photos, blanks)
        if name.endswith("mask_head.predictor"):
            layer.weight.mul_(1.5 / _run(model, layer, photos[:1])[1].std())
    weakest = min(float(detect(model, photo)["scores"].max()) for photo in photos)
    strongest = max(float(detect(model, blank)["scores"].max()) for blank in blanks)
    assert weakest > strongest, "photos do not score above an image of one colour"
    return (weakest + strongest) / 2


def _discriminate(model, layer, photos, blanks):
    """Logits along what differs between both; those of photos have a deviation of 1.5."""
    inputs, _ = _run(model, layer, photos)
    others, _ = _run(model, layer, blanks)
    # Fisher's discriminant: what varies within either side counts less.
    within = torch.cov(inputs.T) + torch.cov(others.T)
    within += 0.01 * within.trace() / len(within) * torch.eye(len(within))
    direction = torch.linalg.solve(within, inputs.mean(0) - others.mean(0))
    direction = 1.5 * direction / (inputs @ direction).std()
    weight = torch.zeros_like(layer.weight)
    centre = (1, 1) if weight.dim() == 4 else ()
    is_rcnn = not hasattr(model, "head")  # whose last row is the background's
    for row in range(len(weight) - is_rcnn):
        weight[(row, slice(None), *centre)] = direction
    layer.weight.copy_(weight + 0.02 * weight.std() * torch.randn_like(weight))
    # Scores should be neither all 0 nor all 1.
    layer.bias.zero_()
    layer.bias[: len(weight) - is_rcnn] = -(inputs @ direction).mean() - 1


def _run(model, layer, images):
    """Return the inputs (rows of channels) and outputs of a layer over images."""
    inputs, outputs = [], []

    def keep(_module, given, output):
        x = given[0]
        inputs.append(x.movedim(1, -1).flatten(0, -2) if x.dim() == 4 else x)
        outputs.append(output.flatten())

    hook = layer.register_forward_hook(keep)
    for image in images:
        detect(model, image)
    hook.remove()
    return torch.cat(inputs), torch.cat(outputs)


def _set_threshold(model, value):
    if hasattr(model, "head"):
        model.test_score_thresh = value
        return
    predictors = model.roi_heads.box_predictor
    for predictor in predictors if isinstance(predictors, nn.ModuleList) else [predictors]:
        predictor.test_score_thresh = value
