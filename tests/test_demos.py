# Copyright (c) The mokd_det authors.
"""`make demo` and `make demo-classification`, with commands in place of their trainings."""

import json
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

import quick_start
import quick_start_classification
import stages
from mokd_det.config import load_config

from .conftest import ROOT

DEMOS = pytest.mark.parametrize("tool", [quick_start, quick_start_classification])


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository of its own for what demos write."""
    for name in ("configs", "tools", "datasets"):
        (tmp_path / name).symlink_to(ROOT / name)
    for module in (stages, quick_start, quick_start_classification):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def writes(path, then=""):
    """Return a command that appends a line to a file."""
    return ["-c", f"open({str(path)!r}, 'a').write('x'); {then}"]


@DEMOS
def test_commands_of_a_demo_are_there_and_get_the_overrides(tool):
    """Each run writes where the demo, and the student's config, look for it."""
    todo = tool.stages(["SEED", "2"])
    commands = {name: c for stage in todo for name, c in stage.commands.items()}
    assert all((ROOT / command[0]).is_file() for command in commands.values())
    for name, config in tool.CONFIGS.items():
        assert config in commands[name] and commands[name][-2:] == ["SEED", "2"]
        cfg = load_config(str(ROOT / config))
        assert tool.RUNS[name] == cfg.OUTPUT_DIR and tool.RUNS[name].startswith(tool.OUTPUT)
        assert cfg.DATASETS.TEST == tuple(tool.SPLITS.values())
    assert cfg.MOKD.TEACHER.WEIGHTS == f"{tool.RUNS['teacher']}/model_final.pth"


@DEMOS
def test_both_students_of_a_demo_differ_in_the_teacher_alone(tool):
    scratch, mokd = (load_config(str(ROOT / tool.CONFIGS[name])) for name in ("scratch", "mokd"))
    assert mokd.MOKD.ENABLED and not scratch.MOKD.ENABLED
    for cfg in (scratch, mokd):
        cfg.pop("MOKD"), cfg.pop("OUTPUT_DIR")
    assert scratch == mokd


def test_the_demo_distils_by_the_defaults():
    """Nothing is tuned for it to win."""
    cfg = load_config(str(ROOT / quick_start.CONFIGS["mokd"])).MOKD
    default = load_config(str(ROOT / quick_start.CONFIGS["teacher"])).MOKD
    for node in (cfg, default):
        node.pop("TEACHER"), node.pop("ENABLED")
    assert cfg == default


def test_a_demo_that_stopped_goes_on(root, capsys):
    ran, broken = root / "ran", root / "broken"
    broken.touch()
    fails = writes(ran, f"import os; assert not os.path.exists({str(broken)!r})")
    todo = [
        stages.Stage("first", {"a": writes(ran)}, 1),
        stages.Stage("second", {"b": writes(ran), "c": fails}, 1),
        stages.Stage("third", {"d": writes(ran)}, 1),
    ]
    with pytest.raises(
        SystemExit, match=r"(?s)second failed. The end of output/d/logs/c.log:.*Ass"
    ):
        stages.Demo("output/d", []).run(todo)
    before = len(ran.read_text())
    broken.unlink()
    demo = stages.Demo("output/d", [])
    seconds = demo.run(todo)
    assert len(ran.read_text()) - before in (2, 3)  # c and d; b was perhaps stopped
    assert demo.run(todo) == seconds and len(ran.read_text()) - before in (2, 3)
    printed = capsys.readouterr().out
    assert "Going on with the demo in output/d." in printed
    assert "[1/3] first: about 0.1 min left" in printed and printed.count("first") == 1


@pytest.mark.parametrize("change", ["complete", "other options", "of an older version"])
def test_a_demo_keeps_what_another_left(root, change, capsys):
    demo = stages.Demo("output/d", [])
    (demo.folder / "weights.pth").write_text("earlier")
    if change == "complete":
        demo.finish({"AP": 1.0})
    if change == "of an older version":
        (demo.folder / "stages.json").unlink()
    stages.Demo("output/d", ["SEED", "2"] if change == "other options" else [])
    assert (root / "output/d.1/weights.pth").read_text() == "earlier"
    assert not (root / "output/d/weights.pth").exists()
    assert "What was in output/d is now in output/d.1." in capsys.readouterr().out


