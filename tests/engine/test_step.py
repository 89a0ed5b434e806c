# Copyright (c) The mokd_det authors.
"""The step's options: each is exact, or refused before any data is read."""

import copy
import dataclasses
import logging

import pytest
import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from mokd_det.balancing import Decision
from mokd_det.engine import BalancedTrainer, DistillationTrainer, Trainer, build_trainer
from mokd_det.engine.diagnostics import BalanceDiagnostics
from mokd_det.engine.replay import Replay
from mokd_det.engine.validate import validate
from mokd_det.modeling import SupervisedModel

from ..conftest import OUTPUTS, OUTPUTS_ONLY
from .helpers import train_and_stop
from .test_trainer import EVALUATED, assert_equal_states, train


def build(cfg):
    seed_all_rng(cfg.SEED)
    trainer = build_trainer(cfg)
    trainer.resume_or_load(False)
    return trainer


def run_steps(trainer, count=1):
    """Return what the last step logged."""
    with torch.jit.optimized_execution(False), EventStorage(0) as storage:
        for trainer.iter in range(count):
            trainer.run_step()
            storage.iter += 1
        return {key: value for key, (value, _) in storage.latest().items()}


PARAMETERS = ["MOKD.BALANCING.MEASURE_AT", "parameters"]
FAMO = ["MOKD.BALANCING.RULE", "famo"]
BF16 = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"]
FP16 = ["SOLVER.AMP.ENABLED", True]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["features", "parameters"])
@pytest.mark.parametrize("name", ["mokd", "retinanet"])
def test_bfloat16_is_close_to_float32(make_cfg, name, where):
    opts = ["MOKD.ENABLED", True, "MOKD.BALANCING.MEASURE_AT", where, *OUTPUTS]
    plain = build(make_cfg(name, opts, "plain"))
    wanted = run_steps(plain)
    half = build(make_cfg(name, [*opts, *BF16], "half"))
    got = run_steps(half)
    for key, value in wanted.items():
        if "loss" in key:
            assert got[key] == pytest.approx(value, rel=0.06, abs=3e-3), key
    grams = [t._trainer.boundary.last.gram for t in (plain, half)]
    # An untrained network, whose sampled boxes differ: norms within 25 %. Tighter on fixed samples
    # in tests/balancing.
    assert torch.allclose(grams[0].diagonal().sqrt(), grams[1].diagonal().sqrt(), rtol=0.25)
    cosine = f"balance/{where}/cosine_features"
    assert got[cosine] == pytest.approx(wanted[cosine], abs=0.15)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in half.model.parameters())


def test_float16_skips_overflowing_steps_without_a_trace(make_cfg):
    trainer = build(make_cfg("mokd", [*FAMO, *FP16, "SOLVER.EMA_DECAY", 0.9]))
    step = trainer._trainer
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = copy.deepcopy(trainer.model.student.state_dict())
    run_steps(trainer)
    assert step.grad_scaler.get_scale() == 2.0**99
    balancer = step.boundary.balancer
    assert balancer.step == 0 and balancer.rule.xi is None and balancer.weights is None
    assert trainer.average.state_dict() == {"steps": 0}
    for name, parameter in trainer.model.student.named_parameters():
        assert torch.equal(parameter, before[name]), name

    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run_steps(trainer)
    assert balancer.step == 1 and balancer.rule.xi.any()
    assert trainer.average.state_dict() == {"steps": 1}
    assert step.boundary.last.fallback == ""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["features", "parameters"])
def test_float16_is_close_to_float32_in_unscaled_numbers(make_cfg, where):
    # Not the default rule, which gives a cosine near zero no weight at all.
    opts = ["MOKD.BALANCING.MEASURE_AT", where, "MOKD.BALANCING.RULE", "min_norm"]
    plain = build(make_cfg("mokd", opts, "plain"))
    run_steps(plain)
    half = build(make_cfg("mokd", [*opts, *FP16], "half"))
    half._trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run_steps(half)
    first, second = (t._trainer.boundary.last for t in (plain, half))
    # Sampled boxes differ between the two; a forgotten scale would be a factor of 2^20.
    assert torch.allclose(first.gram.diagonal().sqrt(), second.gram.diagonal().sqrt(), rtol=0.25)
    assert torch.allclose(first.weights, second.weights, rtol=0.25)


