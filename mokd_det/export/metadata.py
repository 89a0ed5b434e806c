# Copyright (c) The mokd_det authors.
"""What a deployed model needs to be told beside its weights."""

import hashlib

import detectron2
import torch
import torchvision
from detectron2.data import DatasetCatalog, MetadataCatalog

import mokd_det

from ..config import stock_config
from ..data.classification.sources import class_names as classification_names
from ..data.packages import sha256_of
from ..modeling import is_classifier
from .detector import num_classes, output_names, score_threshold

__all__ = ["METADATA_FILE", "build_metadata"]

METADATA_FILE = "metadata.json"
"""Name of the extra file inside a TorchScript archive, and of the entry in an ONNX or .pt2 file."""

INPUT = "one image (3, H, W), uint8 or float32 in [0, 255], channels in the order of 'format'"
OUTPUTS = {
    "boxes": "(R, 4) float32, x0 y0 x1 y1 in pixels of the image given",
    "scores": "(R,) float32 in [0, 1], descending",
    "classes": "(R,) int64, index into class_names",
    "masks": "(R, M, M) float32 probabilities over each box; paste_masks() puts them on an image",
    "keypoints": "(R, K, 3) float32, x y in pixels of the image given, score",
    "sem_seg": "(C, H, W) float32 logits",
}


def build_metadata(cfg, model):
    """
    Args:
        cfg (CfgNode): of the model, its data sets registered.
        model (nn.Module): detector or classifier.

    Returns:
        dict: to be written as JSON. ``task`` ("detection" or "classification"), ``class_names``
        (None if no data set of the config is here to name them), ``format``, ``pixel_mean``,
        ``pixel_std``, ``resize``, ``score_threshold`` and ``keypoint_names`` (detection),
        ``input``, ``outputs``, ``versions``, ``config_sha256``, ``weights_sha256`` (None for
        weights that torchvision names).
    """
    weights = cfg.MODEL.WEIGHTS
    common = {
        "format": cfg.INPUT.FORMAT,
        "pixel_mean": model.pixel_mean.flatten().tolist(),
        "pixel_std": model.pixel_std.flatten().tolist(),
        "versions": {
            "mokd_det": mokd_det.__version__,
            "detectron2": detectron2.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "config_sha256": hashlib.sha256(stock_config(cfg).dump().encode()).hexdigest(),
        "weights_sha256": sha256_of(weights) if weights else None,
    }
    if is_classifier(cfg):
        options = cfg.INPUT.CLASSIFICATION
        return {
            "task": "classification",
            "class_names": _class_names(cfg, model.num_classes),
            # torchvision's Resize, then CenterCrop.
            "resize": {
                "short_edge": options.RESIZE_TEST,
                "crop": options.SIZE_TEST,
                "interpolation": options.INTERPOLATION,
            },
            "input": INPUT.replace("one image (3", "images (N, 3"),
            "outputs": {"logits": "(N, C) float32; their softmax are probabilities"},
            **common,
        }
    return {
        "task": "detection",
        "class_names": _class_names(cfg, num_classes(model)),
        # Detectron2's ResizeShortestEdge; short edge 0 leaves images as they are.
        "resize": {
            "short_edge": cfg.INPUT.MIN_SIZE_TEST,
            "longest_edge": cfg.INPUT.MAX_SIZE_TEST,
            "interpolation": "bilinear",
        },
        "score_threshold": score_threshold(model),
        "keypoint_names": _keypoint_names(cfg),
        "input": INPUT,
        "outputs": {name: OUTPUTS[name] for name in output_names(model)},
        **common,
    }


def _data_sets(cfg):
    return [n for n in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN) if n in DatasetCatalog.list()]


def _class_names(cfg, count):
    for name in _data_sets(cfg):
        metadata = MetadataCatalog.get(name)
        try:
            if is_classifier(cfg):
                names = list(classification_names(metadata.image_path))
            else:
                if "thing_classes" not in metadata.as_dict():
                    DatasetCatalog.get(name)  # reading COCO's JSON sets them
                names = list(metadata.get("thing_classes", []))
        except FileNotFoundError:  # a set that is registered, but not on this machine
            continue
        if len(names) == count:
            return names
    return None


def _keypoint_names(cfg):
    for name in _data_sets(cfg) if cfg.MODEL.KEYPOINT_ON else ():
        if "keypoint_names" in MetadataCatalog.get(name).as_dict():
            return list(MetadataCatalog.get(name).keypoint_names)
    return None
