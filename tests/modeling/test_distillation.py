# Copyright (c) The mokd_det authors.
"""The distillation model: the same meta-architecture for every task."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import EventStorage

from mokd_det.engine import DistillationTrainer
from mokd_det.modeling import DistillationModel, StrictCheckpointer
from mokd_det.tasks import task_of

from ..conftest import OUTPUTS
from .families import batch_of, step

FAMO = ["MOKD.BALANCING.RULE", "famo"]


def test_one_meta_architecture_for_every_task(make_cfg, make_digits_cfg):
    for cfg in (make_cfg("mokd"), make_digits_cfg()):
        model = META_ARCH_REGISTRY.get(cfg.MOKD.META_ARCHITECTURE)(cfg, task=task_of(cfg))
        assert type(model) is DistillationModel and type(model.task) is type(task_of(cfg))
        assert model.names == ["task", *task_of(cfg).objectives(cfg)]
        assert model.names == ["task", *model.objectives]


def test_student_is_stock_outside_training(make_cfg):
    cfg = make_cfg("mokd")
    model = DistillationTrainer.build_model(cfg)
    step(model, batch_of(cfg))
    assert not model.student.backbone._forward_hooks


def test_names_of_what_trains_besides_the_student(make_cfg):
    """The student's heads, which "outputs" borrows, stay the student's."""
    model = DistillationTrainer.build_model(make_cfg("mokd", OUTPUTS))
    others = [name for name, _ in model.named_parameters() if not name.startswith("student.")]
    prefix, suffix = "objectives.features.projectors.", ".student.parametrizations.weight.original"
    assert others == [f"{prefix}{level}{suffix}" for level in ("p3", "p4")]
    frozen = [f"{prefix}{level}.teacher_weight" for level in ("p3", "p4")]
    state = model.state_dict()
    assert {key for key in state if not key.startswith("student.")} == {*others, *frozen}


def test_a_second_forward_has_the_teachers_outputs_of_the_first(make_cfg):
    """Where the rule wants the losses of the same batch after the step."""
    cfg = make_cfg("mokd", OUTPUTS)
    batch = batch_of(cfg)
    model = DistillationTrainer.build_model(cfg)
    step(model, batch)
    assert model.teacher_outputs is None
    model = DistillationTrainer.build_model(make_cfg("mokd", [*OUTPUTS, *FAMO]))
    torch.manual_seed(0)
    first, _ = step(model, batch)
    outputs, model.teacher.run = model.teacher_outputs, None  # which is not run again
    torch.manual_seed(0)
    with torch.no_grad(), EventStorage(0):
        second = model(batch, outputs)
    for name, losses in first.items():
        for key, loss in losses.items():
            assert torch.equal(loss, second[name][key]), key


def test_a_student_that_runs_its_backbone_twice_is_refused(make_cfg):
    cfg = make_cfg("mokd")
    model = DistillationTrainer.build_model(cfg)
    preprocess = model.student.preprocess_image

    def run_twice(batched_inputs):
        images = preprocess(batched_inputs)
        model.student.backbone(images.tensor)
        return images

    model.student.preprocess_image = run_twice
    with pytest.raises(RuntimeError, match="ran 2 times in one forward"):
        step(model, batch_of(cfg))
    assert not model.student.backbone._forward_hooks


def test_an_unknown_meta_architecture(make_cfg):
    with pytest.raises(
        ValueError, match="META_ARCHITECTURE is 'No', which is not in META_ARCH_REG"
    ):
        DistillationTrainer.build_model(make_cfg("mokd", ["MOKD.META_ARCHITECTURE", "No"]))


def test_strict_loading_takes_what_fits(make_cfg, tmp_path):
    model = build_model(make_cfg("faster_rcnn"))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    StrictCheckpointer(model).load(str(tmp_path / "model.pth"))
