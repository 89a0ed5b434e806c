# Copyright (c) The mokd_det authors.
"""Writers of LOGGING.WRITERS: files and services, also of runs that go on."""

import csv
import importlib.machinery
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from mokd_det.engine import build_trainer, validate
from mokd_det.engine.tracking import CSVWriter, build_writers

from .helpers import on_two_ranks, train, train_and_stop


def rows_of(path):
    with open(path, newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def log(writer, first, last, evaluated=()):
    """Steps ``first`` to ``last`` of a run whose loss is the step, written every 20."""
    writer.start(first)
    with EventStorage(first) as storage:
        for storage.iter in range(first, last):
            storage.put_scalar("loss", float(storage.iter), smoothing_hint=False)
            if storage.iter in evaluated:
                storage.put_scalar("bbox/AP", 1.5, smoothing_hint=False)
            if (storage.iter + 1) % 20 == 0:
                writer.write()
        writer.write()
    writer.close()


def test_csv_has_a_line_for_each_iteration_and_new_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    log(CSVWriter(str(path)), 0, 70, evaluated=(39, 69))
    assert [(r["iteration"], r["loss"], r["bbox/AP"]) for r in rows_of(path)] == [
        ("19", "19.0", ""),
        ("39", "39.0", "1.5"),
        ("59", "59.0", ""),
        ("69", "69.0", "1.5"),
    ]


@pytest.mark.parametrize("killed_while_writing", [False, True])
def test_csv_of_a_resumed_run_is_that_of_the_uninterrupted_one(tmp_path, killed_while_writing):
    whole, resumed = tmp_path / "whole.csv", tmp_path / "resumed.csv"
    log(CSVWriter(str(whole)), 0, 100, evaluated=(59, 99))
    log(CSVWriter(str(resumed)), 0, 80, evaluated=(59,))  # its last checkpoint is of step 39
    if killed_while_writing:
        resumed.write_text(resumed.read_text() + "99,1.")
    log(CSVWriter(str(resumed)), 40, 100, evaluated=(59, 99))
    assert resumed.read_text() == whole.read_text()


def test_csv_takes_an_iteration_again(tmp_path):
    """An evaluation that was cut short is made when the run goes on."""
    path = tmp_path / "metrics.csv"
    log(CSVWriter(str(path)), 0, 40)
    writer = CSVWriter(str(path))
    writer.start(40)
    writer.put({39: {"bbox/AP": 2.0}})
    assert [(r["iteration"], r["loss"], r["bbox/AP"]) for r in rows_of(path)] == [
        ("19", "19.0", ""),
        ("39", "39.0", "2.0"),
    ]


def test_a_new_run_does_not_go_on_with_an_old_file(tmp_path):
    path = tmp_path / "metrics.csv"
    log(CSVWriter(str(path)), 0, 40)
    log(CSVWriter(str(path)), 0, 20)
    assert [row["iteration"] for row in rows_of(path)] == ["19"]


class Service:
    """As far as it is used, wandb and mlflow."""

    def __init__(self, name):
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.said = []
        self.info = SimpleNamespace(run_id="id-1")
        self.id = "id-1"

    def __getattr__(self, name):
        def call(*args, **options):
            self.said.append((name, options))
            return self

        return call


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_services_go_on_with_the_same_run(monkeypatch, make_digits_cfg, name):
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    cfg = make_digits_cfg(["LOGGING.WRITERS", [name]])
    validate(cfg)
    known = []
    for first in (0, 20, 0):
        (writer,) = build_writers(cfg)
        log(writer, first, first + 20)
        calls = dict(service.said)
        known.append(
            (calls.get("init") or calls["start_run"]).get({"wandb": "id"}.get(name, "run_id"))
        )
        assert [o["step"] for n, o in service.said if "step" in o] == [first + 19]
        assert service.said[-1][0] in ("finish", "end_run")
        service.said.clear()
    assert known == [None, "id-1", None]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "opts, message",
    [
        (["LOGGING.WRITERS", ["wandb"]], "'wandb', but the package wandb is not installed: pip"),
        (["LOGGING.WRITERS", ["json", "tensorbord"]], "LOGGING.WRITERS.*'tensorboard'"),
        (["LOGGING.WRITERS", "csv"], "LOGGING.WRITERS"),
        (["LOGGING.WRITERS", ["json"], "VIS_PERIOD", 5], "VIS_PERIOD is 5, but only the writer"),
    ],
)
def test_what_cannot_be_written(monkeypatch, make_digits_cfg, opts, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises((ValueError, ImportError), match=message):
        validate(make_digits_cfg(opts))


def test_a_service_that_does_not_answer_ends_the_run_before_its_first_step(
    monkeypatch, make_digits_cfg
):
    service = Service("mlflow")
    service.start_run = lambda **options: 1 / 0
    monkeypatch.setitem(sys.modules, "mlflow", service)
    trainer = build_trainer(make_digits_cfg(["LOGGING.WRITERS", ["csv", "mlflow"]]))
    monkeypatch.setattr(trainer, "run_step", lambda: pytest.fail("a step was made"))
    with pytest.raises(ValueError, match="'mlflow', which cannot begin a run .division by zero.:"):
        trainer.train()


@pytest.mark.slow
def test_a_run_of_the_trainer(make_digits_cfg):
    opts = ["LOGGING.WRITERS", ["csv"], "SOLVER.MAX_ITER", 45, "SOLVER.CHECKPOINT_PERIOD", 20]
    whole, resumed = (make_digits_cfg(opts, name) for name in ("whole", "resumed"))
    train(whole)
    train_and_stop(resumed, 41)
    train(resumed, resume=True)
    first, second = (rows_of(f"{cfg.OUTPUT_DIR}/metrics.csv") for cfg in (whole, resumed))
    assert [row["iteration"] for row in first] == ["19", "39", "44", "45"]
    assert [row["iteration"] for row in second] == ["19", "39", "44", "45"]
    for name in ("total_loss", "lr", "classification/top1"):
        # The last one is a median of fewer steps.
        assert [row[name] for row in first if row["iteration"] != "44"] == [
            row[name] for row in second if row["iteration"] != "44"
        ]


def _train_here(rank, cfg):
    trainer = build_trainer(cfg)
    found = [hook for hook in trainer._hooks if isinstance(hook, hooks.PeriodicWriter)]
    trainer.train()
    return len(found), comm.get_rank()


@pytest.mark.slow
def test_of_two_processes_one_writes(make_digits_cfg, tmp_path):
    # Each step measures, so that all scalars are of the last one.
    opts = ["LOGGING.WRITERS", ["csv", "json"], "MOKD.BALANCING.INTERVAL", 1]
    cfg = make_digits_cfg([*opts, "DATASETS.TEST", ()])
    assert on_two_ranks(_train_here, tmp_path, cfg) == [(1, 0), (0, 1)]
    assert [row["iteration"] for row in rows_of(f"{cfg.OUTPUT_DIR}/metrics.csv")] == ["2"]


def test_a_service_that_goes_away_ends_no_training(monkeypatch, make_digits_cfg, caplog):
    service = Service("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", service)
    (writer,) = build_writers(make_digits_cfg(["LOGGING.WRITERS", ["mlflow"]]))
    writer.start(0)
    writer.put({19: {"bbox/AP-a (b)": 1.0}})
    service.log_metrics = mock.Mock(side_effect=ConnectionError("gone"))
    with caplog.at_level("WARNING", "mokd_det"):
        writer.put({39: {"bbox/AP-a (b)": 1.0}})
    assert "'mlflow' could not take the scalars of iteration 39" in caplog.messages[-1]
    assert service.log_metrics.call_args.args == ({"bbox/AP-a _b_": 1.0},)
