# Copyright (c) The mokd_det authors.
"""Logs and configs on a disk that is full: one sentence that names the file."""

import argparse
import contextlib
import errno
import logging
import os
import threading

import pytest
from detectron2.utils.events import EventStorage
from tensorboard.summary.writer.record_writer import RecordWriter

from mokd_det.command_line import USUAL
from mokd_det.config import get_cfg
from mokd_det.engine import output_errors, read_lazy, start_logs
from mokd_det.engine.tracking import CSVWriter, MetricsWriter, TensorBoardWriter
from mokd_det.engine.writers import BalanceWriter, ProgressPrinter

LAZY = "configs/Quick-Start/student_retinanet_mokd.py"

pytestmark = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="no device that is always full"
)


def on_full_disk(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")


@pytest.mark.parametrize("writer_class", [MetricsWriter, BalanceWriter, CSVWriter])
def test_a_writer_names_its_file(tmp_path, writer_class):
    path = tmp_path / "metrics"
    if writer_class is not CSVWriter:  # which opens it for each line
        on_full_disk(path)
    writer = writer_class(str(path))
    message = f"stopped since '{path}' could not be written .No space left on device.*make room"
    with EventStorage() as storage, pytest.raises(SystemExit, match=message):
        for storage.iter in range(2):
            storage.put_scalar("balance/features/weight_task", 1.0)
            with output_errors(str(tmp_path)):
                writer.write()
            on_full_disk(path)


def test_tensorboard_hands_on_the_error_of_its_thread(tmp_path, monkeypatch, capfd):
    """Of the first line: later ones may wait for minutes."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(threading, "excepthook", usual := threading.__excepthook__)
    writer = TensorBoardWriter(str(tmp_path))
    monkeypatch.setattr(RecordWriter, "write", full)
    message = f"No space left on device: '{tmp_path}/events.out.tfevents"
    with EventStorage() as storage, pytest.raises(OSError, match=message):
        for storage.iter in range(1000):
            storage.put_scalar("total_loss", 1.0)
            writer.write()
    with contextlib.suppress(OSError):
        writer.close()
    assert threading.excepthook is usual
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", True)  # as outside of tests
    args = argparse.Namespace(config_file="", verbosity=USUAL, eval_only=False)

    def start(kind):
        if kind == "yaml":
            cfg = get_cfg()
            cfg.OUTPUT_DIR = str(tmp_path)
        else:
            cfg = read_lazy(LAZY, [f"train.output_dir='{tmp_path}'"])
        start_logs(cfg, str(tmp_path), args)

    return start


@pytest.mark.parametrize("kind", ["yaml", "python"])
@pytest.mark.parametrize("name", ["config.yaml", "log.txt"])
def test_a_start_names_its_file(start, tmp_path, capfd, kind, name):
    on_full_disk(tmp_path / name)
    message = f"'{tmp_path / name}' could not be written .No space left on device"
    with pytest.raises(SystemExit, match=message):
        start(kind)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_log_that_cannot_be_written_any_more_stops_the_run(start, tmp_path, capfd):
    start("yaml")
    full = os.open("/dev/full", os.O_WRONLY)
    for handler in logging.getLogger("mokd_det").handlers:
        if getattr(handler.stream, "name", "") == str(tmp_path / "log.txt"):
            os.dup2(full, handler.stream.fileno())
    os.close(full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/log.txt'"):
        logging.getLogger("mokd_det").info("a line")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_line_is_printed_once(caplog):
    """A run that stops by an error asks for it again, which Detectron2 0.6 may divide by zero."""
    printer = ProgressPrinter(max_iter=9)
    printer.logger.logger.propagate = True
    with caplog.at_level("INFO"), EventStorage() as storage:
        for storage.iter in (1, 1, 2, 2):
            storage.put_scalar("total_loss", 1.0)
            printer.write()
    assert len(caplog.records) == 2
