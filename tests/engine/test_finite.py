# Copyright (c) The mokd_det authors.
"""Gradients and weights that are not finite: nothing changes, and the message names them."""

import copy
import functools
import os

import mokd_det.compat  # noqa: F401  (first: the other processes have no conftest)
import pytest
import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from mokd_det.balancing import Decision
from mokd_det.config import load_config
from mokd_det.data.classification import Batch
from mokd_det.engine import BalancedTrainer, DistillationTrainer, Trainer
from mokd_det.engine.finite import SkippedSteps, non_finite, origin_of
from mokd_det.engine.trainer import wrap_distributed
from mokd_det.engine.validate import validate

from ..conftest import ROOT
from .helpers import Constant, on_two_ranks
from .test_classification import RANK_OPTS
from .test_step import BF16, FAMO, FP16, PARAMETERS, build, run_steps
from .test_trainer import assert_equal_states

NAN, INF = float("nan"), float("inf")
SKIP = ["SOLVER.NON_FINITE_GRADIENTS", "skip"]
SCRATCH = ["MOKD.ENABLED", False, "DATALOADER.RESUMABLE", True]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", range(3))
def test_one_element_is_found(bad, where):
    tensors = {f"t{i}": torch.full((2, 5), 1e30, dtype=torch.float32) for i in range(3)}
    tensors["half"], tensors["none"] = torch.ones(3, dtype=torch.bfloat16), torch.ones(0)
    assert non_finite(tensors) == []  # though squares overflow
    tensors[f"t{where}"][1, 3] = bad
    assert non_finite(tensors) == [f"t{where}"]
    assert non_finite({}) == []


def test_whose_gradient_it_is():
    parts = torch.ones(2, 3, 3)
    weights = torch.ones(3)
    names, levels = ("task", "features", "outputs"), ("p3", "p4")
    assert "still finite" in origin_of(Decision(weights, None, weights, parts=parts), names, levels)
    parts[1, 2, :] = parts[1, :, 2] = NAN
    parts[:, 1, 1] = INF
    decision = Decision(weights, None, weights, parts=parts)
    assert "features (at p3, p4), outputs (at p4). " in origin_of(decision, names, levels)
    assert "from features, outputs. " in origin_of(decision, names, [])
    assert origin_of(None, names, levels) == origin_of(
        Decision(weights, None, weights), names, levels
    )


class Poison(torch.autograd.Function):
    """The identity, whose gradient is NaN while ``poisoned``."""

    poisoned = True

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * NAN if Poison.poisoned else gradient


@pytest.fixture
def poison(monkeypatch):
    """From a module to the same with a NaN in its backward pass (or a value), while it is on."""

    def put(module, value=False):
        monkeypatch.setattr(Poison, "poisoned", True)
        forward = module.forward

        def poisoned(*args):
            outputs = forward(*args)
            if value and Poison.poisoned:
                return outputs * NAN
            return Poison.apply(outputs)

        monkeypatch.setattr(module, "forward", poisoned)
        return lambda: monkeypatch.setattr(Poison, "poisoned", False)

    return put


def state_of(trainer):
    step = trainer._trainer
    balancer = step.boundary.balancer
    rule = balancer.state_dict() if balancer else {}
    average = trainer.average.model.state_dict() if trainer.average else {}
    numbers = [v for m in trainer.model.modules() for v in vars(m).values() if type(v) is float]
    state = [trainer.model.state_dict(), step.optimizer.state_dict(), rule, average, numbers]
    return copy.deepcopy(state)


def assert_equal(first, second):
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for pair in zip(first, second):
            assert_equal(*pair)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


@pytest.fixture
def make(make_cfg, make_digits_cfg):
    """From a name of CONFIGS, or "digits", and overrides to (trainer, a module of its network)."""

    def trainer_and_module(name, opts):
        if name == "digits":
            trainer = build(make_digits_cfg(opts))
            return trainer, trainer.model.student.network.stage3
        trainer = build(make_cfg(name, ["MOKD.ENABLED", True, *opts]))
        student = getattr(trainer.model, "student", trainer.model)
        return trainer, student.backbone.bottom_up.res4

    return trainer_and_module


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name, opts, words",
    [
        ("digits", [], "every objective is still finite.*Parameters: student.network"),
        ("digits", PARAMETERS, "comes from task, features, logits. Parameters"),
        ("digits", BF16, "still finite"),
        ("digits", ["SOLVER.MICRO_BATCHES", 2], "still finite"),
        ("digits", ["MOKD.ENABLED", False], "not taken. Parameters: student"),
        slow("mokd", [], "every objective is still finite.*Parameters: student.backbone"),
        slow("retinanet", SCRATCH, "not taken. Parameters: student"),
    ],
)
def test_it_stops_before_the_weights_change(make, poison, name, opts, words):
    trainer, module = make(name, opts)
    poison(module)
    before = copy.deepcopy(dict(trainer.model.named_parameters()))
    message = f"not finite in iteration 0, .*{words}.*Losses: loss_.*SOLVER.NON_FINITE_GRADIENTS"
    with pytest.raises(FloatingPointError, match=message):
        run_steps(trainer)
    assert_equal_states(before, dict(trainer.model.named_parameters()))