def test_micro_batches_at_features_are_the_mean_of_their_gradients(make_cfg):
    opts = ["MOKD.BALANCING.RULE", "fixed", "SOLVER.MICRO_BATCHES", 2]
    opts += ["SOLVER.CLIP_GRADIENTS.ENABLED", False]
    trainer = build(make_cfg("mokd", opts))
    step, model = trainer._trainer, trainer.model
    data = next(iter(step.data_loader))
    before = copy.deepcopy(model.state_dict())
    logged = run_steps(trainer)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}

    model.load_state_dict(before)
    model.zero_grad()
    torch.manual_seed(hash((step.seed, 0, 0)) % 2**63)
    losses = []
    with EventStorage(0):
        for part in (data[:1], data[1:]):
            objectives = model(part)
            losses.append(sum(sum(parts.values()) for parts in objectives.values()) / 2)
            step.boundary.start()
            losses[-1].backward()
    assert logged["total_loss"] == pytest.approx(sum(losses).item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("opts", [[], OUTPUTS], ids=["features", "outputs"])
@pytest.mark.parametrize("name", ["mokd", "retinanet"])
def test_second_forward_is_the_first_one_again(make_cfg, name, opts):
    """Unchanged parameters give the same losses, and nothing else is left of it."""
    trainer = build(make_cfg(name, ["MOKD.ENABLED", True, *FAMO, *opts]))
    model, batch = trainer.model, next(iter(trainer._trainer.data_loader))
    replay = Replay(model)
    with torch.jit.optimized_execution(False), EventStorage(0) as storage:
        torch.manual_seed(3)
        torch.rand(5)
        replay.before(batch)
        objectives = model(batch)
        replay.after()
        teacher_runs = []
        model.teacher.run = lambda *args: teacher_runs.append(args)
        model.teacher.ask = lambda *args: teacher_runs.append(args)
        losses = torch.stack([sum(parts.values()) for parts in objectives.values()])
        state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        numbers = {k: v for k, v in vars(model.student).items() if isinstance(v, float)}
        logged = copy.deepcopy(storage.latest())
        again = replay.losses(trainer._trainer.autocast)
        assert torch.equal(again, losses.detach())
        assert_equal_states(state, model.state_dict())
        assert torch.equal(random_state, torch.get_rng_state())
        assert numbers == {k: v for k, v in vars(model.student).items() if isinstance(v, float)}
        assert storage.latest() == logged
    assert teacher_runs == [] and model.teacher_outputs is None


def test_famo_learns_from_the_same_batch(make_cfg):
    trainer = build(make_cfg("mokd", [*FAMO, "MOKD.BALANCING.INTERVAL", 3]))
    rule = trainer._trainer.boundary.balancer.rule
    run_steps(trainer)
    first = rule.xi.detach().clone()
    assert first.abs().max() == pytest.approx(0.025, rel=1e-3)  # Adam's first step
    trainer.iter = trainer._trainer.iter = 1
    with EventStorage(1):
        trainer.run_step()
    assert torch.equal(rule.xi.detach(), first)  # not due: no second forward


@pytest.mark.slow
@pytest.mark.parametrize(
    "opts",
    [
        FAMO,
        [*PARAMETERS, "SOLVER.MICRO_BATCHES", 2],
        ["SOLVER.EMA_DECAY", 0.9, "MOKD.BALANCING.INTERVAL", 3],
        # Stopped between two measurements; heads run once in the second and the fourth step.
        [*OUTPUTS, "MOKD.BALANCING.INTERVAL", 3, "SOLVER.MICRO_BATCHES", 2],
        BF16,
        [*FP16, *FAMO, "SOLVER.EMA_DECAY", 0.9],
        [*OUTPUTS, *FAMO],
        [*OUTPUTS, "MOKD.BALANCING.RULE", "loss_ratio", "MOKD.BALANCING.INTERVAL", 1],
        ["MOKD.ENABLED", False, "DATALOADER.RESUMABLE", True],
    ],
    ids=["famo", "parameters", "average", "interval", "bfloat16"]
    + ["float16", "outputs", "loss_ratio", "scratch"],
)
def test_resumed_equals_uninterrupted(make_cfg, opts):
    opts = ["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, *opts]
    whole = train(make_cfg("mokd", opts, "whole"))
    cfg = make_cfg("mokd", opts, "stopped")
    train_and_stop(cfg, 2)
    cfg.SEED = 12345
    second = train(cfg, resume=True)
    assert second.start_iter == 2
    assert_equal_states(whole.model.state_dict(), second.model.state_dict())
    if whole.average is not None:
        assert_equal_states(whole.average.model.state_dict(), second.average.model.state_dict())
    if "loss_ratio" in opts:
        means = [t._trainer.boundary.balancer.state_dict()["losses"] for t in (whole, second)]
        assert means[0]["count"] == means[1]["count"] == 4
        assert_equal_states(*({k: v for k, v in m.items() if k != "count"} for m in means))


def test_resuming_with_more_objectives_is_refused(make_cfg):
    trainer = build(make_cfg("mokd", ["MOKD.OBJECTIVES", ["features"]]))
    run_steps(trainer)
    other = build(make_cfg("mokd", ["MOKD.OBJECTIVES", ["features", "outputs"]], "other"))
    message = (
        "of the objectives task, features, and MOKD.OBJECTIVES has features, outputs .* new run"
    )
    with pytest.raises(ValueError, match=message):
        other._trainer.load_state_dict(trainer._trainer.state_dict())


def test_resuming_a_run_of_detectron2s_own_step_is_refused(make_cfg):
    state = build_trainer(make_cfg("mokd", ["MOKD.ENABLED", False]))._trainer.state_dict()
    other = build(make_cfg("mokd", ["MOKD.ENABLED", False, "SOLVER.MICRO_BATCHES", 2], "other"))
    with pytest.raises(ValueError, match="checkpoint is of Detectron2's own training step"):
        other._trainer.load_state_dict(state)


def test_resuming_with_or_without_a_teacher_as_before(make_cfg):
    """By outputs alone both have the same parameters, and nothing else would be noticed."""
    distilled = build(make_cfg("mokd", OUTPUTS_ONLY))
    run_steps(distilled)
    alone = build(make_cfg("faster_rcnn", ["DATALOADER.RESUMABLE", True], "alone"))
    run_steps(alone)
    with pytest.raises(ValueError, match="of a run with a teacher, and MOKD.ENABLED is False now"):
        alone._trainer.load_state_dict(distilled._trainer.state_dict())
    with pytest.raises(ValueError, match="of a run without a teacher, and MOKD.ENABLED is True no"):
        distilled._trainer.load_state_dict(alone._trainer.state_dict())
    stock = build_trainer(make_cfg("faster_rcnn", [], "stock"))
    with pytest.raises(ValueError, match="which Detectron2's own training step cannot go on with"):
        stock.load_state_dict(alone.state_dict())


def test_micro_batches_of_a_batch_that_will_be_scaled(make_cfg):
    opts = ["SOLVER.IMS_PER_BATCH", 8, "SOLVER.REFERENCE_WORLD_SIZE", 4]
    validate(make_cfg("mokd", [*opts, "SOLVER.MICRO_BATCHES", 2]))
    with pytest.raises(ValueError, match="MICRO_BATCHES is 4: expected a divisor of the 2 images"):
        validate(make_cfg("mokd", [*opts, "SOLVER.MICRO_BATCHES", 4]))


def test_retinanet_resumes_with_the_normaliser_of_its_loss(make_cfg):
    """A plain number of the model that Detectron2's checkpoints forget."""
    trainer = build(make_cfg("retinanet", ["MOKD.ENABLED", True]))
    run_steps(trainer)
    state = trainer._trainer.state_dict()
    other = build(make_cfg("retinanet", ["MOKD.ENABLED", True], "other"))
    other._trainer.load_state_dict(state)
    assert state["numbers"] == {"": {"loss_normalizer": trainer.model.student.loss_normalizer}}
    assert other.model.student.loss_normalizer == trainer.model.student.loss_normalizer


def test_average_is_what_is_evaluated_and_saved(make_cfg):
    cfg = make_cfg("mokd", ["SOLVER.EMA_DECAY", 0.3, *EVALUATED])
    trainer = build(cfg)
    student = trainer.model.student
    mean, evaluated = None, []
    step = trainer._trainer.run_step

    def run_step():
        nonlocal mean
        step()
        n = trainer.iter
        values = {k: v.clone() for k, v in student.state_dict().items()}
        decay = min(0.3, (1 + n) / (10 + n))
        if mean is None:
            mean = values
        for key, value in values.items():
            is_float = value.is_floating_point()
            mean[key] = decay * mean[key] + (1 - decay) * value if is_float else value

    trainer._trainer.run_step = run_step
    trainer.average.model.register_forward_hook(lambda *_: evaluated.append(1))
    with torch.jit.optimized_execution(False):
        trainer.train()
    for key, value in trainer.average.model.state_dict().items():
        assert torch.allclose(value, mean[key], rtol=1e-5, atol=1e-7), key
    assert evaluated and not torch.equal(
        mean["backbone.fpn_output3.weight"], student.backbone.fpn_output3.weight
    )
    checkpoint = torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)
    assert_equal_states(checkpoint["model"], trainer.average.model.state_dict())
    assert_equal_states(checkpoint["student"], student.state_dict())
    assert set(checkpoint) == {"model", "student", "objectives", "trainer", "iteration", "run"}

    # Weights to start from reach both.
    opts = ["SOLVER.EMA_DECAY", 0.3, "MODEL.WEIGHTS", f"{cfg.OUTPUT_DIR}/model_final.pth"]
    other = build(make_cfg("mokd", opts, "other"))
    assert_equal_states(checkpoint["model"], other.model.student.state_dict())
    assert_equal_states(checkpoint["model"], other.average.model.state_dict())


@pytest.mark.slow
def test_a_running_mean_may_begin_with_a_resumed_run_but_not_end(make_cfg):
    opts = ["SOLVER.CHECKPOINT_PERIOD", 2]
    cfg = make_cfg("mokd", [*opts, "SOLVER.MAX_ITER", 2])
    first = train(cfg)
    cfg.SOLVER.EMA_DECAY = 0.9
    second = build_trainer(cfg)
    second.resume_or_load(True)
    assert_equal_states(first.model.state_dict(), second.model.state_dict())
    cfg.SOLVER.MAX_ITER = 3
    train(cfg, resume=True)
    cfg.SOLVER.EMA_DECAY = 0.0
    third = build_trainer(cfg)
    with pytest.raises(ValueError, match="SOLVER.EMA_DECAY is 0, but the checkpoint"):
        third.resume_or_load(True)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["features", "parameters"])
