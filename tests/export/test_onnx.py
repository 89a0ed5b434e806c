# Copyright (c) The mokd_det authors.
"""ONNX files where order and rounding matter: equal scores, and many boxes of several classes."""

import json

import pytest
import torch
from torch import nn
from torchvision.ops import boxes as box_ops

from mokd_det.export.detector import detect
from mokd_det.export.parity import compare_detections
from mokd_det.export.ties import StableSorting

from .models import TILE, detector, export, load, three_sizes

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")


@pytest.mark.parametrize("shape", [(7,), (40,), (3000,), (2, 500)])
@pytest.mark.parametrize("descending", [True, False])
def test_equal_values_stay_in_order(shape, descending):
    x = torch.randint(3, shape, generator=torch.Generator().manual_seed(0)).float()
    wanted = torch.sort(x, dim=-1, descending=descending, stable=True)
    with StableSorting():
        for got in (
            x.sort(descending=descending),
            x.sort(-1, descending),
            torch.sort(x, descending=descending),
            x.topk(shape[-1], largest=descending),
        ):
            assert all(map(torch.equal, got, wanted))
        top = torch.topk(x, 2, 0)
    assert torch.equal(top[1], torch.sort(x, dim=0, descending=True, stable=True)[1][:2])


class NMS(nn.Module):
    def forward(self, boxes, scores, classes):
        return box_ops.batched_nms(boxes, scores, classes, 0.5)


def many_boxes(count, classes, seed):
    """Boxes around 60 places, of a photo of 1333 pixels."""
    generator = torch.Generator().manual_seed(seed)
    places = 900 * torch.rand(60, 4, generator=generator)
    places[:, 2:] = 0.4 * places[:, 2:] + 10
    at = torch.randint(60, (count,), generator=generator)
    x = places[at] * (1 + 0.1 * torch.randn(count, 4, generator=generator))
    boxes = torch.cat([x[:, :2], x[:, :2] + x[:, 2:]], 1).clamp(0, 1333)
    scores = torch.randint(count // 2 + 1, (count,), generator=generator) / (count + 1)
    return boxes, scores, at * 7 % classes


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Of the file of an NMS, written as a detector is."""
    from mokd_det.export.onnx_nms import onnx_nms

    path = str(tmp_path_factory.mktemp("nms") / "nms.onnx")
    names = ["boxes", "scores", "classes"]
    with onnx_nms():
        torch.onnx.export(
            NMS(),
            many_boxes(20, 3, 0),
            path,
            input_names=names,
            output_names=["kept"],
            dynamic_axes={name: {0: "n"} for name in names} | {"kept": {0: "kept"}},
            opset_version=17,
            dynamo=False,
        )
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [0, 1, 2, 300, 1000, 1001, 4500])
@pytest.mark.parametrize("classes", [1, 5, 80])
def test_nms_is_torchvisions(session, count, classes, seed):
    inputs = many_boxes(count, classes, seed)
    with StableSorting():
        wanted = box_ops.batched_nms(*inputs, 0.5)
    names = [x.name for x in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, (x.numpy() for x in inputs))))
    assert torch.equal(wanted, torch.from_numpy(found))


def test_one_rounding_for_all_would_differ():
    """Else the test above would prove nothing of the boxes above 1,000."""
    inputs = [many_boxes(4500, 80, seed) for seed in range(20)]
    ways = box_ops._batched_nms_vanilla, box_ops._batched_nms_coordinate_trick
    with StableSorting():
        kept = [[way(*x, 0.5).tolist() for x in inputs] for way in ways]
    assert kept[0] != kept[1]


@pytest.mark.parametrize(
    "family", ["faster_rcnn", pytest.param("retinanet", marks=pytest.mark.slow)]
)
def test_equal_scores_change_nothing(tmp_path, family):
    """All anchors of an RPN, or half of a RetinaNet's classifier, have the same score."""
    cfg = detector(family, tmp_path)
    model = load(cfg)
    with torch.no_grad():
        if family == "faster_rcnn":
            model.proposal_generator.rpn_head.objectness_logits.weight.zero_()
        else:
            model.head.cls_score.weight[::2] = 0
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    result = export(cfg, tmp_path / "out", "onnx", images=[str(TILE)])
    assert result["parity"]["passed"] and result["parity"]["detections"] > 10
    written = json.loads((tmp_path / "out" / "export.json").read_text())
    if "ties" in written["parity"]:  # where torch's sort is not stable
        assert written["parity"]["ties"]["unmatched"] >= 0
    from mokd_det.export.onnx import load_onnx

    run = load_onnx(result["file"])
    for image in three_sizes():
        with StableSorting():
            wanted = detect(model, image)
        differences = compare_detections(wanted, run(image))
        assert differences.pop("unmatched") == 0 and max(differences.values()) < 1e-2
