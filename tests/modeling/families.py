# Copyright (c) The mokd_det authors.
"""Small detectors of every family of Detectron2, and a balanced step of a pair."""

import importlib.util
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data.datasets import load_coco_json
from detectron2.modeling import backbone as backbones
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from mokd_det.data import register_datasets

from ..conftest import TREES
from ..data.annotated import annotate

RESNET = ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.FPN.IN_FEATURES", []]
FAMILIES = {
    "faster_rcnn": [],
    "mask_rcnn": [
        *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
        *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
    ],
    "keypoint_rcnn": [
        *("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3),
        *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (16,)),
        *("TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.1, 0.1]),
    ],
    "cascade_rcnn": [
        *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
        *("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", [0.5, 0.6, 0.7]),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    ],
    "panoptic_fpn": [
        *("MODEL.META_ARCHITECTURE", "PanopticFPN"),
        *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
        *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
        *("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p3", "p4"], "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2),
        *("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 8, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),
    ],
    "faster_rcnn_C4": [
        *RESNET,
        *("MODEL.RESNETS.OUT_FEATURES", ["res4"], "MODEL.RPN.IN_FEATURES", ["res4"]),
        *("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32, 64]]),
    ],
    "faster_rcnn_DC5": [
        *RESNET,
        *("MODEL.RESNETS.OUT_FEATURES", ["res5"], "MODEL.RESNETS.RES5_DILATION", 2),
        *("MODEL.RPN.IN_FEATURES", ["res5"], "MODEL.ROI_HEADS.IN_FEATURES", ["res5"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32, 64]]),
    ],
    "retinanet": [],
    "retinanet_BN": ["MODEL.RETINANET.NORM", "BN", "MODEL.FPN.NORM", "BN"],
}
TWO_STAGE = [family for family in FAMILIES if "retinanet" not in family]


def families(names=FAMILIES, quick=("faster_rcnn", "retinanet")):
    """Parameters of a test: those that `make test` leaves out are marked as slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


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
# Detectors of Python configs.
LAZY = [
    pytest.param(FCOS, id="fcos"),
    pytest.param(
        VITDET,
        id="vitdet",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(
                not hasattr(backbones, "ViT") or not importlib.util.find_spec("timm"),
                reason="ViTDet is in upstream's main only, and needs timm",
            ),
        ],
    ),
]


@pytest.fixture(scope="session")
def annotated(tmp_path_factory):
    """Overrides for data sets with masks, keypoints and sem_seg."""
    # One folder for all test folders that import this fixture: a name stands for one data set.
    folder = tmp_path_factory.getbasetemp() / "annotated"
    sets = []
    for split in ("train", "val"):
        path = folder / split / "coco.json"
        if not path.exists():
            path.parent.mkdir(parents=True)
            annotate(TREES / f"{split}.json", path, TREES / split)
        sets.append([f"tests_annotated_{split}", str(path), str(TREES / split)])
    train, val = (name for name, _, _ in sets)
    return ["DATASETS.COCO", sets, "DATASETS.TRAIN", (train,), "DATASETS.TEST", (val,)]


@pytest.fixture
def family_cfg(make_cfg, annotated):
    """From a family and overrides to the config of a small student of it."""

    def make(family, opts=(), folder="run"):
        base = "retinanet" if family.startswith("retinanet") else "faster_rcnn"
        return make_cfg(base, [*annotated, *FAMILIES[family], *opts], folder)

    return make


def batch_of(cfg, count=2):
    """Return training inputs; the first image is square, the second 192 x 160."""
    register_datasets(cfg)
    name, json_file, image_root = cfg.DATASETS.COCO[0]
    keys = ["keypoints"]
    dicts = load_coco_json(json_file, image_root, name, extra_annotation_keys=keys)
    if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN":
        for d in dicts:
            d["sem_seg_file_name"] = str(
                Path(json_file).parent / "sem_seg" / f"{Path(d['file_name']).stem}.png"
            )
    mapper = DatasetMapper(cfg, is_train=True)
    seed_all_rng(0)
    return [mapper(d) for d in dicts[1 : 1 + count]]


def step(model, batch):
    """Return (losses by objective, decision) of a balanced step."""
    with EventStorage(0):
        objectives = model.train()(batch)
        losses = {name: sum(parts.values()) for name, parts in objectives.items()}
        decision = model.boundary.backward(losses, model.parameters())
    return objectives, decision


def saved_teacher(cfg, model, folder):
    """Return the overrides for a teacher: a model of a config, which are written to a folder."""
    torch.save({"model": model.state_dict()}, folder / "teacher.pth")
    (folder / "teacher.yaml").write_text(cfg.dump())
    return [
        *("MOKD.ENABLED", True, "MOKD.TEACHER.CONFIG_FILE", str(folder / "teacher.yaml")),
        *("MOKD.TEACHER.WEIGHTS", str(folder / "teacher.pth")),
    ]
