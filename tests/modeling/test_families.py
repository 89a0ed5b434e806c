# Copyright (c) The mokd_det authors.
"""Every family of Detectron2's detectors as student and as teacher, and models that are not its."""

import importlib.util
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling import backbone as backbones
from detectron2.structures import ImageList
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from mokd_det.config import load_config
from mokd_det.data import register_datasets
from mokd_det.engine import DistillationTrainer, build_trainer
from mokd_det.modeling import teacher_config

from ..conftest import CONFIGS, TREE_OPTS, TREES
from .families import FAMILIES, batch_of, step

# C4 and DC5 share no name with the teacher's p3-p6, but the stride 16.
LEVELS = {"faster_rcnn_C4": {"res4": "p4"}, "faster_rcnn_DC5": {"res5": "p4"}}
SAME_NAMES = {name: name for name in ("p3", "p4", "p5", "p6")}


@pytest.mark.parametrize("family", FAMILIES)
def test_students(family_cfg, family):
    """Forward, balanced step on features and outputs, and the stock model at evaluation."""
    opts = ["MOKD.ENABLED", True, "MOKD.OUTPUTS.ENABLED", True]
    cfg = family_cfg(family, opts)
    model = DistillationTrainer.build_model(cfg)
    assert model.features.level_map == LEVELS.get(family, SAME_NAMES)
    batch = batch_of(cfg)
    stock = build_model(cfg)
    assert type(model.student) is type(stock)
    stock.load_state_dict(model.student.state_dict())
    torch.manual_seed(1)  # boxes are sampled
    objectives, balance = step(model, batch)
    assert list(objectives) == ["task", "features", "outputs"]
    assert balance.fallback == "" and (balance.gram.diagonal() > 0).all()
    for parts in objectives.values():
        assert parts and all(loss.isfinite() for loss in parts.values())
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    # Nothing of the second run of the heads stays: the same buffers as after the stock's step.
    stock.train()
    torch.manual_seed(1)
    with EventStorage(0):
        stock(batch)
    for (key, ours), (_, theirs) in zip(model.student.named_buffers(), stock.named_buffers()):
        assert torch.equal(ours, theirs), key
    model.eval(), stock.eval()
    with torch.no_grad():
        ours, theirs = model(batch), stock(batch)
    assert torch.equal(ours[0]["instances"].scores, theirs[0]["instances"].scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_teachers(family_cfg, make_cfg, family, tmp_path):
    """Each family teaches a RetinaNet and a Faster R-CNN, features and outputs."""
    teacher_cfg = family_cfg(family)
    seed_all_rng(3)
    path = tmp_path / "teacher.pth"
    torch.save({"model": build_model(teacher_cfg).state_dict()}, path)
    (tmp_path / "teacher.yaml").write_text(teacher_cfg.dump())
    for student in ("retinanet", "faster_rcnn"):
        opts = ["MOKD.ENABLED", True, "MOKD.TEACHER.CONFIG_FILE", str(tmp_path / "teacher.yaml")]
        opts += ["MOKD.TEACHER.WEIGHTS", str(path), "MOKD.OUTPUTS.ENABLED", True]
        cfg = family_cfg(student, opts)
        model = DistillationTrainer.build_model(cfg)
        objectives, balance = step(model, batch_of(cfg))
        assert all(loss.isfinite() for parts in objectives.values() for loss in parts.values())
        assert balance.fallback == ""
        view = model.teacher.view(batch_of(cfg), "BGR")
        assert all(0 < len(boxes) <= cfg.MOKD.OUTPUTS.PROPOSALS for boxes in view.proposals)
        assert not any(boxes.requires_grad for boxes in view.proposals)


@pytest.mark.parametrize("family", ["mask_rcnn", "keypoint_rcnn", "cascade_rcnn", "faster_rcnn_C4"])
def test_families_train_and_evaluate(family_cfg, family):
    """The whole trainer: two balanced steps, checkpoint, COCO evaluation of every task."""
    opts = ["MOKD.ENABLED", True, "MOKD.OUTPUTS.ENABLED", True, "SOLVER.MAX_ITER", 2]
    opts += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    trainer = build_trainer(family_cfg(family, opts))
    trainer.resume_or_load(False)
    trainer.train()
    tasks = {"mask_rcnn": {"bbox", "segm"}, "keypoint_rcnn": {"bbox", "keypoints"}}
    results = trainer._last_eval_results
    assert set(results) == tasks.get(family, {"bbox"})
    assert all({"AP", "AP50", "AP75"} <= set(metrics) for metrics in results.values())


def test_panoptic_fpn_trains(family_cfg, annotated):
    """Its data have sem_seg besides, so the set is registered in Python, as Detectron2's."""
    cfg = family_cfg("panoptic_fpn", ["MOKD.ENABLED", True, "SOLVER.MAX_ITER", 2])
    register_datasets(cfg)
    _, json_file, image_root = cfg.DATASETS.COCO[0]

    def load():
        dicts = load_coco_json(json_file, image_root, "tests_panoptic")
        folder = Path(json_file).parent / "sem_seg"
        return [
            {**d, "sem_seg_file_name": str(folder / f"{Path(d['file_name']).stem}.png")}
            for d in dicts
        ]

    DatasetCatalog.register("tests_panoptic", load)
    MetadataCatalog.get("tests_panoptic").set(evaluator_type="coco", json_file=json_file)
    try:
        cfg.DATASETS.TRAIN = ("tests_panoptic",)
        trainer = build_trainer(cfg)
        trainer.resume_or_load(False)
        trainer.train()
        storage = trainer.storage.latest()
        assert "loss_sem_seg" in storage and "balance/features/cosine_features" in storage
    finally:
        DatasetCatalog.remove("tests_panoptic")
        MetadataCatalog.remove("tests_panoptic")


def test_keypoint_names_come_from_the_json(family_cfg):
    cfg = family_cfg("keypoint_rcnn")
    register_datasets(cfg)
    metadata = MetadataCatalog.get("tests_annotated_train")
    assert metadata.keypoint_names == ["left_border", "right_border", "top"]
    assert metadata.keypoint_flip_map == [("left_border", "right_border")]


def test_keypoints_that_the_json_lacks_are_an_error(make_cfg, tmp_path):
    path = tmp_path / "no_keypoints.json"
    path.write_text((TREES / "train.json").read_text())
    sets = [["tests_no_keypoints", str(path), str(TREES / "train")]]
    with pytest.raises(ValueError, match="no category with 'keypoints'"):
        register_datasets(
            make_cfg("faster_rcnn", ["MODEL.KEYPOINT_ON", True, "DATASETS.COCO", sets])
        )


@META_ARCH_REGISTRY.register()
class ForeignDetector(nn.Module):
    """What a user brings: not Detectron2's in anything but the documented contract."""

    class Trunk(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 12, 7, 4, 3), nn.ReLU())
            self.second = nn.Sequential(nn.Conv2d(12, 20, 5, 4, 2), nn.ReLU())

        def forward(self, x):
            fine = self.first(x)
            return {"fine": fine, "coarse": self.second(fine)}

        def output_shape(self):
            return {"fine": ShapeSpec(12, stride=4), "coarse": ShapeSpec(20, stride=16)}

    def __init__(self, cfg):
        super().__init__()
        self.backbone = self.Trunk()
        self.count = nn.Linear(20, 1)

    def preprocess_image(self, batched_inputs):
        images = [x["image"].float() / 255 for x in batched_inputs]
        return ImageList.from_tensors(images, 16)

    def forward(self, batched_inputs):
        features = self.backbone(self.preprocess_image(batched_inputs).tensor)
        counts = self.count(features["coarse"].mean((2, 3)))[:, 0]
        if not self.training:
            return counts
        wanted = counts.new_tensor([len(x["instances"]) for x in batched_inputs])
        return {"loss_count": (counts - wanted).abs().mean()}


