# Copyright (c) The mokd_det authors.
"""torchvision's detectors are trained, evaluated and saved as torchvision's own code does it."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import torchvision
from detectron2.data import MetadataCatalog
from PIL import Image
from torch import nn
from torchvision.models import get_model
from torchvision.transforms.functional import to_tensor

from mokd_det.config import load_config
from mokd_det.engine import DistillationTrainer, prepare_datasets, validate
from mokd_det.modeling import TorchvisionDetector, detector_names, torchvision_networks
from mokd_det.modeling.torchvision_networks import COCO_LABELS, COCO_NAMES
from mokd_det.tasks import task_of

from ..conftest import CONFIGS, OUTPUTS, ROOT, TREES
from ..engine.helpers import train, train_and_stop
from ..export.models import export
from .families import saved_teacher, step
from .torchvision_models import NODE, build, models, published, random_detector, thresholds
from .torchvision_models import torchvision_cfg, training_batch

__all__ = ["published", "torchvision_cfg"]
SSDLITE, MOBILE = "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.mark.parametrize("name", models())
def test_a_training_step_is_torchvisions(torchvision_cfg, name):
    """Losses and gradients of its own training loop, bit for bit."""
    cfg = torchvision_cfg(name)
    model, batch = random_detector(cfg).train(), training_batch(cfg)
    plain = copy.deepcopy(model.network)
    images = [x["image"] / 255 for x in batch]
    targets = []
    for instances in (x["instances"] for x in batch):
        target = {"boxes": instances.gt_boxes.tensor, "labels": instances.gt_classes + 1}
        if cfg.MODEL.MASK_ON:
            size = instances.image_size
            masks = [instances.gt_masks[i] for i in range(len(instances))]
            target["masks"] = torch.stack(
                [torch.from_numpy(_mask(polygons, size)) for polygons in masks]
            )
        if cfg.MODEL.KEYPOINT_ON:
            # Of pixels, as in COCO's files; Detectron2 has added half a pixel.
            target["keypoints"] = instances.gt_keypoints.tensor - torch.tensor([0.5, 0.5, 0])
        targets.append(target)
    torch.manual_seed(1)  # boxes are sampled
    losses = model(batch)
    sum(losses.values()).backward()
    torch.manual_seed(1)
    expected = plain(images, targets)
    sum(expected.values()).backward()
    assert [n.removeprefix("loss_") for n in losses] == [n.removeprefix("loss_") for n in expected]
    assert all(torch.equal(a, b) for a, b in zip(losses.values(), expected.values()))
    for ours, theirs in zip(model.network.parameters(), plain.parameters()):
        assert ours.grad is None if theirs.grad is None else torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(model.network.buffers(), plain.buffers()):
        assert torch.equal(ours, theirs)


def _mask(polygons, size):
    from detectron2.structures.masks import polygons_to_bitmask

    return polygons_to_bitmask(polygons.polygons[0], *size).astype("uint8")


@pytest.mark.parametrize("name", models(names=[SSDLITE, MOBILE, "retinanet_resnet50_fpn"]))
def test_what_a_teacher_sees_is_what_the_network_resizes(torchvision_cfg, name):
    """From a batch that was resized before, losses are the same but for rounding."""
    cfg = torchvision_cfg(name, opts=["INPUT.FORMAT", "BGR"])
    model, batch = random_detector(cfg).train(), training_batch(cfg)
    torch.manual_seed(1)
    losses = model(batch)
    prepared = model.prepare(batch)
    for before, after in zip(batch, prepared):
        height, width = after["image"].shape[1:]
        assert after["instances"].image_size == (height, width)
        scale = torch.tensor([width / before["image"].shape[2], height / before["image"].shape[1]])
        boxes = before["instances"].gt_boxes.tensor * scale.repeat(2)
        assert torch.allclose(after["instances"].gt_boxes.tensor, boxes, atol=1e-4)
        assert 0 <= after["image"].min() and after["image"].max() <= 255
    assert model.network.transform._skip_resize is False
    torch.manual_seed(1)
    again = model(prepared)
    # Which regions the second stage gets may change with the last digit.
    dense = [n for n in losses if n not in ("loss_classifier", "loss_box_reg")]
    assert all(torch.allclose(losses[n], again[n], rtol=2e-3) for n in dense)


@pytest.mark.parametrize("name", models())
def test_evaluation_is_torchvisions(torchvision_cfg, name):
    """Box by box, from the files: photos in their own size, in either order of channels."""
    cfg = torchvision_cfg(name, thresholds(name), ["INPUT.FORMAT", "BGR"])
    task, model = task_of(cfg), random_detector(cfg).eval()
    prepare_datasets(cfg, task)
    for batch in list(task.build_test_loader(cfg, cfg.DATASETS.TEST[0]))[:2]:
        with torch.no_grad():
            (found,) = model(batch)
            (expected,) = model.network([to_tensor(Image.open(batch[0]["file_name"]))])
        found = found["instances"]
        # Random sigmoids also find the background.
        kept = expected["labels"] > 0
        expected = {name: value[kept] for name, value in expected.items()}
        assert len(found) == len(expected["boxes"])
        # The channels are exchanged twice, and PIL's division by 255 rounds like ours.
        assert torch.equal(found.pred_boxes.tensor, expected["boxes"])
        assert torch.equal(found.scores, expected["scores"])
        assert torch.equal(found.pred_classes, expected["labels"] - 1)
        if cfg.MODEL.MASK_ON:
            assert torch.equal(found.pred_masks, expected["masks"][:, 0] >= 0.5)
        if cfg.MODEL.KEYPOINT_ON:
            assert torch.equal(found.pred_keypoints[..., :2], expected["keypoints"][..., :2] + 0.5)


OTHER = {SSDLITE: "faster_rcnn", MOBILE: "retinanet"}
STRICT = """
import importlib.util, json, sys
import torch, torchvision
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("detectron2", "mokd_det"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
path, name, options = sys.argv[1:]
model = torch.load(path, weights_only=True)["model"]
network = torchvision.models.get_model(
    name, weights=None, weights_backbone=None, num_classes=2, **json.loads(options)
)
network.load_state_dict(model, strict=True)
assert "mokd_det" not in sys.modules
"""


@pytest.mark.parametrize("name", models(quick=()))
def test_life_of_a_student(torchvision_cfg, make_cfg, tmp_path, name):
    """
    Two balanced steps under a teacher of another family, an exact resumption, evaluation, and files
    with parity; torchvision alone loads the checkpoint strictly.
    """
    teacher_cfg = make_cfg("retinanet" if "rcnn" in name else "faster_rcnn", folder="teacher")
    teacher = saved_teacher(teacher_cfg, random_detector(teacher_cfg), tmp_path)
    opts = [*teacher, "MOKD.ENABLED", True, *OUTPUTS, "SOLVER.MAX_ITER", 2]
    opts += ["SOLVER.BASE_LR", 1e-5]  # random weights still find something
    opts += ["SOLVER.CHECKPOINT_PERIOD", 1, "DATALOADER.NUM_WORKERS", 0, "MOKD.FEATURES.DIM", 16]
    runs = [torchvision_cfg(name, thresholds(name), opts, folder) for folder in ("whole", "parts")]
    for cfg in runs:
        prepare_datasets(cfg, validate(cfg))
    whole = train(runs[0])
    assert set(whole._last_eval_results) >= {"bbox"}
    train_and_stop(runs[1], 1)
    parts = train(runs[1], resume=True)
    first, second = (r.OUTPUT_DIR + "/model_final.pth" for r in runs)
    states = [torch.load(path, weights_only=False)["model"] for path in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert whole.iter == parts.iter

    options = json.dumps({"num_keypoints": 3} if cfg.MODEL.KEYPOINT_ON else {})
    command = [sys.executable, "-c", STRICT, first, name, options]
    subprocess.run(command, check=True, capture_output=True, text=True)

    cfg = runs[0].clone()
    cfg.MODEL.WEIGHTS, cfg.MOKD.ENABLED = first, False
    image = [str(TREES / "train" / "0.jpg")]
    result = export(cfg, tmp_path / "script", "torchscript", "", image)
    assert result["method"] == "scripting"
    result = result["parity"]
    assert result["passed"] and result["detections"], str(result)
    assert result["max_boxes_difference"] == 0


@pytest.mark.parametrize("name", models(quick=[SSDLITE]))
def test_as_teacher_of_another_family(torchvision_cfg, make_cfg, tmp_path, name):
    """Its features, its outputs, and its heads as readers of the student's features."""
    teacher_cfg = torchvision_cfg(name, folder="teacher")
    student = "retinanet" if "rcnn" in name else "faster_rcnn"
    objectives = ["features", "teacher_head", "outputs"]
    levels = ["MOKD.FEATURES.STUDENT", ["p5"], "MOKD.FEATURES.TEACHER", ["1"]]
    teacher = random_detector(teacher_cfg)
    opts = [*saved_teacher(teacher_cfg, teacher, tmp_path), *levels, "MOKD.FEATURES.DIM", 16]
    opts += ["MOKD.TEACHER.PROPOSALS", 16, "MOKD.OBJECTIVES", objectives]
    if name.startswith("ssd300"):  # its layers need that
        opts += ["INPUT.MIN_SIZE_TRAIN", (320,), "INPUT.MAX_SIZE_TRAIN", 320]
    cfg = make_cfg(student, opts)
    validate(cfg)
    model = DistillationTrainer.build_model(cfg)
    batch = training_batch(cfg)
    losses, decision = step(model, batch)
    assert list(losses) == ["task", *objectives]
    assert all(loss.isfinite() for parts in losses.values() for loss in parts.values())
    # Random heads of some models say the same of all features; features and outputs have gradients.
    assert (decision.gram.diagonal()[[0, 1, 3]] > 0).all()
    for ours, theirs in zip(model.teacher.model.network.buffers(), teacher.network.buffers()):
        assert torch.equal(ours, theirs)
    assert not any(p.requires_grad for p in model.teacher.model.parameters())


@pytest.mark.slow
@pytest.mark.bad_input
def test_ssd300_is_no_teacher_of_small_images(torchvision_cfg):
    model = random_detector(torchvision_cfg("ssd300_vgg16")).eval()
    with pytest.raises(ValueError, match="at least 300 pixels.*got 192 x 200"):
        model.preprocess_image([{"image": torch.rand(3, 192, 200)}])


def test_teacher_head_says_nothing_of_the_teachers_own_features(torchvision_cfg, tmp_path):
    """A student with the teacher's features, a projector that changes nothing: loss 0."""
    cfg = torchvision_cfg(MOBILE)
    teacher = random_detector(cfg)
    opts = [*saved_teacher(cfg, teacher, tmp_path), "MOKD.OBJECTIVES", ["teacher_head"]]
    opts += ["MOKD.TEACHER_HEAD.PROJECTOR", "none", "MOKD.TEACHER.PROPOSALS", 16]
    model = DistillationTrainer.build_model(torchvision_cfg(MOBILE, opts=opts))
    model.student.load_state_dict(teacher.state_dict())
    for module in model.student.modules():
        if isinstance(module, nn.BatchNorm2d):  # the teacher's statistics, in training as well
            module.forward = module.eval().forward
            module.train = lambda mode=True: None
    losses, _ = step(model, training_batch(cfg))
    assert losses["teacher_head"].keys() >= {"loss_teacher_head_rpn_cls"}
    assert all(abs(loss) < 1e-4 for loss in losses["teacher_head"].values()), losses


# ---- COCO's labels ------------------------------------------------------------------------------


class Perfect(nn.Module):
    """Finds what a list says, in torchvision's labels."""

    def __init__(self, answers):
        super().__init__()
        self.answers = iter(answers)

    def forward(self, images):
        return [next(self.answers) for _ in images]


def test_perfect_detections_of_cocos_classes_score_1(tmp_path):
    """A set in COCO's layout, its category ids with gaps: 91 labels are mapped to 80 classes."""
    size, categories = 64, [{"id": i, "name": n} for i, n in zip(COCO_LABELS, COCO_NAMES)]
    images, annotations = [], []
    for number, label in enumerate(COCO_LABELS, 1):
        name = f"{number}.png"
        Image.new("RGB", (size, size)).save(tmp_path / name)
        images.append({"id": number, "file_name": name, "width": size, "height": size})
        box = {"bbox": [4, 6, 20, 30], "area": 600, "iscrowd": 0}
        annotations.append({"id": number, "image_id": number, "category_id": label, **box})
    data = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "coco.json").write_text(json.dumps(data))
    name = "tests_coco_layout"
    opts = ["DATASETS.COCO", [[name, str(tmp_path / "coco.json"), str(tmp_path)]]]
    opts += ["DATASETS.TEST", (name,), "DATASETS.TRAIN", (), "OUTPUT_DIR", str(tmp_path)]
    opts += [f"{NODE}.NAME", SSDLITE, f"{NODE}.COCO_IDS", True, "MODEL.DEVICE", "cpu"]
    cfg = load_config("configs/Base-TorchvisionDetector.yaml", opts)
    task = task_of(cfg)
    prepare_datasets(cfg, task, is_training=False)
    perfect = [
        {
            # 12 is the label of no class: such a detection is left out.
            "boxes": torch.tensor([[4.0, 6.0, 24.0, 36.0], [0.0, 0.0, 9.0, 9.0]]),
            "scores": torch.tensor([0.9, 0.99]),
            "labels": torch.tensor([label, 12]),
        }
        for label in COCO_LABELS
    ]
    model = TorchvisionDetector(network=Perfect(perfect), labels=COCO_LABELS).eval()
    results = DistillationTrainer.test(cfg, model)
    assert results["bbox"]["AP"] == 100
    assert MetadataCatalog.get(name).thing_classes == COCO_NAMES