DEMO = """
import sys, stages
from pathlib import Path
stages.ROOT = Path.cwd()
sleeps = ["-c", "import os, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"]
sleeps[1] = sleeps[1].replace("import os", "import os, sys")
with stages.stoppable("output/d"):
    print("begins", flush=True)
    todo = [stages.Stage("sleep", {n: [*sleeps, n] for n in ("a", "b")}, 60)]
    stages.Demo("output/d", []).run(todo)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_demo_at_once(root, number):
    path = os.pathsep.join([str(ROOT / "tools"), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, "-c", DEMO],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        # A shell starts what runs in the background with this signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    files = [root / "a", root / "b"]
    while not all(file.is_file() and file.read_text() for file in files):
        assert process.poll() is None
        time.sleep(0.1)
    start = time.time()
    process.send_signal(number)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and time.time() - start < 20  # not 60
    assert "Stopped. To go on, give the same command again" in printed
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_time_left_comes_from_what_a_training_logs(root):
    stage = stages.Stage("train", {"a": []}, 100, runs={"a": "run"})
    start = time.time() - 30
    assert stages._share(stage, "a", start) == pytest.approx(0.3, abs=0.01)
    (root / "run").mkdir()
    (root / "run/metrics.json").write_text('{"eta_seconds": 10.0, "iteration": 19}\n{"AP": 1}\n')
    assert stages._share(stage, "a", start) == pytest.approx(0.75, abs=0.01)
    assert stages._share(stage, "a", time.time() + 60) < 0  # of an earlier start: not looked at


@DEMOS
@pytest.mark.parametrize("option", stages.NOT_OVERRIDDEN)
def test_a_demo_refuses_what_each_run_has(root, monkeypatch, capsys, tool, option):
    monkeypatch.setattr(sys, "argv", ["demo", "SEED", "2", option, "x"])
    with pytest.raises(SystemExit, match="2"):
        tool.main()
    assert f"{option} cannot be an override: each run of the demo" in capsys.readouterr().err
    assert not (root / "output").exists()


def run_with_results(tool, root, monkeypatch, results, *opts):
    """Run a demo whose trainings have these results by split."""

    def run(self, todo):
        for folder in tool.RUNS.values():
            (root / folder).mkdir(parents=True)
            found = dict.fromkeys(tool.SPLITS.values(), results)
            (root / folder / "results.json").write_text(json.dumps(found))
        return 3.0

    monkeypatch.setattr(stages.Demo, "run", run)
    monkeypatch.setattr(sys, "argv", ["demo", *opts])
    tool.main()
    return json.loads((root / tool.OUTPUT / "results.json").read_text())


def test_results_of_the_demo(root, monkeypatch, capsys):
    percent = {"bbox": {"AP": 10.0, "AP50": 20.0}}
    results = run_with_results(quick_start, root, monkeypatch, percent)
    assert results["mokd"]["AP50"] == {"val": 0.2, "test": 0.2} and results["seconds"] == 3.0
    parameters = results["mokd"]["params"]
    assert f"| mokd | {parameters:,} | 0.100 | 0.100 | 0.200 | 0.200 |" in capsys.readouterr().out
    assert parameters == results["scratch"]["params"] < results["teacher"]["params"]
    narrow = ["MODEL.FPN.OUT_CHANNELS", "32"]
    again = run_with_results(quick_start, root, monkeypatch, percent, *narrow)
    assert again["mokd"]["params"] < parameters


def test_results_of_the_demo_of_classification(root, monkeypatch, capsys):
    tool = quick_start_classification
    monkeypatch.setattr(tool, "draw", lambda results, path: None)
    top1 = {"classification": {"top1": 90.0}}
    results = run_with_results(tool, root, monkeypatch, top1)
    assert results["teacher"] == {"val": 90.0, "test": 90.0}
    assert "| mokd | 90.0 | 90.0 |" in capsys.readouterr().out


def test_picture_of_the_demo_of_classification(root, monkeypatch):
    tool = quick_start_classification
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root / "data"))
    (root / "data/mnist").mkdir(parents=True)
    digits = ROOT / "tests" / "data" / "digits" / "val.npz"
    (root / "data/mnist/test.npz").write_bytes(digits.read_bytes())
    labels = np.load(digits)["labels"].tolist()
    for name, shift in (("scratch", 1), ("mokd", 0)):
        folder = root / tool.RUNS[name] / "inference" / "mnist_test"
        folder.mkdir(parents=True)
        predictions = [
            {"name": f"test.npz#{i}", "label": label, "classes": [(label + shift) % 10]}
            for i, label in enumerate(labels)
        ]
        (folder / "predictions.json").write_text(json.dumps(predictions))
    results = {name: {"test": 90.0} for name in tool.RUNS}
    tool.draw(results, str(root / "digits.png"))
    picture = cv2.imread(str(root / "digits.png"))
    assert picture.shape[1] > 1000 and (picture != 255).any(-1).mean() > 0.02
