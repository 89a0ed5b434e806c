# Copyright (c) The mokd_det authors.
"""Classifiers, in a process without Detectron2."""

import pytest
import torch

from mokd_det.config import load_config, merge_overrides
from mokd_det.modeling import Classifier

from ..conftest import DIGIT_OPTS, ROOT
from .models import export, load

# Network -> whether it takes other sizes than that of its training.
NETWORKS = {"shufflenet_v2_x0_5": True, "mobilenet_v3_small": True, "vit_tiny_16": False}


def classifier(name, folder):
    """Return the config of a random network with BatchNorm statistics, weights in ``folder``."""
    cfg = load_config(str(ROOT / "configs/Digits/student_scratch.yaml"), DIGIT_OPTS)
    merge_overrides(cfg, ["MODEL.CLASSIFIER.NAME", name])
    if name.startswith("vit"):
        merge_overrides(cfg, ["MODEL.CLASSIFIER.OPTIONS", {"image_size": 32}])
    model = Classifier(cfg)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = None
            norm.reset_running_stats()
    size = 32 if name.startswith("vit") else 64  # no map of a single pixel
    model.network(model.preprocess(255 * torch.rand(16, 3, size, size)))
    if name.startswith("vit"):  # which starts with a head of zeros
        torch.nn.init.normal_(model.network.heads.head.weight, std=0.1)
    cfg.MODEL.WEIGHTS = str(folder / f"{name}.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    return cfg


@torch.no_grad()
def logits(model, images):
    return model.network(model.preprocess(images.float()))


@pytest.mark.slow
def test_networks_by_both_methods(tmp_path, run_fresh):
    cases = tmp_path / "cases"
    cases.mkdir()
    for name, any_size in NETWORKS.items():
        cfg = classifier(name, tmp_path)
        model = load(cfg)
        sizes = [(3, 32), (1, 32), *([(2, 48), (1, 57)] if any_size else [])]
        inputs = [torch.randint(0, 256, (n, 3, s, s), dtype=torch.uint8) for n, s in sizes]
        inputs[1] = inputs[1].float()
        outputs = [{"logits": logits(model, x)} for x in inputs]
        assert outputs[0]["logits"].std() > 1e-3  # the network tells images apart
        for method in ("tracing", "scripting"):
            result = export(cfg, tmp_path / f"{name}-{method}", method=method)
            assert result["parity"]["passed"], result["parity"]
            assert result["images"] == "the first 3 of DATASETS.TEST 'tests_digits_val'"
            assert result["metadata"]["image_size"] == ("any" if any_size else 32)
            assert result["metadata"]["class_names"] == [str(i) for i in range(10)]
            case = {"inputs": inputs, "outputs": outputs, "file": result["file"]}
            torch.save(case, cases / f"{name}-{method}.pt")
    fresh = run_fresh(cases)
    assert len(fresh) == 2 * len(NETWORKS)
    for name, found in fresh.items():
        assert all(part["logits"] < 1e-4 for part in found["outputs"]), (name, found["outputs"])
        assert found["metadata"]["task"] == "classification"


def test_half_and_freeze(tmp_path):
    cfg = classifier("shufflenet_v2_x0_5", tmp_path)
    plain = export(cfg, tmp_path / "plain")
    half = export(cfg, tmp_path / "half", half=True)
    frozen = export(cfg, tmp_path / "frozen", freeze=True)
    assert half["bytes"] < 0.7 * plain["bytes"]
    assert all(result["parity"]["passed"] for result in (plain, half, frozen))
    assert 0 < half["parity"]["float32"]["max_outputs_difference"] < 0.1
    # Its weights are constants now.
    assert list(torch.jit.load(plain["file"]).parameters())
    assert not list(torch.jit.load(frozen["file"]).parameters())


@pytest.mark.slow
def test_torch_export(tmp_path):
    cfg = classifier("shufflenet_v2_x0_5", tmp_path)
    result = export(cfg, tmp_path / "out", "torch_export")
    assert result["parity"]["passed"] and result["metadata"]["image_size"] == 32
    images = torch.rand(5, 3, 32, 32) * 255
    program = torch.export.load(result["file"]).module()
    torch.testing.assert_close(program(images), logits(load(cfg), images))


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "vit_tiny_16"])
def test_onnx(tmp_path, name):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    cfg = classifier(name, tmp_path)
    result = export(cfg, tmp_path / "out", "onnx")
    assert result["parity"]["passed"], result["parity"]
    images = torch.rand(5, 3, 32, 32) * 255
    session = onnxruntime.InferenceSession(result["file"], providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(found, logits(load(cfg), images), atol=1e-4, rtol=1e-4)
    assert "metadata.json" in session.get_modelmeta().custom_metadata_map


def test_networks_that_cannot_be_scripted_are_refused(tmp_path):
    cfg = classifier("googlenet", tmp_path)
    with pytest.raises(ValueError, match="--method scripting: TorchScript cannot compile"):
        export(cfg, tmp_path / "out", method="scripting")
    assert not (tmp_path / "out" / "export.json").exists()
