# Copyright (c) The mokd_det authors.
"""Every family by every method, in a process without Detectron2."""

import cv2
import pytest
import torch
from detectron2.engine import DefaultPredictor

from mokd_det.export.detector import detect, detect_batch

from ..conftest import TREES
from ..data.annotated import annotate
from .models import ALL, TILE, blank_like, detector, export, load, three_sizes

# Why a family cannot be scripted; all else can.
REFUSED = {
    ("cascade_rcnn", "scripting"): "CascadeROIHeads lacks",
    ("panoptic_fpn", "scripting"): "semantic head hold functions",
    ("faster_rcnn_C4", "scripting"): "Res5ROIHeads without masks",
    ("retinanet_BN", "scripting"): "normalisation per level",
    ("fcos", "scripting"): "lists of its Python config",
}
EXTRA = {
    "mask_rcnn": {"masks"},
    "mask_rcnn_C4": {"masks"},
    "keypoint_rcnn": {"keypoints"},
    "panoptic_fpn": {"masks", "sem_seg"},
}


@pytest.fixture(scope="session")
def keypoint_opts(tmp_path_factory):
    """Overrides for a data set with keypoints."""
    folder = tmp_path_factory.mktemp("keypoints")
    annotate(TREES / "val.json", folder / "coco.json", TREES / "val")
    sets = [["tests_export_keypoints", str(folder / "coco.json"), str(TREES / "val")]]
    names = ("tests_export_keypoints",)
    return ["DATASETS.COCO", sets, "DATASETS.TRAIN", names, "DATASETS.TEST", names]


def inputs_of(model):
    """Three sizes, and an image without detections."""
    photos = three_sizes()
    return [*photos, blank_like(model, photos[1])]


def predicted(cfg):
    """What Detectron2's own predictor finds in a photo, in the photo's pixels."""
    instances = DefaultPredictor(cfg)(cv2.imread(str(TILE)))["instances"]
    outputs = {"boxes": instances.pred_boxes.tensor, "scores": instances.scores}
    outputs["classes"] = instances.pred_classes
    for name in ("masks", "keypoints"):
        if instances.has(f"pred_{name}"):
            outputs[name] = instances.get(f"pred_{name}")
    return outputs


def exported(family, methods, folder, cases, opts=()):
    """
    Export a family, and write the cases for fresh.py.

    Returns:
        dict: name of the case -> what the export returns.
    """
    cfg = detector(family, folder, opts)
    model = load(cfg)
    inputs = inputs_of(model)
    outputs = [detect(model, image) for image in inputs]
    # Otherwise what follows would show nothing.
    assert [len(o["scores"]) > 0 for o in outputs] == [True, True, True, False], family
    case = {"inputs": inputs, "outputs": outputs}
    case.update({"picture": str(TILE), "predictor": predicted(cfg)})
    results = {}
    for method in methods:
        name = f"{family}-{method}"
        arguments = (cfg, folder / name, "torchscript", method, [str(TILE)])
        if (family, method) in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[family, method]):
                export(*arguments)
            assert not (folder / name).exists()
            continue
        results[name] = export(*arguments)
        case["file"] = results[name]["file"]
        if method == "scripting":
            case["batch"] = detect_batch(model, inputs[:2])
        torch.save(case, cases / f"{name}.pt")
    return results


def check(results, fresh):
    """That files return in another process what their models return in this one."""
    assert set(fresh) == set(results)
    for name, found in fresh.items():
        parity = results[name]["parity"]
        assert parity["passed"] and parity["without_detections"], name
        assert parity["detections"] > 0 and len(parity["sizes"]) == 4, name
        family = name.split("-")[0]
        expected = {"boxes", "scores", "classes", *EXTRA.get(family, ())}
        for part in [*found["outputs"], *found.get("batch", [])]:
            assert set(part) == expected and max(part.values()) < 1e-4, (name, part)
        assert ("batch" in found) == name.endswith("scripting")
        # Resized and scaled back: float32 rounds otherwise at other scales.
        assert set(found["predictor"]) == expected - {"sem_seg"}, name
        assert max(found["predictor"].values()) < 1e-3, (name, found["predictor"])
        assert set(found["metadata"]["outputs"]) == expected


@pytest.fixture
def cases(tmp_path):
    (tmp_path / "cases").mkdir()
    return tmp_path / "cases"


def test_an_rcnn_traced_and_a_retinanet_scripted(tmp_path, cases, run_fresh):
    results = exported("faster_rcnn", ["tracing"], tmp_path, cases)
    results |= exported("retinanet", ["scripting"], tmp_path, cases)
    check(results, run_fresh(cases))


@pytest.mark.slow
def test_every_family_by_every_method(tmp_path, cases, keypoint_opts, run_fresh):
    results = {}
    for family in ALL:
        opts = keypoint_opts if family == "keypoint_rcnn" else ()
        results |= exported(family, ["tracing", "scripting"], tmp_path, cases, opts)
    assert len(results) == 2 * len(ALL) - len(REFUSED)
    check(results, run_fresh(cases))