def test_checkpointing_changes_nothing(make_cfg, where):
    opts = ["MOKD.BALANCING.MEASURE_AT", where, "MOKD.BALANCING.INTERVAL", 1]
    plain = train(make_cfg("mokd", opts, "plain"))
    cfg = make_cfg("mokd", [*opts, "MODEL.BACKBONE.CHECKPOINTING", True], "checkpointed")
    runs = []
    trainer = build(cfg)
    bottom_up = trainer.model.student.backbone.bottom_up
    bottom_up.res3[0].register_forward_pre_hook(lambda m, _: runs.append(1) if m.training else None)
    with torch.jit.optimized_execution(False):
        trainer.train()
    assert len(runs) == 3 * (3 if where == "parameters" else 2)  # it is at work
    assert_equal_states(plain.model.state_dict(), trainer.model.state_dict())


@pytest.mark.slow
def test_compiled_backbone_trains_alike_and_keeps_its_names(make_cfg):
    opts = ["SOLVER.MAX_ITER", 2]
    plain = train(make_cfg("mokd", opts, "plain"))
    compiled = train(make_cfg("mokd", [*opts, "MODEL.BACKBONE.COMPILE", "aot_eager"], "compiled"))
    first, second = plain.model.state_dict(), compiled.model.state_dict()
    assert list(first) == list(second)
    for key, value in first.items():
        assert torch.allclose(value, second[key], rtol=1e-3, atol=1e-4), key
    assert not torch.equal(first["student.backbone.fpn_output3.weight"], torch.zeros(()))


