# Copyright (c) The mokd_det authors.
"""A step that does not measure has the gradients of one that does, and runs heads once."""

import pytest
import torch
from torch import nn

from mokd_det.engine import DistillationTrainer
from mokd_det.modeling import module_numbers, set_module_numbers
from mokd_det.modeling.once import run_once

from .classifiers import gradients
from .families import batch_of, families, step
from .torchvision_models import models, torchvision_cfg, training_batch

__all__ = ["torchvision_cfg"]

FIXED = [
    *("MOKD.BALANCING.RULE", "fixed", "MOKD.BALANCING.FIXED.WEIGHTS", [1.0, 0.5, 2.0]),
    *("MOKD.BALANCING.INTERVAL", 3),
]
BOTH = ["MOKD.ENABLED", True, "MOKD.OBJECTIVES", ["teacher_head", "outputs"]]


def gradients_and_calls(model, batch):
    """After one step: the decision, gradients by name, buffers, and calls of the shared heads."""
    heads = model.objectives["outputs"].heads()
    calls = [0] * len(heads)
    for i, head in enumerate(heads):
        forward = type(head).forward

        def counted(*args, i=i, head=head, forward=forward):
            calls[i] += 1
            return forward(head, *args)

        head.forward = counted
    model.zero_grad()
    torch.manual_seed(1)  # boxes are sampled
    _, decision = step(model, batch)
    for head in heads:
        del head.forward
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    buffers = {n: b.clone() for n, b in model.student.named_buffers()}
    return decision, gradients, buffers, calls


def assert_a_sum_step_is_a_measured_one(model, batch):
    balancer = model.boundary.balancer
    state = {n: b.clone() for n, b in model.student.named_buffers()}
    numbers = module_numbers(model.student)
    measured, wanted, buffers, twice = gradients_and_calls(model, batch)
    assert measured.gram is not None and balancer.step == 1
    for name, buffer in model.student.named_buffers():
        buffer.copy_(state[name])
    set_module_numbers(model.student, numbers)
    summed, found, after, once = gradients_and_calls(model, batch)
    assert summed.gram is None and torch.equal(summed.weights, measured.weights)
    assert torch.allclose(summed.losses, measured.losses.float(), rtol=1e-4)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        # Of a bias before a BatchNorm there is nothing but rounding.
        assert (gradient - wanted[name]).norm() < 2e-3 * wanted[name].norm() + 1e-5, name
    for name, buffer in after.items():
        assert torch.allclose(buffer, buffers[name], rtol=1e-5), name
    assert once == [1] * len(twice) and twice == [2] * len(twice)


@pytest.mark.parametrize("family", families())
def test_detectors(family_cfg, family):
    cfg = family_cfg(family, [*BOTH, *FIXED])
    model = DistillationTrainer.build_model(cfg)
    assert_a_sum_step_is_a_measured_one(model, batch_of(cfg))
    # RPNs with other anchors are not compared.
    assert bool(model.objectives["outputs"].heads()) == (family[-2:] not in ("C4", "C5"))


@pytest.mark.parametrize("name", models())
def test_torchvision_detectors(torchvision_cfg, make_cfg, name):
    teacher = make_cfg("mokd").MOKD.TEACHER
    opts = [
        "MOKD.TEACHER.CONFIG_FILE",
        teacher.CONFIG_FILE,
        "MOKD.TEACHER.WEIGHTS",
        teacher.WEIGHTS,
    ]
    cfg = torchvision_cfg(name, opts=[*opts, *BOTH, *FIXED])
    model = DistillationTrainer.build_model(cfg)
    assert_a_sum_step_is_a_measured_one(model, training_batch(cfg))


def test_classifiers(make_digits_cfg):
    """Logits are read before the head drops out, in both kinds of steps."""
    torch.manual_seed(1)
    model = DistillationTrainer.build_model(make_digits_cfg(FIXED)).train()
    torch.manual_seed(2)
    wanted = gradients(model)
    assert model.boundary.last.gram is not None
    torch.manual_seed(2)
    found = gradients(model)
    assert model.boundary.last.gram is None
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() < 2e-3 * wanted[name].norm() + 1e-5, name


def test_run_once_knows_tensors_by_identity_and_leaves_the_module_as_it_was():
    module = nn.Linear(2, 2)
    x, equal = torch.ones(1, 2), torch.ones(1, 2)
    with run_once([module, module]):
        first = module(x)
        assert module(x) is first
        assert module(equal) is not first
        assert module(x) is first
    assert "forward" not in vars(module)
    module.forward = own = lambda x: x
    with pytest.raises(RuntimeError), run_once([module]):
        raise RuntimeError
    assert module.forward is own