# ---- weights ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn_v2"])
def test_what_is_frozen_with_weights_is_torchvisions(published, monkeypatch, name):
    """BatchNorm, its epsilon, first layers; also where the values come from MODEL.WEIGHTS."""
    ours = build(name, WEIGHTS="DEFAULT", COCO_IDS=True)
    state = published(torchvision.models.get_model_weights(name).DEFAULT, "")
    with torchvision_networks._states(state):
        theirs = get_model(name, weights="DEFAULT")
    assert str(ours) == str(theirs)
    pairs = zip(ours.named_parameters(), theirs.named_parameters())
    for (key, a), (other, b) in pairs:
        assert key == other and a.requires_grad == b.requires_grad and torch.equal(a, b)
    kept = build(name, WEIGHTS="DEFAULT", COCO_IDS=True, DOWNLOAD=False)
    assert str(kept) == str(theirs)
    assert [p.requires_grad for p in kept.parameters()] == [
        p.requires_grad for p in theirs.parameters()
    ]


def test_other_classes_have_new_heads_on_the_published_weights(published, caplog):
    caplog.set_level("INFO")
    mine = build(SSDLITE, WEIGHTS="DEFAULT", NUM_CLASSES=3).state_dict()
    state = published(torchvision.models.get_model_weights(SSDLITE).DEFAULT, "")
    new = {key for key in mine if mine[key].shape != state[key].shape}
    assert new and all(key.startswith("head.classification_head") for key in new)
    assert all(torch.equal(mine[key], state[key]) for key in mine.keys() - new)
    assert "start random" in caplog.text


