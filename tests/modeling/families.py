# Copyright (c) The mokd_det authors.
"""Small detectors of every family of Detectron2, and a balanced step of a pair."""

from pathlib import Path

from detectron2.data import DatasetMapper
from detectron2.data.datasets import load_coco_json
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from mokd_det.data import register_datasets

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


def batch_of(cfg, count=2):
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
    with EventStorage(0):
        objectives = model.train()(batch)
        losses = [sum(parts.values()) for parts in objectives.values()]
        balance = model.boundary.backward(losses, model.parameters())
    return objectives, balance
