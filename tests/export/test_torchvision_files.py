# Copyright (c) The mokd_det authors.
"""tools/run_exported.py with TorchScript files of torchvision's detectors."""

import numpy as np
import pytest
import torch
from PIL import Image

from mokd_det.export import ExportOptions
from mokd_det.tasks import task_of

from ..conftest import ROOT
from ..modeling.families import annotated, family_cfg
from ..modeling.torchvision_models import NODE, random_detector, thresholds, torchvision_cfg
from .fresh import load_script
from .models import TILE

__all__ = ["annotated", "family_cfg", "torchvision_cfg"]


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
@pytest.mark.parametrize(
    "name",
    ["ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn"],
)
def test_onnx(torchvision_cfg, name, tmp_path):
    """Parity at several sizes, also those at which float32 would resize to a pixel less."""
    pytest.importorskip("onnxruntime")
    cfg = torchvision_cfg(name, thresholds(name))
    model = random_detector(cfg).eval().requires_grad_(False)
    exporter, path = task_of(cfg).exporter(cfg), str(tmp_path / "model.onnx")
    pictures = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((101, 133),)]
    pictures.append(exporter.to_tensor(np.asarray(Image.open(TILE).convert("RGB"))))
    options = ExportOptions("onnx", "tracing")
    result = exporter.write(model, pictures, path, exporter.metadata(model), options)
    assert result["passed"] and result["detections"], str(result)