@pytest.mark.parametrize("kind", ["value", pytest.param("norm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["features", "parameters"])
def test_clipping_acts_on_the_balanced_gradient(make_cfg, kind, where):
    opts = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", kind]
    opts += ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e-3, "SOLVER.WEIGHT_DECAY", 0.0]
    trainer = build(make_cfg("mokd", [*opts, "MOKD.BALANCING.MEASURE_AT", where]))
    run_steps(trainer)
    sizes = [
        float(p.grad.abs().max() if kind == "value" else p.grad.norm())
        for p in trainer.model.parameters()
    ]
    assert max(sizes) == pytest.approx(1e-3, rel=1e-3)  # bound, and it binds


def test_a_student_without_a_teacher_takes_the_same_options(make_cfg):
    opts = ["SOLVER.MICRO_BATCHES", 2, "SOLVER.EMA_DECAY", 0.9, *BF16]
    cfg = make_cfg("faster_rcnn", opts)
    trainer = train(cfg)
    assert type(trainer) is DistillationTrainer and isinstance(trainer.model, SupervisedModel)
    checkpoint = torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)
    assert_equal_states(checkpoint["model"], trainer.average.model.state_dict())
    assert type(build(make_cfg("faster_rcnn", [], "stock"))) is Trainer


def test_without_a_teacher_it_is_detectron2s_step(make_cfg, monkeypatch):
    """The plain step of our trainer on the same batch and random numbers gives the same bits."""
    baseline = build(make_cfg("faster_rcnn", ["SOLVER.EMA_DECAY", 0.5], "baseline"))
    batch = next(iter(baseline._trainer.data_loader))
    monkeypatch.setattr(Trainer, "build_train_loader", staticmethod(lambda cfg: [batch]))
    stock = build(make_cfg("faster_rcnn", [], "stock"))
    torch.manual_seed(hash((baseline._trainer.seed, 0, 0)) % 2**63)
    run_steps(stock)
    run_steps(baseline)
    assert_equal_states(stock.model.state_dict(), baseline.model.student.state_dict())


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SOLVER.MICRO_BATCHES", 3], "SOLVER.MICRO_BATCHES is 3: expected a divisor of the 2"),
        (["SOLVER.MICRO_BATCHES", 0], "SOLVER.MICRO_BATCHES is 0"),
        (["SOLVER.AMP.PRECISION", "fp8"], "SOLVER.AMP.PRECISION is 'fp8'"),
        (["SOLVER.EMA_DECAY", 1.5], "SOLVER.EMA_DECAY is 1.5"),
        (["MODEL.BACKBONE.COMPILE", "gcc"], "MODEL.BACKBONE.COMPILE is 'gcc'"),
        (
            ["MODEL.BACKBONE.COMPILE", "eager", "MODEL.BACKBONE.CHECKPOINTING", True],
            "exclude each other: the compiler decides",
        ),
        (
            ["MODEL.BACKBONE.COMPILE", "eager", *PARAMETERS],
            "exclude each other: a compiled backbone frees its graph",
        ),
        ([*PARAMETERS, "MOKD.BALANCING.LAYERS", ["res9"]], "LAYERS has 'res9'.*bottom_up"),
        (["MOKD.BALANCING.RULE", "torchjd.X"], "'torchjd.X', which does not exist"),
        (["TEST.PRECISE_BN.ENABLED", True], "TEST.PRECISE_BN.ENABLED True"),
    ],
)
def test_refused_before_any_data_is_read(make_cfg, monkeypatch, opts, message):
    if "torchjd.X" in opts:
        pytest.importorskip("torchjd")
    monkeypatch.setattr(DistillationTrainer, "build_train_loader", None)
    with pytest.raises(ValueError, match=message):
        build_trainer(make_cfg("mokd", opts))


