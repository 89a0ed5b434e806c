# Copyright (c) The mokd_det authors.
"""How torchvision's detectors are trained: precision, means, parts of batches, epochs, ranks."""

import copy
from pathlib import Path

import mokd_det.compat  # noqa: F401  (first: the other processes have no conftest)
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torchvision.models import get_model

from mokd_det.config import load_config
from mokd_det.data import build_train_mapper
from mokd_det.engine import prepare_datasets
from mokd_det.readers import build_box_reader
from mokd_det.speed import pool_in_float32
from mokd_det.tasks import task_of
from mokd_det.tasks.torchvision_detection import in_own_size

from ..modeling.families import annotated, saved_teacher
from ..modeling.torchvision_models import NODE, random_detector, torchvision_cfg, training_batch
from .helpers import balanced_steps, on_two_ranks
from .test_step import BF16, build, run_steps, train_and_stop
from .test_trainer import assert_equal_states, train

__all__ = ["annotated", "torchvision_cfg"]
SSDLITE, MOBILE = "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"
ALL = ["features", "teacher_head", "outputs"]
BOTH = pytest.mark.parametrize("name", [SSDLITE, MOBILE])


@pytest.fixture
def distilled(torchvision_cfg, tmp_path):
    """From a student's name and overrides to its config, with a small Faster R-CNN as teacher."""
    cfg = torchvision_cfg(MOBILE, folder="teacher")
    teacher = saved_teacher(cfg, random_detector(cfg), tmp_path)
    few = ["MOKD.TEACHER.PROPOSALS", 16, "MOKD.FEATURES.DIM", 16, "DATALOADER.NUM_WORKERS", 0]
    rule = ["MOKD.BALANCING.RULE", "fixed", "MOKD.OBJECTIVES", ALL]

    def make(name, opts=(), folder="run"):
        return torchvision_cfg(name, None, [*teacher, *few, *rule, *opts], folder)

    return make