FOREIGN = ["MODEL.META_ARCHITECTURE", "ForeignDetector"]


def test_foreign_meta_architecture_as_student(make_cfg):
    """The level map's default finds the one stride that both have."""
    cfg = make_cfg("faster_rcnn", [*FOREIGN, "MOKD.ENABLED", True, "SOLVER.MAX_ITER", 2])
    cfg.DATASETS.TEST = ()
    trainer = build_trainer(cfg)
    model = trainer._trainer.model
    assert model.features.level_map == {"coarse": "p4"}
    before = model.student.backbone.first[0].weight.clone()
    trainer.resume_or_load(False)
    trainer.train()
    assert not torch.equal(before, model.student.backbone.first[0].weight)
    assert set(trainer.checkpointer.model.state_dict()) == set(ForeignDetector(cfg).state_dict())


def test_foreign_meta_architecture_has_a_twin_from_scratch(make_cfg):
    opts = [*FOREIGN, "MOKD.ENABLED", False, "DATALOADER.RESUMABLE", True, "SOLVER.MAX_ITER", 1]
    cfg = make_cfg("faster_rcnn", opts)
    cfg.DATASETS.TEST = ()
    trainer = build_trainer(cfg)
    trainer.train()
    assert trainer.iter == 1


def test_foreign_meta_architecture_as_teacher(make_cfg, tmp_path):
    torch.save({"model": ForeignDetector(None).state_dict()}, tmp_path / "foreign.pth")
    opts = ["MOKD.TEACHER.OPTS", FOREIGN, "MOKD.TEACHER.WEIGHTS", str(tmp_path / "foreign.pth")]
    opts += ["MOKD.FEATURES.STUDENT", ["p3", "p4"], "MOKD.FEATURES.TEACHER", ["fine", "coarse"]]
    cfg = make_cfg("mokd", opts)
    objectives, _ = step(DistillationTrainer.build_model(cfg), batch_of(cfg))
    assert objectives["features"]["loss_features"].isfinite()