def test_checkpointing_needs_stages(make_cfg):
    from mokd_det.modeling.acceleration import checkpoint_stages

    with pytest.raises(ValueError, match="CHECKPOINTING True needs a backbone with 'stages'"):
        checkpoint_stages(torch.nn.Conv2d(1, 1, 1))


def test_torchjd_and_layers_by_config(make_cfg):
    pytest.importorskip("torchjd")
    opts = [*PARAMETERS, "MOKD.BALANCING.RULE", "torchjd.CAGrad"]
    opts += ["MOKD.BALANCING.LAYERS", ["fpn_output3", "bottom_up.res5"]]
    cfg = make_cfg("mokd", opts)
    cfg.MOKD.BALANCING.TORCHJD.c = 0.5
    logged = run_steps(build(cfg))
    assert logged["balance/parameters/weight_task"] > 0
    assert "balance/parameters/cosine_features" in logged


def record(task_weight, fallback=""):
    gram = torch.eye(2, dtype=torch.float64)
    weights = torch.tensor([task_weight, 1.0], dtype=torch.float64)
    return Decision(weights, gram, torch.ones(2, dtype=torch.float64), fallback)


def test_a_dominated_task_is_warned_of_once(caplog):
    diagnostics = BalanceDiagnostics("features")
    names = ["task", "features"]
    with caplog.at_level(logging.WARNING, "mokd_det"):
        for _ in range(50):
            diagnostics.scalars(names, record(0.01))
        for _ in range(50):
            scalars = diagnostics.scalars(names, record(1.0))
        assert scalars["balance/features/dominated"] == 0.5 and not caplog.records  # not yet more
        for _ in range(200):
            scalars = diagnostics.scalars(names, record(0.01))
    assert scalars["balance/features/dominated"] == 1
    assert scalars["balance/features/share_task"] == pytest.approx(0.01 / 1.01)
    assert scalars["balance/features/update_cosine"] == pytest.approx(0.01 / (1 + 0.01**2) ** 0.5)
    assert len(caplog.records) == 1 and "task is dominated" in caplog.records[0].message


