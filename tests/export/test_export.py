# Copyright (c) The mokd_det authors.
"""Formats, options, comparison, metadata and errors, on one detector of each kind."""

import hashlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

import mokd_det
from mokd_det.config import get_cfg, load_config
from mokd_det.export import (
    ExportOptions,
    benchmark,
    check_benchmark,
    check_options,
    export_checkpoint,
    format_benchmark,
)
from mokd_det.export.detector import check_tracing, detect, paste_masks
from mokd_det.export.images import read_images, sized
from mokd_det.export.parity import compare_detections, parity
from mokd_det.export.torchscript import _scripted_nms, load_torchscript, save_torchscript
from mokd_det.tasks import task_of

from ..conftest import CONFIGS, ROOT
from .models import TILE, TORCHVISION, detector, export, load, three_sizes, tile

IMAGES = [str(TILE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def rcnn(folder):
    return detector("faster_rcnn", folder)


@pytest.fixture(scope="module")
def retinanet(folder):
    return detector("retinanet", folder)


def test_checkpoint_needs_no_pretrained_weights(tmp_path):
    """Its own are in the file: what the backbone started from may be gone, or not to be had."""
    opts = ["MODEL.DEVICE", "cpu", "MODEL.TORCHVISION.WEIGHTS"]
    cfg = load_config("configs/Quick-Start/teacher.yaml", [*opts, ""])
    model = build_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "trained.pth")
    opts += ["not/there.pth", "MODEL.WEIGHTS", str(tmp_path / "trained.pth")]
    cfg = load_config("configs/Quick-Start/teacher.yaml", opts)
    written = export_checkpoint(task_of(cfg), cfg, str(tmp_path / "out"))
    cfg = get_cfg()
    cfg.merge_from_file(written["config"])
    again = build_model(cfg)
    DetectionCheckpointer(again).load(cfg.MODEL.WEIGHTS)
    assert all(x.equal(again.state_dict()[name]) for name, x in model.state_dict().items())


def test_checkpoint_is_not_exported_into_its_run(rcnn, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    (tmp_path / "config.yaml").write_text("the run's")
    with pytest.raises(ValueError, match="--output is .*the OUTPUT_DIR of a run.*choose another"):
        export(rcnn, str(tmp_path), "checkpoint")
    assert {p.name for p in tmp_path.iterdir()} == {"last_checkpoint", "config.yaml"}
    assert (tmp_path / "config.yaml").read_text() == "the run's"


@pytest.mark.slow
@pytest.mark.parametrize("name, method", [("rcnn", "scripting"), ("retinanet", "tracing")])
def test_half_and_freeze(request, tmp_path, name, method):
    cfg = request.getfixturevalue(name)
    plain, frozen, half = (
        export(cfg, tmp_path / str(i), method=method, images=IMAGES, **options)
        for i, options in enumerate([{}, {"freeze": True}, {"half": True}])
    )
    assert all(result["parity"]["passed"] for result in (plain, frozen, half))
    assert half["bytes"] < 0.85 * plain["bytes"]
    against = half["parity"]["float32"]
    # Large for a detector: these were made to be steep.
    assert 0 < against["max_scores_difference"] < 0.3
    module, metadata = load_torchscript(half["file"])
    assert module(tile())["boxes"].dtype == torch.float32
    assert metadata == half["metadata"]


@pytest.mark.parametrize("name", ["rcnn", pytest.param("retinanet", marks=pytest.mark.slow)])
def test_onnx(request, tmp_path, name):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from mokd_det.export.onnx import load_onnx

    cfg = request.getfixturevalue(name)
    result = export(cfg, tmp_path, "onnx", images=IMAGES)
    assert result["parity"]["passed"] and result["parity"]["without_detections"]
    model, run = load(cfg), load_onnx(result["file"])
    for image in three_sizes():
        differences = compare_detections(detect(model, image), run(image))
        assert differences.pop("unmatched") == 0 and max(differences.values()) < 1e-2


def test_onnx_refuses_keypoints(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from mokd_det.export.onnx import check_onnx

    from ..modeling.families import FAMILIES

    cfg = load_config(str(ROOT / CONFIGS["faster_rcnn"]), FAMILIES["keypoint_rcnn"])
    with pytest.raises(ValueError, match="--format onnx: Keypoint R-CNN.*--format torchscript"):
        check_onnx(build_model(cfg))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rcnn", "retinanet"])
def test_torch_export(request, tmp_path, name):
    cfg = request.getfixturevalue(name)
    result = export(cfg, tmp_path, "torch_export", images=IMAGES)
    assert result["parity"]["passed"] and "detections" not in result["parity"]
    model, program = load(cfg), torch.export.load(result["file"]).module()
    images = torch.rand(1, 3, 192, 288) * 255
    with torch.no_grad():
        features = model.backbone((images - model.pixel_mean) / model.pixel_std)
        found = program(images)
    assert set(found["features"]) == set(features) and len(found["head"]) == 2
    assert all(torch.allclose(found["features"][k], features[k], atol=1e-5) for k in features)


def test_metadata_says_what_the_archive_needs(rcnn, tmp_path):
    result = export(rcnn, tmp_path, images=IMAGES)
    assert json.loads((tmp_path / "export.json").read_text()) == json.loads(json.dumps(result))
    module, metadata = load_torchscript(result["file"])
    assert metadata["task"] == "detection" and metadata["class_names"] == ["Tree"]
    assert metadata["score_threshold"] == pytest.approx(rcnn.MODEL.ROI_HEADS.SCORE_THRESH_TEST)
    assert metadata["format"] == "BGR" and metadata["traced_on"] == "cpu"
    assert metadata["pixel_mean"] == pytest.approx(rcnn.MODEL.PIXEL_MEAN)
    assert metadata["pixel_std"] == pytest.approx(rcnn.MODEL.PIXEL_STD)
    assert metadata["resize"]["short_edge"] == 224 and metadata["resize"]["longest_edge"] == 260
    assert metadata["versions"]["mokd_det"] == mokd_det.__version__
    assert set(metadata["versions"]) == {"mokd_det", "detectron2", "torch", "torchvision"}
    weights = Path(rcnn.MODEL.WEIGHTS).read_bytes()
    assert metadata["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    other = rcnn.clone()
    other.INPUT.MIN_SIZE_TEST = 200
    again = task_of(other).exporter(other).metadata(load(other))
    assert again["config_sha256"] != metadata["config_sha256"]
    assert again["weights_sha256"] == metadata["weights_sha256"]
    image = tile()
    found, from_float = module(image), module(image.float())
    assert all(torch.equal(found[k], from_float[k]) for k in ("boxes", "scores", "classes"))
    assert found["classes"].dtype == torch.int64


def outputs(boxes, scores, classes=None):
    classes = classes or [0] * len(scores)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "scores": torch.tensor(scores),
        "classes": torch.tensor(classes, dtype=torch.long),
    }


def test_comparison_matches_by_class_and_place():
    mine = outputs([[0, 0, 10, 10], [50, 50, 70, 90]], [0.9, 0.8])
    swapped = outputs([[50, 50, 70, 90.5], [0, 0, 10, 10]], [0.8, 0.88])
    found = compare_detections(mine, swapped)
    assert found["unmatched"] == 0 and found["boxes"] == 0.5
    assert found["scores"] == pytest.approx(0.02)
    missing = compare_detections(mine, outputs([[0, 0, 10, 10]], [0.9]))
    assert missing["unmatched"] == 1 and missing["boxes"] == 0
    extra = compare_detections(outputs([], []), outputs([[0, 0, 10, 10]], [0.9]))
    assert extra["unmatched"] == 1
    other_class = outputs([[0, 0, 10, 10], [50, 50, 70, 90]], [0.9, 0.8], [0, 1])
    assert compare_detections(mine, other_class)["unmatched"] == 1
    nan = outputs([[0, 0, 10, 10], [50, 50, 70, 90]], [0.9, float("nan")])
    assert compare_detections(mine, nan)["scores"] == float("inf")


@pytest.mark.parametrize(
    "other, passed",
    [
        (outputs([[0, 0, 10, 10]], [0.9]), True),
        (outputs([[0, 0, 10, 10.009]], [0.9005]), True),
        (outputs([[0, 0, 10, 10.02]], [0.9]), False),
        (outputs([[0, 0, 10, 10]], [0.902]), False),
        (outputs([], []), False),
    ],
)
def test_tolerance(other, passed):
    mine = outputs([[0, 0, 10, 10]], [0.9])
    result = parity([mine], [other], [tile()], 1e-3, compare_detections)
    assert result["passed"] is passed and not result["without_detections"]


def test_no_detection_at_all_is_no_comparison():
    empty = outputs([], [])
    result = parity([empty], [empty], [tile()], 1e-3, compare_detections)
    assert not result["passed"] and result["detections"] == 0


def test_images_to_compare_on(rcnn):
    images, source = read_images(rcnn, count=2)
    assert len(images) == 2 and images[0].shape[2] == 3  # registered by an earlier export or not
    assert "tests_trees_val" in source or "RANDOM" in source
    with pytest.raises(FileNotFoundError, match="--images 'none.jpg' does not exist"):
        read_images(rcnn, ["none.jpg"])
    cfg = rcnn.clone()
    cfg.DATASETS.TEST = ()
    assert "RANDOM" in read_images(cfg)[1]
    shapes = {tuple(sized(tile(), scale).shape) for scale in (1, 0.75, 0.5)}
    assert len(shapes) == 3


def test_pasted_masks_are_where_their_boxes_are():
    masks = torch.zeros(2, 28, 28)
    masks[0, :, 14:] = 1  # the right half
    masks[1] = 1
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0], [0.0, 0.0, 5.0, 5.0]])
    pasted = paste_masks(masks, boxes, 50, 60)
    assert pasted.shape == (2, 50, 60) and pasted[0, 20:40, 20:30].all()
    assert pasted[0].sum() == 200 and pasted[1].sum() == 25


