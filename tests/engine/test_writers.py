# Copyright (c) The mokd_det authors.
"""What is kept of the logs, in memory and in balance.json."""

import json
from unittest import mock

import pytest
from detectron2.utils.events import EventStorage

from mokd_det.engine.writers import HISTORY, BalanceWriter, ProgressPrinter, bound_history


def logged(steps, storage):
    with storage:
        for step in range(steps):
            storage.iter = step
            storage.put_scalars(time=0.1 * (step % 7), loss=1 / (1 + step))
            yield step


def test_memory_does_not_grow_and_detectron2_reads_the_same():
    bounded, stock = EventStorage(), EventStorage()
    bound_history(bounded)
    for storage in (bounded, stock):
        assert len(list(logged(3 * HISTORY, storage))) == 3 * HISTORY
    for name, history in bounded.histories().items():
        other = stock.history(name)
        assert len(history.values()) == HISTORY and len(other.values()) == 3 * HISTORY
        assert history.median(20) == other.median(20) and history.avg(20) == other.avg(20)
        assert history.median(1000) == other.median(1000)  # the longest look back
        assert history.global_avg() == other.global_avg()
    assert bounded.latest_with_smoothing_hint() == stock.latest_with_smoothing_hint()


def test_a_line_holds_the_means_of_its_steps_and_the_counts(tmp_path):
    writer = BalanceWriter(str(tmp_path / "balance.json"))
    storage = EventStorage()
    bound_history(storage)
    for step in logged(45, storage):
        storage.put_scalar("balance/features/weight_task", step)
        storage.put_scalar("balance/features/fallbacks_degenerate", step // 10)
        if step % 2 == 0:
            storage.put_scalar("balance/features/cosine_features", step)
        if step in (19, 39):
            writer.write()
    with storage:
        writer.write()
        writer.write()  # nothing new: no line
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "balance.json").read_text().splitlines()]
    names = ("iteration", "balance/features/weight_task", "balance/features/cosine_features")
    assert [[line[n] for n in names] for line in lines] == [
        [19, 9.5, 9],
        [39, 29.5, 29],
        [44, 42, 42],
    ]
    assert [line["balance/features/fallbacks_degenerate"] for line in lines] == [1, 3, 4]
    assert all(len(line) == 4 for line in lines)  # losses are in metrics.json


@pytest.mark.parametrize("teacher", [True, False])
def test_the_console_line_has_the_weights_of_the_last_steps(monkeypatch, teacher):
    printer = ProgressPrinter(100)
    said = []
    monkeypatch.setattr(printer.logger, "logger", mock.Mock(isEnabledFor=lambda level: True))
    printer.logger.logger.log = lambda level, text, *args, **others: said.append(text)
    storage = EventStorage()
    for step in logged(60, storage):
        if teacher:
            storage.put_scalar("balance/features/weight_task", 1.0)
            storage.put_scalar("balance/features/weight_outputs", 0.5 * (step >= 50))
            storage.put_scalar("balance/features/weight_own_thing", 0.0)
            if step % 10 == 0:  # measured in some steps only
                storage.put_scalar("balance/features/cosine_outputs", 0.9)
                storage.put_scalar("balance/features/seen_cosine_outputs", -step / 100)
            if step == 0:
                storage.put_scalar("balance/features/cosine_own_thing", 0.5)
    with storage:
        printer.write()
    (line,) = said
    assert "eta:" in line and "loss:" in line  # Detectron2's own
    shown = "weights: task 1, outputs 0.25 (cos -0.45), own_thing 0 (cos 0.5)"
    assert line.endswith(shown) if teacher else "weights" not in line


def test_no_balance_no_line(tmp_path):
    writer = BalanceWriter(str(tmp_path / "balance.json"))
    for _ in logged(3, EventStorage()):
        writer.write()
    writer.close()
    assert (tmp_path / "balance.json").read_text() == ""