def test_objective_and_level_are_named(make_cfg):
    trainer = build(make_cfg("mokd"))
    trainer.model.objectives["features"].loss = lambda student, teacher: (student * NAN).sum()
    message = r"comes from features .at p3, p4.\..*features nan"
    with pytest.raises(FloatingPointError, match=message):
        run_steps(trainer)


@pytest.mark.parametrize("clip", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_detectron2s_own_step_stops_too(make_cfg, poison, clip):
    opts = ["SOLVER.CLIP_GRADIENTS.ENABLED", clip, "MOKD.ENABLED", False]
    trainer = build(make_cfg("faster_rcnn", opts))
    assert type(trainer) is Trainer
    poison(trainer.model.backbone.bottom_up.res4)
    before = copy.deepcopy(dict(trainer.model.named_parameters()))
    with pytest.raises(FloatingPointError, match="iteration 0.*Parameters: backbone.*loss_rpn_cls"):
        run_steps(trainer)
    assert_equal_states(before, dict(trainer.model.named_parameters()))
    assert not trainer._trainer.optimizer.state_dict()["state"]


@pytest.mark.parametrize(
    "name, opts, value",
    [
        ("digits", [*FAMO, "SOLVER.EMA_DECAY", 0.9], False),
        ("digits", ["MOKD.BALANCING.RULE", "loss_ratio", "SOLVER.MICRO_BATCHES", 2], True),
        ("digits", [*PARAMETERS, "MOKD.BALANCING.INTERVAL", 2], True),
        ("digits", ["MOKD.ENABLED", False], True),
        slow("mokd", [*FAMO, "SOLVER.EMA_DECAY", 0.9], False),
        slow("retinanet", SCRATCH, True),
    ],
)
def test_a_skipped_step_leaves_nothing(make, poison, name, opts, value):
    """Neither NaN of the backward pass nor of the forward one, which reaches BatchNorm, too."""
    trainer, module = make(name, [*opts, *SKIP])
    step = trainer._trainer
    run_steps(trainer)
    off = poison(module, value)
    before = state_of(trainer)
    for count in (1, 2):
        assert run_steps(trainer)["skipped_steps"] == count
    assert_equal(before, state_of(trainer))
    assert step.skipped.state_dict() == {"total": 2, "in_a_row": 2}
    off()
    logged = run_steps(trainer)
    assert logged["skipped_steps"] == 2 and step.skipped.in_a_row == 0
    after = trainer.model.state_dict()
    assert not all(torch.equal(value, after[name]) for name, value in before[0].items())


def test_skips_in_a_row_are_bounded_and_survive_a_checkpoint(caplog):
    steps = SkippedSteps("skip", 2)
    for _ in range(2):
        steps.add("It is so.")
        steps.taken()
    steps.add("It is so.")
    other = SkippedSteps("skip", 2)
    other.load_state_dict(steps.state_dict())
    other.add("It is so.")
    with pytest.raises(FloatingPointError, match="It is so. So were those of the 2 steps before"):
        other.add("It is so.")
    assert other.total == 4 and "It is step 4 that is left out" in caplog.text


def test_the_schedule_goes_on(make, poison):
    opts = [*SKIP, "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", (2,)]
    trainer, module = make("digits", [*opts, "SOLVER.MAX_ITER", 4, "DATASETS.TEST", ()])
    off = poison(module)
    step = trainer._trainer.run_step

    def run_step():
        if trainer.iter == 2:
            off()
        step()

    trainer._trainer.run_step = run_step
    trainer.train()
    assert trainer.scheduler.last_epoch == 4 and trainer._trainer.skipped.total == 2
    assert trainer._trainer.optimizer.param_groups[0]["lr"] == pytest.approx(
        0.1 * trainer.cfg.SOLVER.BASE_LR
    )


@pytest.mark.slow
def test_a_gradient_that_overflows_at_any_loss_scale_ends_the_run(make, poison):
    trainer, module = make("digits", FP16)
    poison(module)
    trainer._trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-31)
    assert run_steps(trainer)["skipped_steps"] == 1
    with pytest.raises(FloatingPointError, match="at any.*PRECISION 'bfloat16'"):
        run_steps(trainer, 2)