def test_wrong_weights_are_errors_before_anything_is_written(rcnn, retinanet, tmp_path):
    cfg = rcnn.clone()
    cfg.MODEL.WEIGHTS = retinanet.MODEL.WEIGHTS  # of another student
    with pytest.raises(ValueError, match="MODEL.WEIGHTS.*does not fit the model of its config"):
        export(cfg, tmp_path / "out", images=IMAGES)
    cfg = rcnn.clone()
    cfg.MODEL.FPN.OUT_CHANNELS = 32  # another config
    with pytest.raises(ValueError, match="of another shape: backbone.fpn_lateral"):
        export(cfg, tmp_path / "out", images=IMAGES)
    cfg.MODEL.WEIGHTS = ""
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        export(cfg, tmp_path / "out", images=IMAGES)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"format": "tflite"}, "--format is 'tflite': expected one of torchscript, onnx"),
        ({"format": "onnx", "method": "compiling"}, "--method is 'compiling': expected one of"),
        ({"format": "onnx", "method": "scripting"}, "is for --format torchscript: onnx is made"),
        ({"format": "checkpoint", "half": True}, "--half is for --format torchscript, not for"),
        ({"format": "torchscript", "half": True, "freeze": True}, "--half and --freeze exclude"),
        ({"format": "onnx", "freeze": True}, "--freeze is for --format torchscript, not for"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        check_options(**options)


def test_models_that_cannot_be_deployed_are_refused(tmp_path):
    opts = ["MODEL.META_ARCHITECTURE", "ProposalNetwork"]
    cfg = load_config(str(ROOT / CONFIGS["faster_rcnn"]), opts)
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    with pytest.raises(ValueError, match="'ProposalNetwork'.*--format checkpoint"):
        export(cfg, tmp_path / "out", images=IMAGES)


def test_windows_of_swin_cannot_be_traced():
    opts = [*TORCHVISION, "swin_t", "MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone"]
    model = build_model(load_config(str(ROOT / CONFIGS["faster_rcnn"]), opts))
    with pytest.raises(ValueError, match="Swin.*--method scripting"):
        check_tracing(model)


def test_half_where_an_operator_is_missing():
    from mokd_det.export.precision import check_half

    def missing():
        raise NotImplementedError("\"slow_conv3d\" not implemented for 'Half'")

    with pytest.raises(ValueError, match='--half: "slow_conv3d" not implemented.*Leave --half'):
        check_half(missing)

    def other():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        check_half(other)


@pytest.mark.slow
def test_benchmark_beside_the_teacher_and_from_scratch(folder, rcnn, tmp_path):
    teacher = detector("faster_rcnn_MobileNetV2", folder)
    (folder / "teacher.yaml").write_text(teacher.dump())
    cfg = rcnn.clone()
    cfg.MOKD.ENABLED = True
    cfg.MOKD.TEACHER.CONFIG_FILE = str(folder / "teacher.yaml")
    cfg.MOKD.TEACHER.WEIGHTS = teacher.MODEL.WEIGHTS
    task = task_of(cfg)
    check_benchmark(task, cfg, "torchscript")
    exported = export(cfg, tmp_path, images=IMAGES)
    result = benchmark(task, cfg, exported, str(tmp_path), ExportOptions(), IMAGES)
    assert result["bytes"]["teacher"] > 2 * result["bytes"]["student"]
    assert result["latency"]["teacher_ratio"] > 1
    scratch = result["scratch"]
    assert scratch["keys_equal"] and scratch["parameters"] == [971_712, 971_712]
    assert scratch["gflops"][0] == scratch["gflops"][1] > 0
    assert 0.5 < scratch["eager_scratch_ratio"] < 2  # the same code; other programs may disturb it
    text = format_benchmark(result)
    assert "state-dict keys and shapes: equal" in text and "| teacher / student |" in text
    cfg.MOKD.TEACHER.WEIGHTS = "gone.pth"
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        check_benchmark(task, cfg, "torchscript")
    with pytest.raises(ValueError, match="--benchmark times files of"):
        check_benchmark(task, cfg, "torch_export")


def run_tool(monkeypatch, path, *args):
    """Run a tool in this process: its exit code (or message)."""
    monkeypatch.setattr(sys, "argv", [path, *map(str, args)])
    try:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    except SystemExit as error:
        return error.code or 0
    return 0


def test_the_tools_on_the_command_line(rcnn, tmp_path, monkeypatch, capsys):
    """Export, use, and the exit code of a file that differs."""
    (tmp_path / "student.yaml").write_text(rcnn.dump())
    start = ["tools/export_model.py", "--config-file", tmp_path / "student.yaml"]
    start += ["--format", "torchscript", "--output", tmp_path / "out"]
    # Overrides follow --images, which takes several.
    end = ["--images", TILE, "MODEL.WEIGHTS", rcnn.MODEL.WEIGHTS]
    assert run_tool(monkeypatch, *start, *end) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = json.loads(lines[-1])
    assert printed["parity"]["passed"] and printed["images"] == str(TILE)
    assert any("max boxes difference" in line for line in lines)
    # sys.exit with a message is exit code 1.
    assert "DIFFERS" in run_tool(monkeypatch, *start, "--tolerance", "1e-12", "--freeze", *end)
    assert run_tool(monkeypatch, *start, "--method", "guessing", *end) == 2
    assert "invalid choice: 'guessing'" in capsys.readouterr().err
    assert run_tool(monkeypatch, *start, "--tolerance", "-1", *end) == 2
    error = capsys.readouterr().err
    assert "export_model.py: --tolerance is -1.0: expected a finite number > 0" in error
    with pytest.raises(ValueError, match="--tolerance is -1.0"):
        run_tool(monkeypatch, *start, "--debug", "--tolerance", "-1", *end)

    picture, model = tmp_path / "found.png", tmp_path / "out" / "model.ts"
    use = "tools/run_exported.py"
    capsys.readouterr()
    assert run_tool(monkeypatch, use, model, TILE, "--picture", picture) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["width"], found["height"]) == (192, 160) and picture.stat().st_size > 1000
    assert found["detections"] and set(found["detections"][0]) == {"box", "score", "class", "name"}
    with pytest.raises(ValueError, match="'none.jpg' does not exist"):
        run_tool(monkeypatch, use, model, "none.jpg", "--debug")


