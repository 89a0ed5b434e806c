# Copyright (c) The mokd_det authors.
"""What torchvision's detectors are given: images without objects, sizes, keypoints, options."""

import copy
import json

import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image
from torch import nn

from mokd_det.config import load_config
from mokd_det.data import build_train_mapper
from mokd_det.engine import DistillationTrainer, prepare_datasets, validate
from mokd_det.modeling import TorchvisionDetector, detector_names
from mokd_det.tasks import task_of
from mokd_det.tasks.torchvision_detection import in_own_size

from .families import annotated
from .torchvision_models import NODE, build, models, published, random_detector, thresholds
from .torchvision_models import torchvision_cfg

__all__ = ["annotated", "published", "torchvision_cfg"]
SSDLITE, MOBILE = "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"
KEYPOINTS = "keypointrcnn_resnet50_fpn"
WITH_MORE = [name for name in detector_names() if name.startswith(("mask", "keypoint"))]


@pytest.mark.parametrize("name", models())
def test_images_without_objects_are_trained_on(torchvision_cfg, name):
    """Alone (but of SSDlite, whose BatchNorm needs two) and beside others, resized or not."""
    cfg = torchvision_cfg(name)
    model = random_detector(cfg).train()
    prepare_datasets(cfg, task_of(cfg))
    mapper = build_train_mapper(in_own_size(cfg))
    first, second = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[1:3]
    empty, other = mapper({**copy.deepcopy(first), "annotations": []}), mapper(second)
    for batch in ([empty, other], [empty, empty] if name == SSDLITE else [empty]):
        for given in (batch, model.prepare(batch)):
            losses = model(given)
            assert all(loss.isfinite() for loss in losses.values())
            sum(losses.values()).backward()
    if name in WITH_MORE:
        assert (
            "gt_masks" in model.prepare([empty])[0]["instances"].get_fields() or name == KEYPOINTS
        )


@pytest.mark.parametrize(
    "name", [SSDLITE, *(pytest.param(name, marks=pytest.mark.slow) for name in WITH_MORE)]
)
def test_detections_are_in_the_size_that_is_asked_for(torchvision_cfg, name):
    """As those of Detectron2's models: ``height`` and ``width`` of an image that was resized."""
    model = random_detector(torchvision_cfg(name, thresholds(name))).eval()
    image = 255 * torch.rand(3, 100, 120)
    with torch.no_grad():
        (found,) = model([{"image": image}])
        (larger,) = model([{"image": image, "height": 300, "width": 240}])
    found, larger = found["instances"], larger["instances"]
    assert len(found) and larger.image_size == (300, 240)
    scale = torch.tensor([2.0, 3.0])
    assert torch.equal(larger.pred_boxes.tensor, found.pred_boxes.tensor * scale.repeat(2))
    if found.has("pred_masks"):
        assert torch.equal(larger.pred_masks[:, ::3, ::2], found.pred_masks)
    if found.has("pred_keypoints"):
        places = found.pred_keypoints[..., :2] * scale
        assert torch.equal(larger.pred_keypoints[..., :2], places)


class Perfect(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images):
        return [self.answer for _ in images]