def test_a_file_of_the_published_name_is_the_published_weights(published, tmp_path):
    member = torchvision.models.get_model_weights(SSDLITE).DEFAULT
    path = tmp_path / member.url.rpartition("/")[2]
    torch.save(published(member, ""), path)
    mine = build(SSDLITE, WEIGHTS=str(path), COCO_IDS=True)
    theirs = build(SSDLITE, WEIGHTS="DEFAULT", COCO_IDS=True)
    assert str(mine) == str(theirs)
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters()))


def test_a_file_of_ones_own_training(published, tmp_path):
    """SSDlite has other layers if it began with the weights of a backbone."""
    path = tmp_path / "own.pth"
    for options in ({}, {"BACKBONE_WEIGHTS": "DEFAULT"}, {"WEIGHTS": "DEFAULT"}):
        own = build(SSDLITE, NUM_CLASSES=2, **options)
        torch.save(own.state_dict(), path)
        again = build(SSDLITE, NUM_CLASSES=2, WEIGHTS=str(path))
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), again.parameters()))


def test_weights_of_the_backbone_of_every_model(published, monkeypatch):
    """Also of those that torchvision builds without them unless it is told."""
    asked = []
    monkeypatch.setattr(
        torchvision_networks._Builder, "_make", lambda self, *args: asked.append(args[1])
    )
    for name in detector_names():
        torchvision_networks._Builder(name, {}, True)("", "DEFAULT", 2)
    assert len(asked) == 12 and all(weights.url for weights in asked)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options, message",
    [
        ({"NAME": "ssdlite320"}, "Did you mean 'ssdlite320_mobilenet_v3_large'"),
        (
            {"NAME": "x" * 30},
            "expected a detector of torchvision. No name is like it. It has fasterrcnn",
        ),
        ({"WEIGHTS": "COCO_V9"}, "neither a file nor one of"),
        ({"BACKBONE_WEIGHTS": "IMAGENET"}, "BACKBONE_WEIGHTS is 'IMAGENET': expected '' or one of"),
        ({"COCO_IDS": True, "NUM_CLASSES": 3}, "COCO_IDS is True, but NUM_CLASSES is 3"),
        ({"OPTIONS": {"sizes": 3}}, "OPTIONS {'sizes': 3} do not suit"),
        ({"OPTIONS": {"num_classes": 3}}, "OPTIONS has num_classes: that is set by"),
    ],
)
def test_bad_models(options, message):
    with pytest.raises(ValueError, match=message):
        build(
            **{"name": SSDLITE, **options} if "NAME" not in options else {"name": options["NAME"]}
        )