def test_a_trace_of_another_device_is_refused(tmp_path, monkeypatch):
    module = torch.jit.script(torch.nn.Identity())
    path = str(tmp_path / "model.ts")
    save_torchscript(module, path, {"traced_on": "cuda"})
    with pytest.raises(ValueError, match="traced on 'cuda' and cannot run on 'cpu': export it"):
        load_torchscript(path)
    with pytest.raises(ValueError, match="traced on 'cuda' and cannot run on 'cpu': give --device"):
        run_tool(monkeypatch, "tools/run_exported.py", path, TILE, "--debug")
    save_torchscript(module, path, {})
    assert load_torchscript(path)[1] == {}
    torch.jit.save(module, path)
    with pytest.raises(ValueError, match="has no metadata.json inside"):
        run_tool(monkeypatch, "tools/run_exported.py", path, TILE, "--debug")


def test_traced_nms_rounds_as_torchvision_does_for_many_boxes():
    generator = torch.Generator().manual_seed(0)

    def detections(count):
        corner = 900 * torch.rand(count, 2, generator=generator)
        size = 5 + 100 * torch.rand(count, 2, generator=generator)
        scores = torch.rand(count, generator=generator)
        classes = torch.randint(80, (count,), generator=generator)
        return torch.cat([corner, corner + size], 1), scores, classes

    class Suppress(torch.nn.Module):
        def forward(self, boxes, scores, classes):
            return torchvision.ops.boxes.batched_nms(boxes, scores, classes, 0.02)

    few, many = detections(50), detections(8000)
    expected = torchvision.ops.batched_nms(*many, 0.02)
    plain = torch.jit.trace(Suppress(), few)
    assert not torch.equal(plain(*many), expected)  # else nothing would be tested
    with _scripted_nms():
        traced = torch.jit.trace(Suppress(), few)
    assert torch.equal(traced(*many), expected)
    assert torch.equal(traced(*few), torchvision.ops.batched_nms(*few, 0.02))
