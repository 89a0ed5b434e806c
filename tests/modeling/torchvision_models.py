# Copyright (c) The mokd_det authors.
"""torchvision's detectors at small images, on the annotated tiles of tests/data."""

import pytest
import torch
from detectron2.utils.env import seed_all_rng

from mokd_det.config import load_config
from mokd_det.engine import prepare_datasets
from mokd_det.modeling import detector_names, torchvision_networks
from mokd_det.tasks import task_of

from ..conftest import TREE_OPTS

NODE = "MODEL.TORCHVISION_DETECTOR"
QUICK = ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn")
NO_SIZES = dict(zip(TREE_OPTS[::2], TREE_OPTS[1::2]))
ELSEWHERE = ("INPUT.M", "MOKD.FEATURES")  # the network's options; names of Detectron2's maps
NO_SIZES = {key: value for key, value in NO_SIZES.items() if not key.startswith(ELSEWHERE)}


def models(quick=QUICK, names=None):
    """Parameters of a test: those that `make test` leaves out are marked as slow."""
    names = detector_names() if names is None else names
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def thresholds(name, score=0.0):
    """Options of the constructor for detections of random weights."""
    # Of sigmoids, random ones also find the background, which is no class.
    most = 20 if "rcnn" in name or "ssd" in name else 300
    prefix = "box_" if "rcnn" in name else ""
    return {f"{prefix}score_thresh": score, f"{prefix}detections_per_img": most}


@pytest.fixture
def torchvision_cfg(annotated, tmp_path):
    """From a model's name, options of its constructor and overrides to a config."""

    def make(name, options=None, opts=(), folder="run"):
        size = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 160}
        # Regions cost most on these small images.
        regions = ("rpn_post_nms_top_n_train", "rpn_post_nms_top_n_test")
        few = {**dict.fromkeys(regions, 50), "box_batch_size_per_image": 16}
        size |= few if "rcnn" in name else {}
        keypoints = {"num_keypoints": 3} if name.startswith("keypoint") else {}
        output = tmp_path / folder
        output.mkdir(exist_ok=True)
        return load_config(
            "configs/Base-TorchvisionDetector.yaml",
            [
                *(part for pair in NO_SIZES.items() for part in pair),
                *annotated,
                *("OUTPUT_DIR", str(output), "MODEL.DEVICE", "cpu", f"{NODE}.NAME", name),
                *(f"{NODE}.NUM_CLASSES", 1),
                *(f"{NODE}.OPTIONS", {**size, **keypoints, **(options or {})}),
                *("MODEL.MASK_ON", name.startswith("mask")),
                *("MODEL.KEYPOINT_ON", name.startswith("keypoint")),
                *("TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.1, 0.1]),
                *opts,
            ],
        )

    return make


def random_detector(cfg):
    """Return the model of a config with random weights."""
    seed_all_rng(3)
    return task_of(cfg).build_student(cfg)


def training_batch(cfg):
    """Return the first batch of a config's own loader."""
    task = task_of(cfg)
    prepare_datasets(cfg, task)
    return next(iter(task.build_train_loader(cfg)))


@pytest.fixture
def published(monkeypatch):
    """torchvision's downloads are random weights of the same model."""
    state = torchvision_networks._random_state

    def download(member, name):
        torch.manual_seed(5)
        return state(member)

    monkeypatch.setattr(torchvision_networks, "torchvision_state", download)
    return download


def build(name, **options):
    opts = [f"{NODE}.NAME", name, "MODEL.DEVICE", "cpu"]
    for key, value in options.items():
        opts += [f"{NODE}.{key}", value]
    cfg = load_config("configs/Base-TorchvisionDetector.yaml", opts)
    return task_of(cfg).build_student(cfg).network