def test_a_task_that_the_teacher_agrees_with_is_not_dominated():
    gradients = torch.tensor([[1.0, 0.2], [1.0, 0.0]], dtype=torch.float64)
    agree = Decision(
        torch.tensor([0.01, 1.0]).double(), gradients @ gradients.T, torch.ones(2).double()
    )
    scalars = BalanceDiagnostics("features").scalars(["task", "features"], agree)
    assert scalars["balance/features/share_task"] < 0.1
    assert scalars["balance/features/dominated"] == 0
    against = dataclasses.replace(agree, weights=torch.tensor([0.01, -1.0]).double())
    assert BalanceDiagnostics("features").scalars(["task", "features"], against)[
        "balance/features/dominated"
    ]


def test_an_objective_without_weight_is_warned_of_once(caplog):
    diagnostics = BalanceDiagnostics("features")
    names = ["task", "features", "outputs"]
    idle, busy = (
        Decision(
            torch.tensor([1.0, 0.5, w]).double(), torch.eye(3).double(), torch.ones(3).double()
        )
        for w in (0.0, 0.1)
    )
    with caplog.at_level(logging.WARNING, "mokd_det"):
        for count, decision in ((179, idle), (50, busy)):  # it agrees late
            for _ in range(count):
                diagnostics.scalars(names, decision)
        assert not caplog.records
        for _ in range(300):
            diagnostics.scalars(names, idle)
    assert len(caplog.records) == 1
    assert "'outputs' had no weight in 180 of the last 200" in caplog.records[0].message


def test_weights_that_are_not_finite_are_warned_of_once(caplog):
    diagnostics = BalanceDiagnostics("features")
    with caplog.at_level(logging.WARNING, "mokd_det"):
        for fallback in ("vanished", "undefined", "undefined"):
            diagnostics.scalars(["task", "features"], record(1.0, fallback))
    assert [r.message.split(":")[0] for r in caplog.records] == [
        "The rule gave weights that are not finite"
    ]


def test_fallbacks_are_counted_apart_and_survive_a_checkpoint():
    diagnostics = BalanceDiagnostics("features")
    for fallback in ("", "vanished", "undefined", "non_finite"):
        diagnostics.scalars(["task", "features"], record(1.0, fallback))
    other = BalanceDiagnostics("features")
    other.load_state_dict(diagnostics.state_dict())
    scalars = other.scalars(["task", "features"], record(1.0))
    assert scalars["balance/features/fallbacks_degenerate"] == 2
    assert scalars["balance/features/fallbacks_non_finite"] == 1


def test_the_step_is_a_simple_trainer(make_cfg):
    from detectron2.engine import SimpleTrainer

    assert issubclass(BalancedTrainer, SimpleTrainer)
    assert isinstance(build_trainer(make_cfg("mokd"))._trainer, BalancedTrainer)