def test_outputs_of_a_foreign_meta_architecture_are_refused(make_cfg):
    cfg = make_cfg("faster_rcnn", [*FOREIGN, "MOKD.ENABLED", True, "MOKD.OUTPUTS.ENABLED", True])
    with pytest.raises(ValueError, match="outputs of the student, a ForeignDetector, cannot be"):
        DistillationTrainer.build_model(cfg)


class ListBackbone(ForeignDetector.Trunk):
    def forward(self, x):
        return list(super().forward(x).values())


def test_contract_violations_are_explained(make_cfg, monkeypatch):
    cfg = make_cfg("faster_rcnn", [*FOREIGN, "MOKD.ENABLED", True])
    monkeypatch.setattr(ForeignDetector, "Trunk", ListBackbone)
    model = DistillationTrainer.build_model(cfg)
    with pytest.raises(TypeError, match=r"ListBackbone\) returned a list"):
        step(model, batch_of(cfg))
    monkeypatch.setattr(ForeignDetector, "Trunk", nn.Identity)
    with pytest.raises(ValueError, match="'ForeignDetector' has no 'backbone' with"):
        DistillationTrainer.build_model(cfg)


FCOS = """
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

model = L(FCOS)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="BN"),
            stages=L(ResNet.make_default_stages)(depth=18, norm="BN"),
            out_features=["res3", "res4", "res5"],
        ),
        in_features=["res3", "res4", "res5"],
        out_channels=32,
        top_block=L(LastLevelP6P7)(in_channels=32, out_channels=32, in_feature="p5"),
    ),
    head=L(FCOSHead)(
        input_shape=[ShapeSpec(channels=32)] * 5,
        num_classes="${..num_classes}",
        conv_dims=[32],
        prior_prob=0.01,
    ),
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    num_classes=1,
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[57.375, 57.12, 58.395],
)
"""

