# Copyright (c) The mokd_det authors.
"""Teachers to compare: with features of usual size, and of TorchScript."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from torch import nn

from mokd_det.config import load_config
from mokd_det.tasks import task_of

from ..conftest import CONFIGS, OUTPUTS, TREE_OPTS
from ..modeling.families import batch_of


def build_teacher(cfg):
    """Return a config's teacher, with what its objectives ask it for."""
    teacher = task_of(cfg).build_teacher(cfg)
    if "outputs" in task_of(cfg).objectives(cfg):
        teacher.read_boxes()
    return teacher


def prefixed(options):
    """Return overrides [KEY, VALUE, ...] of ``MOKD.TEACHER``."""
    return [f"MOKD.TEACHER.{v}" if i % 2 == 0 else v for i, v in enumerate(options)]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A random teacher whose normalisation fits the tiles: features of usual size, as a trained
    one's. Without, they are smaller than float16's smallest numbers."""
    norm = ["MODEL.TORCHVISION.NORM", "BN"]
    cfg = load_config(CONFIGS["teacher"], [*TREE_OPTS, *norm, "MODEL.TORCHVISION.WEIGHTS", ""])
    seed_all_rng(3)
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of the one batch that follows
    with torch.no_grad():
        model.backbone.train()(model.preprocess_image(batch_of(cfg)).tensor)
    path = tmp_path_factory.mktemp("calibrated") / "teacher.pth"
    torch.save({"model": model.state_dict()}, path)
    return ["MOKD.TEACHER.WEIGHTS", str(path), "MOKD.TEACHER.OPTS", norm, *OUTPUTS]


class OneConvolution(nn.Module):
    """A backbone that becomes all constants when it is frozen."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 8, 1)

    def forward(self, x):
        return {"p3": self.conv(x)}


def script_opts(path):
    """Return the overrides for a teacher of a TorchScript file."""
    empty = ["MOKD.TEACHER.CONFIG_FILE", "", "MOKD.TEACHER.WEIGHTS", ""]
    return [*empty, "MOKD.TEACHER.TORCHSCRIPT.FILE", path]