@pytest.mark.bad_input
def test_weights_of_another_model(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(build(MOBILE, NUM_CLASSES=1).state_dict(), path)
    with pytest.raises(ValueError, match=f"weights.pth' is not of {SSDLITE}"):
        build(SSDLITE, WEIGHTS=str(path), NUM_CLASSES=1)


@pytest.mark.bad_input
def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="cannot be downloaded.*copy it here as .*ssdlite"):
        build(SSDLITE, WEIGHTS="DEFAULT", COCO_IDS=True)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "opts, message",
    [
        (["INPUT.MIN_SIZE_TEST", 400], "INPUT.MIN_SIZE_TEST is 400, but torchvision's detectors"),
        (["MODEL.MASK_ON", True], "MODEL.MASK_ON is True, but .*NAME is 'ssdlite320"),
        (["INPUT.FORMAT", "L"], "INPUT.FORMAT is 'L': torchvision's detectors take"),
        ([f"{NODE}.NUM_CLASSES", 3], "NUM_CLASSES is 3, but 'tests_annotated_train'"),
    ],
)
def test_bad_configs(torchvision_cfg, opts, message):
    cfg = torchvision_cfg(SSDLITE, opts=opts)
    with pytest.raises(ValueError, match=message):
        task = validate(cfg)
        prepare_datasets(cfg, task)
        task.build_student(cfg)


@pytest.mark.bad_input
def test_a_teacher_by_name(make_cfg, published):
    """COCO's detector by name; both a name and a config, or an unknown name, is an error."""
    teacher = ["MOKD.TEACHER.CONFIG_FILE", "", "MOKD.TEACHER.WEIGHTS", "DEFAULT"]
    levels = ["MOKD.FEATURES.STUDENT", ["p5"], "MOKD.FEATURES.TEACHER", ["1"]]
    cfg = make_cfg("mokd", [*teacher, *levels, "MOKD.TEACHER.DETECTOR", SSDLITE])
    validate(cfg)
    built = task_of(cfg).build_teacher(cfg)
    assert built.model.labels == COCO_LABELS and built.input_format == "RGB"
    for opts, message in (
        (["MOKD.TEACHER.CONFIG_FILE", CONFIGS["teacher"]], "give one of the two"),
        (["MOKD.TEACHER.DETECTOR", "retinanet"], "Did you mean"),
        (["MOKD.TEACHER.WEIGHTS", str(ROOT / "none.pth")], "does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            other = make_cfg("mokd", [*teacher, "MOKD.TEACHER.DETECTOR", SSDLITE, *opts])
            validate(other)
