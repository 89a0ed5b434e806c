# Copyright (c) The mokd_det authors.
"""The checkpoint of the best evaluation, and early ends, also of runs that stop and go on."""

from pathlib import Path

import pytest
import torch
from detectron2.utils.env import seed_all_rng

from mokd_det.engine import build_trainer, prepare_datasets, validate

from .helpers import Stopped, on_two_ranks

METRIC = "classification/top1"
OPTS = [
    *("DATASETS.TEST", ("tests_digits_val",), "TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 8),
    *("SOLVER.CHECKPOINT_PERIOD", 1, "TEST.BEST_METRIC", METRIC, "MOKD.ENABLED", False),
    *("LOGGING.WRITERS", ["json"]),
]


@pytest.fixture
def make_cfg(make_digits_cfg):
    """The student alone: its steps are the quickest."""
    without = ["MOKD.FEATURES.DIM", 0, "MOKD.LOGITS.TEMPERATURE", 1.0]
    return lambda opts=(), folder="run": make_digits_cfg([*OPTS, *without, *opts], folder)


def run(cfg, values, resume=False, stop=None):
    """
    Train with evaluations that give ``values`` after steps 1, 3, 5 and the last one; ``stop``:
    (what is running, step) in which the machine is switched off. Return the steps evaluated.
    """
    seed_all_rng(cfg.SEED)
    trainer = build_trainer(cfg)
    trainer.resume_or_load(resume)
    step, evaluated = trainer._trainer.run_step, []

    def run_step():
        if stop == ("step", trainer.iter):
            raise Stopped
        step()

    def test(*args):
        if stop == ("evaluation", trainer.iter):
            raise Stopped
        evaluated.append(trainer.iter)
        return {"classification": {"top1": values[min(trainer.iter // 2, 3)]}}

    trainer._trainer.run_step, trainer.test = run_step, test
    if stop:
        with pytest.raises(Stopped):
            trainer.train()
    else:
        trainer.train()
    return evaluated


def state_of(cfg, name):
    return torch.load(Path(cfg.OUTPUT_DIR, f"{name}.pth"), weights_only=False)


def assert_same(first, second, name):
    ours, theirs = (state_of(cfg, name) for cfg in (first, second))
    assert ours["trainer"]["iteration"] == theirs["trainer"]["iteration"]
    assert all(torch.equal(x, theirs["model"][key]) for key, x in ours["model"].items())


NAN = float("nan")


@pytest.mark.parametrize(
    "values, patience, best, end, evaluated",
    [
        ([1.0, 3.0, 2.0, 2.5], 0, 3, 7, [1, 3, 5, 8]),
        ([2.0, 1.0, 3.0, 1.0], 1, 1, 3, [1, 3]),
        # The evaluation at the end counts.
        pytest.param([1.0, 1.0, 0.5, 4.0], 0, 7, 7, [1, 3, 5, 8], marks=pytest.mark.slow),
        pytest.param([NAN, 0.0, NAN, 0.0], 0, 3, 7, [1, 3, 5, 8], marks=pytest.mark.slow),
        pytest.param([2.0, 1.0, 2.0, 3.0], 2, 1, 5, [1, 3, 5], marks=pytest.mark.slow),
        pytest.param([2.0, 1.0, 3.0, 1.0], 2, 5, 7, [1, 3, 5, 8], marks=pytest.mark.slow),
    ],
)
def test_the_best_is_kept_and_patience_ends_the_run(
    make_cfg, values, patience, best, end, evaluated
):
    cfg = make_cfg(["TEST.PATIENCE", patience])
    assert run(cfg, values) == evaluated
    assert state_of(cfg, "model_final")["trainer"]["iteration"] == end
    kept, numbered = state_of(cfg, "model_best"), state_of(cfg, f"model_{best:07d}")
    assert kept["trainer"]["iteration"] == best
    assert all(torch.equal(x, numbered["model"][key]) for key, x in kept["model"].items())
    assert Path(cfg.OUTPUT_DIR, "last_checkpoint").read_text() == "model_final.pth"
    # A run that has ended stays so: what is left to do is to evaluate.
    after = 9 if end == 7 else end  # Detectron2 counts one more where no step is left
    assert run(cfg, values, resume=True) == [after]
    assert state_of(cfg, "model_final")["trainer"]["iteration"] == end
    assert state_of(cfg, "model_best")["trainer"]["iteration"] == best


@pytest.mark.slow
@pytest.mark.parametrize("values", [[1.0, 3.0, 2.0, 2.5], [2.0, 1.0, 2.0, 3.0]])
@pytest.mark.parametrize("where", [("step", 2), ("step", 4), ("evaluation", 3), ("evaluation", 5)])
def test_a_resumed_run_is_the_uninterrupted_one(make_cfg, values, where):
    opts = ["TEST.PATIENCE", 2]
    whole, resumed = make_cfg(opts, "whole"), make_cfg(opts, "resumed")
    run(whole, values)
    run(resumed, values, stop=where)
    run(resumed, values, resume=True)
    for name in ("model_best", "model_final"):
        assert_same(whole, resumed, name)
    hooks = [state_of(cfg, "model_final")["trainer"]["hooks"] for cfg in (whole, resumed)]
    assert hooks[0]["BestCheckpointer"] == hooks[1]["BestCheckpointer"]


def test_another_metric_begins_anew(make_cfg, caplog):
    cfg = make_cfg()
    run(cfg, [5.0] * 4, stop=("step", 4))
    cfg.TEST.BEST_METRIC = "classification/top5"
    trainer = build_trainer(cfg)
    trainer.resume_or_load(True)
    assert "TEST.BEST_METRIC was 'classification/top1' and is 'classification/top5'" in caplog.text


def test_a_metric_that_is_not_there_is_an_error(make_cfg):
    cfg = make_cfg()
    cfg.TEST.BEST_METRIC = "classification/top5"
    with pytest.raises(ValueError, match="top5', which the evaluation does not give; it gives cla"):
        run(cfg, [1.0] * 4)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "opts, message",
    [
        (["TEST.BEST_METRIC", "top1"], "such as 'classification/top1'"),
        (["TEST.BEST_METRIC", "bbox/AP"], "such as 'classification/top1'"),
        (["TEST.BEST_METRIC", "classification/AP5O"], "such as 'classification/top1'"),
        (["TEST.BEST_METRIC", "classification/AP"], "such as 'classification/top1'"),
        (["TEST.BEST_METRIC", "classification/top1-3"], "such as 'classification/top1'"),
        (
            ["TEST.BEST_METRIC", "classification/top1-cat", "TEST.PER_CLASS", True],
            "such as 'classification/top1'",
        ),
        (
            ["DATASETS.TEST", ("tests_digits_train", "tests_digits_val")],
            "expected data set/task/metric .* such as 'tests_digits_train/classification/top1'",
        ),
        (
            ["TEST.BEST_METRIC", "classification/top2"],
            "'classification/top1'. There are classification/top1, classification/top5.$",
        ),
        (
            ["TEST.BEST_METRIC", "classification/top2", "TEST.PER_CLASS", True],
            "There are classification/top1, classification/top5, classification/top1-0, .*-4, ",
        ),
        (["TEST.EVAL_PERIOD", 0], "TEST.BEST_METRIC is .* set the steps between two evaluations"),
        (["DATASETS.TEST", ()], "TEST.BEST_METRIC is .* name a set"),
        (["TEST.BEST_METRIC", "", "TEST.PATIENCE", 3], "TEST.PATIENCE is 3, but TEST.BEST_METRIC"),
        (["TEST.PATIENCE", -1], "TEST.PATIENCE is -1"),
    ],
)
def test_options_that_cannot_be(make_cfg, opts, message):
    cfg = make_cfg(opts)
    with pytest.raises(ValueError, match=message):
        prepare_datasets(cfg, validate(cfg))


@pytest.mark.parametrize(
    "sets, metric",
    [
        (("tests_digits_val",), "classification/top1-3"),
        (("tests_digits_train", "tests_digits_val"), "tests_digits_val/classification/top5"),
    ],
)
def test_options_that_can(make_cfg, sets, metric):
    opts = ["DATASETS.TEST", sets, "TEST.BEST_METRIC", metric, "TEST.PER_CLASS", True]
    cfg = make_cfg(opts)
    prepare_datasets(cfg, validate(cfg))


def _steps(rank, cfg):
    return run(cfg, [2.0, 1.0, 2.0, 3.0] if rank == 0 else [0.0] * 4)


@pytest.mark.slow
def test_two_processes_end_after_the_same_step(make_cfg, tmp_path):
    cfg = make_cfg(["TEST.PATIENCE", 2])
    assert on_two_ranks(_steps, tmp_path, cfg) == [[1, 3, 5]] * 2
    assert state_of(cfg, "model_final")["trainer"]["iteration"] == 5
