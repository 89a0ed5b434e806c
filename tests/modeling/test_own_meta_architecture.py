# Copyright (c) The mokd_det authors.
"""A user's own meta-architecture: student, teacher, and baseline."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from torch import nn

from mokd_det.engine import DistillationTrainer, build_trainer

from ..conftest import OUTPUTS
from .families import batch_of, step


@META_ARCH_REGISTRY.register()
class Counter(nn.Module):
    """Counts objects: not Detectron2's in anything but the documented contract."""

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


class Heads(nn.Module):
    num_classes = 2


class ListTrunk(Counter.Trunk):
    def forward(self, x):
        return list(super().forward(x).values())


COUNTER = ["MODEL.META_ARCHITECTURE", "Counter", "MOKD.ENABLED"]


def trained(cfg):
    cfg.DATASETS.TEST = ()
    trainer = build_trainer(cfg)
    trainer.resume_or_load(False)
    trainer.train()
    return trainer


def test_as_student(make_cfg):
    """The level map's default finds the one stride that both have."""
    trainer = trained(make_cfg("faster_rcnn", [*COUNTER, True, "SOLVER.MAX_ITER", 2]))
    features = trainer.model.objectives["features"]
    assert [(level.student, level.teacher) for level in features.levels] == [("coarse", "p4")]
    storage = trainer.storage.latest()
    assert storage["loss_count"][0] > 0 and "balance/features/cosine_features" in storage
    # Its checkpoint is its own.
    saved = torch.load(f"{trainer.cfg.OUTPUT_DIR}/model_final.pth", weights_only=False)["model"]
    Counter(trainer.cfg).load_state_dict(saved)


def test_as_baseline(make_cfg):
    opts = [*COUNTER, False, "DATALOADER.RESUMABLE", True, "SOLVER.MAX_ITER", 1]
    assert trained(make_cfg("faster_rcnn", opts)).iter == 1


@pytest.mark.parametrize("place", ["num_classes", "head", "roi_heads"])
def test_its_number_of_classes_is_compared_with_the_data(make_cfg, monkeypatch, place):
    monkeypatch.setattr(Counter, place, 2 if place == "num_classes" else Heads(), raising=False)
    cfg = make_cfg("faster_rcnn", [*COUNTER, False, "DATALOADER.RESUMABLE", True])
    with pytest.raises(ValueError, match="num_classes' of the model, a Counter, is 2.*set it to 1"):
        build_trainer(cfg)


def test_as_teacher(make_cfg, tmp_path):
    torch.save({"model": Counter(None).state_dict()}, tmp_path / "counter.pth")
    opts = ["MOKD.TEACHER.OPTS", COUNTER[:2], "MOKD.TEACHER.WEIGHTS", str(tmp_path / "counter.pth")]
    opts += ["MOKD.FEATURES.STUDENT", ["p3", "p4"], "MOKD.FEATURES.TEACHER", ["fine", "coarse"]]
    cfg = make_cfg("mokd", opts)
    losses, _ = step(DistillationTrainer.build_model(cfg), batch_of(cfg))
    assert losses["features"]["loss_features"].isfinite()


def test_its_outputs_are_nobodys_to_read(make_cfg):
    cfg = make_cfg("faster_rcnn", [*COUNTER, True, *OUTPUTS])
    with pytest.raises(ValueError, match="heads of the student, a Counter, cannot be read"):
        DistillationTrainer.build_model(cfg)


def test_a_breach_of_the_contract_is_explained(make_cfg, monkeypatch, tmp_path):
    cfg = make_cfg("faster_rcnn", [*COUNTER, True])
    monkeypatch.setattr(Counter, "Trunk", ListTrunk)
    model = DistillationTrainer.build_model(cfg)
    with pytest.raises(TypeError, match=r"ListTrunk\) returned a list: distillation needs dict"):
        step(model, batch_of(cfg))
    monkeypatch.setattr(Counter, "Trunk", nn.Identity)
    with pytest.raises(ValueError, match="'Counter' has no 'backbone' with"):
        DistillationTrainer.build_model(cfg)
    monkeypatch.undo()
    monkeypatch.delattr(Counter, "preprocess_image")
    torch.save({"model": Counter(None).state_dict()}, tmp_path / "counter.pth")
    opts = ["MOKD.TEACHER.OPTS", COUNTER[:2], "MOKD.TEACHER.WEIGHTS", str(tmp_path / "counter.pth")]
    with pytest.raises(ValueError, match="teacher's .* 'Counter' has no 'preprocess_image'"):
        DistillationTrainer.build_model(make_cfg("mokd", opts))