def test_perfect_keypoints_score_1(tmp_path):
    """torchvision's keypoints are pixels, as COCO's: half a pixel counts on a small object."""
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    points = [3, 4, 2, 9, 5, 2, 6, 8, 2]
    data = {
        "images": [{"id": 1, "file_name": "0.png", "width": 32, "height": 32}],
        "categories": [{"id": 1, "name": "a", "keypoints": ["x", "y", "z"], "skeleton": []}],
        "annotations": [
            {
                **{"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 9, 7], "area": 63},
                **{"iscrowd": 0, "keypoints": points, "num_keypoints": 3},
            }
        ],
    }
    (tmp_path / "set.json").write_text(json.dumps(data))
    name = "tests_small_keypoints"
    opts = ["DATASETS.COCO", [[name, str(tmp_path / "set.json"), str(tmp_path)]]]
    opts += ["DATASETS.TEST", (name,), "DATASETS.TRAIN", (name,), "OUTPUT_DIR", str(tmp_path)]
    opts += [f"{NODE}.NAME", KEYPOINTS, f"{NODE}.NUM_CLASSES", 1, "MODEL.DEVICE", "cpu"]
    opts += ["MODEL.KEYPOINT_ON", True, "TEST.KEYPOINT_OKS_SIGMAS", [0.02] * 3]
    cfg = load_config("configs/Base-TorchvisionDetector.yaml", opts)
    prepare_datasets(cfg, task_of(cfg), is_training=False)
    answer = {
        "boxes": torch.tensor([[2.0, 3.0, 11.0, 10.0]]),
        "scores": torch.tensor([0.9]),
        "labels": torch.tensor([1]),
        "keypoints": torch.tensor(points).view(1, 3, 3).float(),
        "keypoints_scores": torch.ones(1, 3),
    }
    model = TorchvisionDetector(network=Perfect(answer), labels=[1]).eval()
    results = DistillationTrainer.test(cfg, model)
    assert results["keypoints"]["AP"] == 100


# ---- weights ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_other_keypoints_have_a_new_head_on_the_published_weights(published):
    """Also where the classes are those of the weights: a person, and others of its points."""
    network = build(KEYPOINTS, WEIGHTS="DEFAULT", NUM_CLASSES=1, OPTIONS={"num_keypoints": 3})
    theirs = build(KEYPOINTS, WEIGHTS="DEFAULT", NUM_CLASSES=1)
    assert network.roi_heads.keypoint_predictor.kps_score_lowres.out_channels == 3
    assert theirs.roi_heads.keypoint_predictor.kps_score_lowres.out_channels == 17
    mine, state = network.state_dict(), theirs.state_dict()
    new = {key for key in mine if mine[key].shape != state[key].shape}
    assert all(key.startswith("roi_heads.keypoint_predictor") for key in new)
    assert all(torch.equal(mine[key], state[key]) for key in mine.keys() - new)


@pytest.mark.bad_input
def test_random_heads_neither_teach_nor_are_evaluated(torchvision_cfg, published, tmp_path):
    """COCO's weights with other classes, and nobody named the trained ones."""
    cfg = torchvision_cfg(SSDLITE, opts=[f"{NODE}.WEIGHTS", "DEFAULT"])
    with pytest.raises(ValueError, match="^MODEL.WEIGHTS is empty.*'DEFAULT' is for other classes"):
        task_of(cfg).load_trained(cfg)
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    teacher = ["MOKD.ENABLED", True, "MOKD.TEACHER.CONFIG_FILE", str(tmp_path / "teacher.yaml")]
    cfg = torchvision_cfg(SSDLITE, opts=teacher)
    with pytest.raises(ValueError, match="^MOKD.TEACHER.WEIGHTS is empty.*would be random"):
        task_of(cfg).build_teacher(cfg)


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_size": "a"}, "min_size is 'a': expected an integer >= 1"),
        ({"min_size": [320, 0]}, "min_size is .*320, 0"),
        ({"max_size": 0}, "max_size is 0"),
        ({"box_score_thresh": 3}, "box_score_thresh is 3: expected a finite number in .0, 1"),
        ({"box_nms_thresh": -1}, "box_nms_thresh is -1"),
        ({"box_detections_per_img": 0}, "box_detections_per_img is 0"),
        ({"image_mean": [1, 2]}, "image_mean is .*: expected a list of 3"),
        ({"image_std": [0, 0, 0]}, "image_std is .*: expected a list of 3"),
        ({"rpn_head": 3}, "it has no rpn_head; it has .*box_batch_size_per_image"),
        ({"trainable_backbone_layers": 2}, "of random layers all are trained: remove it"),
    ],
)
def test_bad_options(torchvision_cfg, options, message):
    cfg = torchvision_cfg(MOBILE, options)
    with pytest.raises(ValueError, match=message):
        task_of(cfg).build_student(cfg)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "opts, message",
    [
        (["TEST.DETECTIONS_PER_IMAGE", 5], "TEST.DETECTIONS_PER_IMAGE is 5, but.*do not read it"),
        (["MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0]], "MODEL.PIXEL_MEAN is .*do not read it"),
        (["MODEL.BACKBONE.FREEZE_AT", 0], "MODEL.BACKBONE.FREEZE_AT is 0, but.*do not read it"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 3], "MODEL.ROI_HEADS.NUM_CLASSES is 3, but"),
        (["MODEL.TORCHVISION.WEIGHTS", "DEFAULT"], "MODEL.TORCHVISION.WEIGHTS is 'DEFAULT', but"),
        ([f"{NODE}.WEIGHTS", "DEFAULT", f"{NODE}.DOWNLOAD", False], "start from random weights"),
    ],
)
def test_options_that_nobody_reads(torchvision_cfg, opts, message):
    cfg = torchvision_cfg(MOBILE, opts=opts)
    with pytest.raises(ValueError, match=message):
        validate(cfg)


@pytest.mark.bad_input
def test_ssdlite_trains_on_two_images_at_least(torchvision_cfg):
    cfg = torchvision_cfg(SSDLITE, opts=["SOLVER.IMS_PER_BATCH", 1])
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH is too small.*Use 2 images"):
        DistillationTrainer(cfg)