def nan_on_one_rank(rank, weights):
    """Return (skipped, state) of a step with NaN on the second rank and one without."""
    opts = [*RANK_OPTS, "MOKD.TEACHER.WEIGHTS", weights]
    cfg = load_config(str(ROOT / "configs/Digits/student_mokd.yaml"), opts)
    cfg.MOKD.TEACHER.CONFIG_FILE = str(ROOT / "configs/Digits/teacher.yaml")
    seed_all_rng(0)
    model = DistillationTrainer.build_model(cfg)
    optimizer = DistillationTrainer.build_optimizer(cfg, model)
    batch = Batch(torch.randint(256, (4, 3, 48, 48), dtype=torch.uint8), torch.arange(4))
    steps = SkippedSteps("skip")
    trainer = BalancedTrainer(wrap_distributed(model), Constant(batch), optimizer, 0, skipped=steps)
    objective, results = model.objectives["features"], []
    loss = objective.loss
    with EventStorage(0):
        for factor in (NAN, 1.0):
            if rank == 1:
                objective.loss = lambda *maps, factor=factor: loss(*maps) * factor
            trainer.run_step()
            results.append((steps.total, copy.deepcopy(model.state_dict())))
    return results


@pytest.mark.slow
def test_ranks_agree(tmp_path, digits_teacher_weights):
    ranks = on_two_ranks(nan_on_one_rank, tmp_path, digits_teacher_weights)
    for first, second in zip(*ranks):
        assert first[0] == second[0] == 1
        assert_equal_states(first[1], second[1])
        assert all(v.isfinite().all() for v in first[1].values())
    skipped, taken = (state for _, state in ranks[0])
    assert not all(torch.equal(value, taken[name]) for name, value in skipped.items())


@pytest.mark.parametrize("kind", ["parameter", "buffer", "average"])
def test_no_checkpoint_holds_nan(make_cfg, kind):
    name = "mokd" if kind == "average" else "faster_rcnn"
    cfg = make_cfg(name, ["SOLVER.EMA_DECAY", 0.9] if kind == "average" else [])
    trainer = build(cfg)
    trainer.checkpointer.save("good")
    model = trainer.average.model if kind == "average" else trainer.model
    with torch.no_grad():
        if kind == "buffer":
            model.backbone.bottom_up.register_buffer("mean", torch.tensor([1.0, NAN]))
        else:
            model.backbone.fpn_output3.weight[0, 0, 0, 0] = NAN
    message = "not written, because weights are not finite: model.backbone.*good.pth: "
    with pytest.raises(FloatingPointError, match=message):
        trainer.checkpointer.save("bad")
    assert trainer.checkpointer.get_checkpoint_file().endswith("good.pth")
    assert not os.path.exists(f"{cfg.OUTPUT_DIR}/bad.pth")


def test_a_mask_of_infinity_is_no_error(make_cfg):
    trainer = build(make_cfg("faster_rcnn"))
    trainer.model.register_buffer("mask", torch.full((2, 2), -INF))
    trainer.checkpointer.save("good")


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SOLVER.NON_FINITE_GRADIENTS", "ignore"], "NON_FINITE_GRADIENTS is 'ignore': expected"),
        (
            [*SKIP, "SOLVER.MAX_SKIPPED_STEPS", 0],
            "MAX_SKIPPED_STEPS is 0: expected an integer >= 1",
        ),
        (["SOLVER.MAX_SKIPPED_STEPS", 3], "MAX_SKIPPED_STEPS is 3, but it is read with"),
    ],
)
def test_refused(make_cfg, opts, message):
    with pytest.raises(ValueError, match=message):
        validate(make_cfg("mokd", opts))


def test_skipping_without_a_teacher_has_our_step(make_cfg):
    assert type(build(make_cfg("faster_rcnn", SKIP))) is DistillationTrainer