VITDET = """
from functools import partial

import torch.nn as nn
from detectron2.config import LazyCall as L
from detectron2.modeling import RetinaNet, SimpleFeaturePyramid, ViT
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead

model = L(RetinaNet)(
    backbone=L(SimpleFeaturePyramid)(
        net=L(ViT)(
            img_size=192, patch_size=16, embed_dim=48, depth=2, num_heads=2, drop_path_rate=0.0,
            window_size=4, mlp_ratio=2, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6),
            window_block_indexes=[0], use_rel_pos=True, out_feature="last_feat",
        ),
        in_feature="last_feat", out_channels=32, scale_factors=(2.0, 1.0, 0.5),
        top_block=L(LastLevelMaxPool)(), norm="LN", square_pad=192,
    ),
    head=L(RetinaNetHead)(
        input_shape=[ShapeSpec(channels=32)] * 4, num_classes="${..num_classes}",
        conv_dims=[32], prior_prob=0.01, num_anchors=1,
    ),
    anchor_generator=L(DefaultAnchorGenerator)(
        sizes=[[32], [64], [96], [128]], aspect_ratios=[1.0], strides=[8, 16, 32, 64], offset=0.0,
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    anchor_matcher=L(Matcher)(
        thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
    num_classes=1,
    head_in_features=["p3", "p4", "p5", "p6"],
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[57.375, 57.12, 58.395],
)
"""
LAZY = {
    "fcos": pytest.param(FCOS, id="fcos"),
    "vitdet": pytest.param(
        VITDET,
        id="vitdet",
        marks=pytest.mark.skipif(
            not hasattr(backbones, "ViT") or not importlib.util.find_spec("timm"),
            reason="ViTDet is in upstream's main only, and needs timm",
        ),
    ),
}


@pytest.mark.parametrize("source", LAZY.values())
def test_detectors_of_python_configs(make_cfg, tmp_path, source):
    """FCOS and ViTDet as student (trained, evaluated) and as teacher of a Faster R-CNN."""
    path = tmp_path / "lazy.py"
    path.write_text(source)
    opts = ["MODEL.META_ARCHITECTURE", "LazyConfigDetector", "MODEL.LAZY_CONFIG.FILE", str(path)]
    opts += ["MOKD.ENABLED", True, "SOLVER.MAX_ITER", 2]
    trainer = build_trainer(make_cfg("faster_rcnn", opts))
    trainer.resume_or_load(False)
    trainer.train()
    assert "AP" in trainer._last_eval_results["bbox"]

    weights = str(tmp_path / "run" / "model_final.pth")
    opts = ["MOKD.TEACHER.CONFIG_FILE", str(path), "MOKD.TEACHER.WEIGHTS", weights]
    cfg = make_cfg("mokd", [*opts, "MOKD.TEACHER.OPTS", ["model.num_classes=1"]], "teacher")
    objectives, _ = step(DistillationTrainer.build_model(cfg), batch_of(cfg))
    assert objectives["features"]["loss_features"].isfinite()


def test_channel_order_of_a_python_config(make_cfg, tmp_path):
    """The model of a Python config says it itself: a student's config must agree, and a teacher's
    follows."""
    path = tmp_path / "rgb.py"
    path.write_text(FCOS + 'model.input_format = "RGB"\n')
    opts = ["MODEL.META_ARCHITECTURE", "LazyConfigDetector", "MODEL.LAZY_CONFIG.FILE", str(path)]
    with pytest.raises(ValueError, match="INPUT.FORMAT is 'BGR', but the model of.*takes 'RGB'"):
        build_model(make_cfg("faster_rcnn", opts))
    (tmp_path / "none.pth").touch()
    weights = str(tmp_path / "none.pth")
    opts = ["MOKD.TEACHER.CONFIG_FILE", str(path), "MOKD.TEACHER.WEIGHTS", weights]
    assert teacher_config(make_cfg("mokd", opts)).INPUT.FORMAT == "RGB"


def test_python_configs_without_a_model_are_refused(make_cfg, tmp_path):
    (tmp_path / "none.py").write_text("train = 1\n")
    opts = ["MODEL.META_ARCHITECTURE", "LazyConfigDetector"]
    with pytest.raises(ValueError, match="MODEL.LAZY_CONFIG.FILE is empty"):
        build_model(make_cfg("faster_rcnn", opts))
    opts += ["MODEL.LAZY_CONFIG.FILE", str(tmp_path / "none.py")]
    with pytest.raises(ValueError, match="defines no 'model'"):
        build_model(make_cfg("faster_rcnn", opts))


def test_annotated_tiles_are_the_trees(annotated):
    """The drawn masks and keypoints stand on the real boxes of the same images."""
    cfg = load_config(CONFIGS["faster_rcnn"], [*TREE_OPTS, *annotated])
    name, json_file, image_root = cfg.DATASETS.COCO[0]
    dicts = load_coco_json(json_file, image_root, extra_annotation_keys=["keypoints"])
    assert len(dicts) == 6 and all(d["annotations"] for d in dicts)
