# Copyright (c) The mokd_det authors.
"""What a console shows, and when a run says how long it takes."""

import argparse
import logging
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage

from mokd_det.command_line import QUIET, USUAL, VERBOSE, add_verbosity
from mokd_det.engine.console import ConsoleFilter
from mokd_det.engine.summary import STEPS, ExpectedTime


@pytest.mark.parametrize(
    "name, level, shown_at",
    [
        ("mokd_det.engine.summary", "INFO", (USUAL, VERBOSE)),
        ("detectron2.utils.events", "INFO", (USUAL, VERBOSE)),
        ("detectron2", "INFO", (VERBOSE,)),  # the config
        ("detectron2.checkpoint.c2_model_loading", "INFO", (VERBOSE,)),
        ("mokd.engine.summary", "INFO", (USUAL, VERBOSE)),  # as an earlier handler abbreviates
        ("my_module", "INFO", (USUAL, VERBOSE)),  # of --import
        ("mokd_det.engine.trainer", "DEBUG", (VERBOSE,)),
        ("detectron2", "WARNING", (QUIET, USUAL, VERBOSE)),
        ("fvcore.common.checkpoint", "ERROR", (QUIET, USUAL, VERBOSE)),
    ],
)
def test_what_is_shown(name, level, shown_at):
    record = logging.LogRecord(name, getattr(logging, level), "", 0, "text", (), None)
    levels = (QUIET, USUAL, VERBOSE)
    assert tuple(v for v in levels if ConsoleFilter(v).filter(record)) == shown_at


def test_flags():
    add_verbosity(parser := argparse.ArgumentParser())
    values = [parser.parse_args(flags).verbosity for flags in ([], ["-v"], ["-q"], ["--quiet"])]
    assert values == [USUAL, VERBOSE, QUIET, QUIET]
    with pytest.raises(SystemExit):
        parser.parse_args(["-v", "-q"])


@pytest.mark.parametrize(
    "start, end, said", [(0, 1000 + STEPS, 1), (100, 1100 + STEPS, 1), (0, STEPS, 0)]
)
def test_expected_time(caplog, monkeypatch, start, end, said):
    monkeypatch.setattr(logging.getLogger("mokd_det"), "propagate", True)
    hook, storage = ExpectedTime(), EventStorage()
    trainer = hook.trainer = SimpleNamespace(start_iter=start, max_iter=end, storage=storage)
    with caplog.at_level("INFO", "mokd_det"), storage:
        for trainer.iter in range(start, min(end, start + 50)):
            storage.put_scalar("time", 4.0)
            hook.after_step()
    lines = [record.message for record in caplog.records]
    assert len(lines) == said
    assert all(line.startswith("A step takes 4 s: 999 more take 1:06:36, until ") for line in lines)


def test_a_checkpointer_without_a_file_says_nothing():
    """The summary names the weights, which a backbone may have all the same."""
    message = "No checkpoint found. Initializing model from scratch"
    record = logging.LogRecord("fvcore.common.checkpoint", logging.INFO, "", 0, message, (), None)
    assert [v for v in (QUIET, USUAL, VERBOSE) if ConsoleFilter(v).filter(record)] == [VERBOSE]
