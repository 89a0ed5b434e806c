# Copyright (c) The mokd_det authors.
"""tools/run_exported.py with TorchScript files of torchvision's detectors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.models.detection.ssd import SSD

from mokd_det.export import ExportOptions
from mokd_det.modeling import detector_names
from mokd_det.tasks import task_of

from ..conftest import ROOT
from ..modeling.families import annotated, family_cfg
from ..modeling.torchvision_models import NODE, random_detector, thresholds, torchvision_cfg
from .fresh import load_script
from .models import TILE, tile

__all__ = ["annotated", "family_cfg", "torchvision_cfg"]
# Slow, and for ONNX as SSDlite and Mask R-CNN v2 are, or with heatmaps that take a minute.
LEFT_OUT = ("keypointrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "ssd300_vgg16")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ssdlite320_mobilenet_v3_large", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"]
)
def test_run_exported_finds_what_the_model_does(torchvision_cfg, name, tmp_path):
    cfg = torchvision_cfg(name, thresholds(name), [f"{NODE}.DOWNLOAD", False])
    model = random_detector(cfg).eval().requires_grad_(False)
    exporter, path = task_of(cfg).exporter(cfg), str(tmp_path / "model.ts")
    image = Image.open(TILE).convert("RGB")
    options = ExportOptions("torchscript", "scripting")
    tensor = exporter.to_tensor(np.asarray(image))
    assert exporter.write(model, [tensor], path, exporter.metadata(model), options)["passed"]
    tool = load_script(ROOT / "tools/run_exported.py")
    found = tool.detect(*tool.load(path, "cpu"), image, "cpu")
    expected = model([{"image": tensor}])[0]["instances"]
    assert len(expected) and torch.equal(found["classes"], expected.pred_classes)
    assert torch.equal(found["boxes"], expected.pred_boxes.tensor)
    for kind in ("masks", "keypoints"):
        if expected.has(f"pred_{kind}"):
            assert torch.equal(found[kind], expected.get(f"pred_{kind}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in detector_names() if n not in LEFT_OUT])
def test_onnx(torchvision_cfg, name, tmp_path):
    """Parity at several sizes, also those at which float32 would resize to a pixel less."""
    pytest.importorskip("onnxruntime")
    cfg = torchvision_cfg(name, thresholds(name))
    model = random_detector(cfg).eval().requires_grad_(False)
    pictures = [tile("0.jpg", (133, 101)), tile("1.jpg", (150, 110))]
    spread_scores(model, pictures)
    exporter, path = task_of(cfg).exporter(cfg), str(tmp_path / "model.onnx")
    options = ExportOptions("onnx", tolerance=0.005)
    result = exporter.write(model, pictures, path, exporter.metadata(model), options)
    assert result["passed"] and result["detections"], str(result)


@torch.no_grad()
def spread_scores(model, photos):
    """
    Make random weights say something different everywhere: onnxruntime's last digits decide between
    equal scores. An image of one colour, where all are equal, scores below the threshold if photos
    score above it.
    """
    network = model.network
    for norm in (m for m in network.backbone.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None  # the mean over all batches
        norm.reset_running_stats()
        norm.train()
    images = torch.stack([F.interpolate(p[None].float(), (320, 320))[0] for p in photos])
    network.backbone(model.preprocess_image([{"image": image} for image in images]).tensor)
    model.eval()
    for layer in _classifiers(network):
        outputs = []
        hook = layer.register_forward_hook(lambda _m, _i, x, outputs=outputs: outputs.append(x))
        for photo in photos:
            model([{"image": photo}])
        hook.remove()
        layer.weight.mul_(2 / torch.cat([x.flatten() for x in outputs]).std())

    def scores(image):
        return [0.0, *model([{"image": image}])[0]["instances"].scores.tolist()]

    heads = getattr(network, "roi_heads", network)
    weakest = min(max(scores(photo)) for photo in photos)
    strongest = max(max(scores(torch.full_like(photo, 114))) for photo in photos)
    heads.score_thresh = min((weakest + strongest) / 2, 0.99 * weakest)


def _classifiers(network):
    """The last layers of what says classes, the RPN's first."""
    if isinstance(network, SSD):
        levels = network.head.classification_head.module_list
        return [m if isinstance(m, nn.Conv2d) else m[-1] for m in levels]
    named = dict(network.named_modules())
    return [m for n, m in named.items() if n.endswith(("cls_score", "cls_logits"))]


@pytest.mark.bad_input
def test_tracing_is_refused(torchvision_cfg):
    cfg = torchvision_cfg("ssdlite320_mobilenet_v3_large")
    options = ExportOptions("torchscript", "tracing")
    with pytest.raises(ValueError, match="^--method tracing is not for torchvision's detectors"):
        task_of(cfg).exporter(cfg).check(random_detector(cfg), options)
