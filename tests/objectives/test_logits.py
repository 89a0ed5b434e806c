# Copyright (c) The mokd_det authors.
"""The objective that matches class probabilities."""

from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mokd_det.data.classification import Batch
from mokd_det.engine import validate
from mokd_det.objectives import LogitObjective, StudentOutputs
from mokd_det.teachers import PRE_LOGITS, ClassifierTeacherOutputs

from ..modeling.classifiers import digit_batch, gradients


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_it_is_hintons(temperature):
    torch.manual_seed(0)
    head, given, wanted = nn.Linear(5, 3), torch.randn(7, 5), torch.randn(7, 3)
    outputs = ClassifierTeacherOutputs({}, wanted)
    losses = LogitObjective(head, temperature)(StudentOutputs({PRE_LOGITS: given}, None), outputs)
    p = F.softmax(wanted / temperature, 1)
    expected = (p * (p.log() - F.log_softmax(head(given) / temperature, 1))).sum(1).mean()
    assert torch.allclose(losses["loss_logits"], expected * temperature**2)


@pytest.mark.parametrize("mixed", [False, True])
def test_it_is_dkd_of_the_labels(mixed):
    """
    Eq. 7 at T = 2. Of the label 0.1 and 0.25; of the others 2/3, 1/3 and 2/3, 1/3, so nothing: its
    part is zero though the teacher's own class is another. A mixed image has its larger share.
    """
    head, temperature = nn.Linear(3, 3, bias=False), 2.0
    nn.init.eye_(head.weight)
    given = temperature * torch.tensor([[0.25, 0.5, 0.25]]).log()
    wanted = temperature * torch.tensor([[0.1, 0.6, 0.3]]).log()
    targets = torch.tensor([[0.7, 0.3, 0.0]]) if mixed else torch.tensor([0])
    batch = Batch(torch.zeros(1, 3, 1, 1), targets)
    objective = LogitObjective(head, temperature, "dkd", 8.0)
    outputs = ClassifierTeacherOutputs({}, wanted)
    loss = objective(StudentOutputs({PRE_LOGITS: given}, batch), outputs)["loss_logits"]
    expected = temperature**2 * (0.1 * log(0.1 / 0.25) + 0.9 * log(0.9 / 0.75))
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_it_is_dist():
    """Eq. 8 and 9 at T = 2: r is -1/2 over the classes of each row and over the rows of each."""
    head, temperature = nn.Linear(3, 3, bias=False), 2.0
    nn.init.eye_(head.weight)
    given = torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.2, 0.3], [0.3, 0.5, 0.2]]).log() * temperature
    outputs = ClassifierTeacherOutputs({}, given.roll(1, 0))
    objective = LogitObjective(head, temperature, "dist")
    loss = objective(StudentOutputs({PRE_LOGITS: given}, None), outputs)["loss_logits"]
    assert loss.item() == pytest.approx(temperature**2 * 3.0, rel=1e-4)


def test_the_second_run_of_the_head_leaves_no_trace():
    """Neither in running statistics nor in the random numbers of the run that follows."""
    head = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5, inplace=True), nn.Linear(5, 3))
    seen = []
    head.register_forward_hook(lambda *_: seen.append(1))
    objective = LogitObjective(head)
    given, outputs = torch.randn(7, 5), ClassifierTeacherOutputs({}, torch.randn(7, 3))
    before, kept = {k: v.clone() for k, v in head.state_dict().items()}, given.clone()
    torch.manual_seed(1)
    objective(StudentOutputs({PRE_LOGITS: given}, None), outputs)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn) and torch.equal(given, kept)
    assert not seen and all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
    assert not list(objective.parameters()) and len(objective.used_parameters().borrowed) == 4


def test_a_temperature_that_is_not_positive(make_digits_cfg):
    with pytest.raises(ValueError, match="LOGITS.TEMPERATURE is 0.0: expected a finite number > 0"):
        validate(make_digits_cfg(["MOKD.LOGITS.TEMPERATURE", 0.0]))


@pytest.mark.parametrize(
    "opts, message",
    [
        (["LOSS", "mse"], "MOKD.LOGITS.LOSS is 'mse': expected one of 'kl', 'dkd', 'dist'"),
        (["DKD_BETA", 8.0], "MOKD.LOGITS.DKD_BETA is 8.0, but it is read with LOSS 'dkd' only"),
    ],
)
def test_bad_options_are_explained(make_digits_cfg, opts, message):
    with pytest.raises(ValueError, match=message):
        validate(make_digits_cfg([f"MOKD.LOGITS.{opts[0]}", *opts[1:]]))


def test_other_classes_have_no_common_logits(build):
    with pytest.raises(ValueError, match="student has 7 classes and the teacher 10"):
        build(["MODEL.CLASSIFIER.NUM_CLASSES", 7])
    opts = ["MODEL.CLASSIFIER.NUM_CLASSES", 7, "MOKD.OBJECTIVES", ["features"]]
    gradients(build(opts), batch=digit_batch(classes=7))


def test_soft_targets_of_mixed_images(build):
    batch = digit_batch()
    probabilities = F.one_hot(batch.targets, 10).float()
    mixed = Batch(batch.images.float(), 0.7 * probabilities + 0.3 * probabilities.roll(1, 0))
    model = build()
    soft = model(mixed)["task"]["loss_cls"]
    first = model(batch)["task"]["loss_cls"]
    second = model(Batch(batch.images, batch.targets.roll(1, 0)))["task"]["loss_cls"]
    assert soft.item() == pytest.approx(0.7 * first.item() + 0.3 * second.item(), rel=1e-4)
    assert model(mixed)["logits"]["loss_logits"].isfinite()