EPOCHS = ["SOLVER.UNIT", "epoch", "SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1]


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    "stop, opts",
    [
        (1, BF16),
        (1, ["SOLVER.EMA_DECAY", 0.9, "SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 1e-4]),
        (1, ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MICRO_BATCHES", 2]),
        (4, EPOCHS),  # of six images
    ],
    ids=["bfloat16", "average and AdamW", "micro-batches", "epochs"],
)
def test_resumed_equals_uninterrupted(distilled, name, stop, opts):
    opts = ["SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", (), *opts]
    whole = train(distilled(name, opts, "whole"))
    assert whole.max_iter == (6 if opts[-len(EPOCHS) :] == EPOCHS else 2)
    cfg = distilled(name, opts, "stopped")
    train_and_stop(cfg, stop)
    parts = train(cfg, resume=True)
    assert 0 < parts.start_iter <= stop
    assert_equal_states(whole.model.state_dict(), parts.model.state_dict())
    states = [t._trainer.optimizer.state_dict()["state"] for t in (whole, parts)]
    for first, second in zip(*(state.values() for state in states)):
        assert all(torch.equal(first[key], second[key]) for key in first if first[key] is not None)
    if whole.average is not None:
        assert_equal_states(whole.average.model.state_dict(), parts.average.model.state_dict())


@pytest.mark.slow
@BOTH
def test_bfloat16_is_close_to_float32(distilled, name):
    wanted = run_steps(build(distilled(name, [], "plain")))
    half = build(distilled(name, BF16, "half"))
    found = run_steps(half)
    for key in (key for key in wanted if "loss" in key):
        # Which regions are sampled changes with the last digit.
        bound = 0.3 if key in ("loss_classifier", "loss_box_reg", "total_loss") else 0.06
        assert found[key] == pytest.approx(wanted[key], rel=bound, abs=1e-2), key
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in half.model.parameters())


@pytest.mark.slow
def test_a_teacher_in_bfloat16_of_a_student_in_float32(distilled):
    losses = run_steps(build(distilled(MOBILE, ["MOKD.TEACHER.PRECISION", "bfloat16"])))
    assert losses["loss_output_classes"] > 0


@pytest.mark.parametrize(
    "name", [MOBILE, pytest.param("fcos_resnet50_fpn", marks=pytest.mark.slow)]
)
def test_boxes_stay_float32_in_bfloat16(torchvision_cfg, name):
    """torchvision decodes boxes in the type of its heads: 4 pixels are one step from 512 on."""
    cfg = torchvision_cfg(name)
    model = random_detector(cfg).eval()
    pool_in_float32(model)
    images = model.preprocess_image(model.prepare(training_batch(cfg)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        reader, features = build_box_reader(model, "teacher"), model.backbone(images.tensor)
        assert {x.dtype for x in features.values()} == {torch.bfloat16}
        state = reader.run(features)
        boxes = reader.propose(state, images, 5)
        assert all(x.dtype == torch.float32 and len(x) for x in boxes)
        assert reader.at(state, boxes, images.image_sizes).boxes.dtype == torch.float32


@pytest.mark.slow
@BOTH
def test_micro_batches_are_the_mean_of_their_gradients(distilled, name):
    opts = ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MICRO_BATCHES", 2]
    trainer = build(distilled(name, [*opts, "SOLVER.CLIP_GRADIENTS.ENABLED", False]))
    step, model = trainer._trainer, trainer.model
    data, before = next(iter(step.data_loader)), copy.deepcopy(model.state_dict())
    run_steps(trainer)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.load_state_dict(before)
    model.zero_grad()
    torch.manual_seed(hash((step.seed, 0, 0)) % 2**63)
    with EventStorage(0):
        for part in (data[:2], data[2:]):
            objectives = model(part)
            step.boundary.start()
            (sum(sum(parts.values()) for parts in objectives.values()) / 2).backward()
    for key, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[key], rtol=1e-3, atol=1e-5), key


@pytest.mark.slow
@BOTH
def test_the_running_mean_is_evaluated_and_saved(distilled, name):
    cfg = distilled(name, ["SOLVER.EMA_DECAY", 0.3, "SOLVER.MAX_ITER", 2])
    trainer, evaluated = build(cfg), []
    trainer.average.model.register_forward_hook(lambda *_: evaluated.append(1))
    trainer.train()
    saved = torch.load(Path(cfg.OUTPUT_DIR, "model_final.pth"), weights_only=True)
    assert evaluated
    assert_equal_states(saved["model"], trainer.average.model.state_dict())
    assert_equal_states(saved["student"], trainer.model.student.state_dict())
    plain = get_model(name, weights=None, weights_backbone=None, num_classes=2)
    plain.load_state_dict(saved["model"])


# ---- two processes ------------------------------------------------------------------------------


def steps(config_file, rank=None):
    """
    Three steps on two images of one size, or on one of them; the state. BatchNorm is frozen, and as
    many regions of each image are sampled, the first ones.
    """
    cfg = load_config(config_file)
    prepare_datasets(cfg, task_of(cfg))
    mapper = build_train_mapper(in_own_size(cfg))
    batch = [mapper(x) for x in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[:2]]
    batch = batch if rank is None else batch[rank : rank + 1]
    seed_all_rng(rank or 0)  # ranks start apart, and are made equal
    randperm, torch.randperm = torch.randperm, lambda n, **kwargs: torch.arange(n)
    try:
        _, model = balanced_steps(cfg, batch)
    finally:
        torch.randperm = randperm
    return model.state_dict()


def on_rank(rank, config_file):
    return steps(config_file, rank)


@pytest.mark.slow
def test_two_ranks_equal_one(distilled, tmp_path):
    opts = [f"{NODE}.WEIGHTS", "DEFAULT", f"{NODE}.DOWNLOAD", False, "INPUT.RANDOM_FLIP", "none"]
    cfg = distilled(MOBILE, [*opts, "SOLVER.BASE_LR", 1e-3])
    cfg.MODEL.TORCHVISION_DETECTOR.OPTIONS.rpn_batch_size_per_image = 32
    path = tmp_path / "run.yaml"
    path.write_text(cfg.dump())
    first, second = on_two_ranks(on_rank, tmp_path, str(path))
    for key, value in steps(str(path)).items():
        assert torch.equal(first[key], second[key]), key
        assert torch.allclose(first[key].float(), value.float(), rtol=1e-3, atol=5e-4), key
