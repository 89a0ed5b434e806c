# Copyright (c) The mokd_det authors.
"""The study runner, with a training that only writes its results."""

import hashlib
import json
import math
import statistics
import subprocess
import sys

import pytest
import records
import run as tool
import torch

from mokd_det.config import load_config
from mokd_det.files import save_checkpoint

from ..conftest import ROOT

METRIC = "a/b/top1"
STUDY = """
teacher: configs/Digits/teacher.yaml
seeds: [1, 2, 3]
baseline: plain
metrics: ["a/b/top1"]
opts: [TEST.BATCH_SIZE, 4]
methods:
  plain: {config: configs/Digits/student_scratch.yaml}
  with teacher: {config: configs/Digits/student_mokd.yaml, opts: [MOKD.FEATURES.DIM, 64]}
  once: {config: configs/Digits/student_mokd.yaml, seeds: [2]}
"""
VALUES = {"plain": [50.0, 52.0, 60.0], "with teacher": [53.0, 56.0, 62.0], "once": [0, 55.0]}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The loaded study, and the calls of train_net.py that it made."""
    path = tmp_path / "my_study.yaml"
    path.write_text(STUDY)
    loaded = records.load_study(path)
    calls = []

    def train(config, opts, output, *flags):
        calls.append((config, list(opts), output.name))
        output.mkdir(parents=True, exist_ok=True)
        if "SEED" not in opts:
            value = 90.0
        else:
            value = VALUES[output.name.rsplit("-", 1)[0].replace("_", " ")][opts[-1] - 1]
        (output / "results.json").write_text(json.dumps({"a": {"b": {"top1": value}}}))
        (output / "model_final.pth").touch()
        return 1.0

    monkeypatch.setattr(tool, "train", train)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(
        tool,
        "load_config",
        lambda path, opts=(): load_config(str(ROOT / path.removeprefix(f"{tmp_path}/")), opts),
    )
    return loaded, calls


def test_a_study_runs_what_is_missing_and_makes_its_table(study):
    loaded, calls = study
    tool.run(loaded, 2, [])
    assert len(calls) == 1 + 3 + 3 + 1
    teacher = next(i for i, call in enumerate(calls) if "SEED" not in call[1])
    first = min(i for i, call in enumerate(calls) if "mokd" in call[0])
    assert teacher < first
    assert ["TEST.BATCH_SIZE", 4, "MOKD.FEATURES.DIM", 64, "SEED", 3] in [call[1] for call in calls]
    rows = {name: of[METRIC] for name, of in records.summarize(loaded).items()}
    assert rows["plain"]["mean"] == 54 and rows["plain"]["differences"] == {"plain": None}
    assert rows["plain"]["std"] == pytest.approx(statistics.stdev(VALUES["plain"]))
    difference, half = rows["with teacher"]["differences"]["plain"]
    assert difference == 3  # of 3, 4 and 2; t with 2 degrees of freedom: 4.303
    assert half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert rows["once"]["differences"]["plain"] == (3, None)
    table = records.format_table(loaded)
    assert "| plain | 3 | 54.0 |  |" in table
    assert "| with teacher | 3 | 57.0 | +3.0 ± 2.5 |" in table
    assert "| once | 1 | 55.0 | +3.0 |" in table
    content = records.read_file(loaded["records"])
    weights = hashlib.sha256(b"").hexdigest()
    assert [t["weights_sha256"] for t in content["teachers"]] == [weights]
    assert {run.get("teacher_sha256") for run in content["runs"]} == {None, weights}

    calls.clear()
    content["runs"] = [r for r in content["runs"] if (r["method"], r["seed"]) != ("plain", 2)]
    records.write_file(loaded["records"], content)
    tool.run(loaded, 1, ["plain"])
    assert [call[1][-1] for call in calls] == [2]
    assert len(records.read_file(loaded["records"])["runs"]) == 7
    assert records.runs_of(loaded, ["plain", "once"], first=1) == [("plain", 1), ("once", 2)]


@pytest.mark.parametrize("kind", [RuntimeError, KeyError])
def test_a_run_that_fails_leaves_the_others_and_fails_the_study(study, capsys, monkeypatch, kind):
    loaded, _ = study
    good = tool.train

    def train(config, opts, output, *flags):
        if opts and opts[-1] == 2:
            raise kind("no memory left")
        return good(config, opts, output, *flags)

    monkeypatch.setattr(tool, "train", train)
    with pytest.raises(SystemExit, match="3 runs failed"):
        tool.run(loaded, 1, [])
    error = capsys.readouterr().err
    assert "plain seed 2 failed:" in error and f"{kind.__name__}: " in error
    assert "no memory left" in error
    content = records.read_file(loaded["records"])
    kept = {(run["method"], run["seed"]) for run in content["runs"]}
    assert kept == {(name, seed) for name in ("plain", "with teacher") for seed in (1, 3)}
    assert len(content["teachers"]) == 1


def trained_at(folder, name, iteration):
    state = {"model": {"w": torch.zeros(99)}, "trainer": {"iteration": iteration}}
    save_checkpoint(state, str(folder / name))


def cut(folder):
    content = (folder / "model_final.pth").read_bytes()
    (folder / "model_final.pth").write_bytes(content[:-1])


@pytest.mark.parametrize(
    "change, flag",
    [
        (lambda folder: None, ""),
        (lambda folder: (folder / "results.json").unlink(), "--resume"),
        (lambda folder: (folder / "model_final.pth").unlink(), "--resume"),
        (lambda folder: (folder / "model_final.pth").write_bytes(b""), "--overwrite"),
        (cut, "--overwrite"),
        (lambda folder: (cut(folder), trained_at(folder, "model_0000002.pth", 2)), "--resume"),
    ],
)
def test_only_a_teacher_that_is_whole_counts_as_trained(tmp_path, change, flag):
    (tmp_path / "results.json").write_text("{}")
    trained_at(tmp_path, "model_final.pth", 4)
    change(tmp_path)
    assert tool.flag_to_train(tmp_path) == flag


def test_trust_is_passed_on_to_every_run(monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(tool.subprocess, "run", run)
    monkeypatch.setattr(
        tool, "run_study", lambda args: tool.train("c.yaml", [1], "out", "--resume")
    )
    monkeypatch.setattr(tool, "flags", [])
    monkeypatch.setattr(sys, "argv", ["run.py", "study.yaml", "--run", "--trust"])
    tool.main()
    expected = ["--config-file", "c.yaml", "--trust", "--resume", "1", "OUTPUT_DIR", "out"]
    assert [command[2:] for command in commands] == [expected]


def test_a_study_whose_teachers_weights_have_a_name(study):
    loaded, _ = study
    loaded["methods"]["with teacher"]["opts"] += ["MOKD.TEACHER.WEIGHTS", "IMAGENET1K_V1"]
    tool.run(loaded, 1, ["with teacher"])
    runs = records.read_file(loaded["records"])["runs"]
    assert {run["teacher_sha256"] for run in runs} == {"IMAGENET1K_V1"}


def test_a_study_of_a_model_that_finds_nothing(study, monkeypatch, capsys):
    loaded, _ = study
    monkeypatch.setitem(VALUES, "plain", [None, None, 60.0])
    tool.run(loaded, 1, ["plain"])
    assert "plain seed 1: a/b/top1: 0.00 (" in capsys.readouterr().out
    assert "| plain | 3 | 20.0 |" in records.format_table(loaded)


@pytest.mark.parametrize("visible, lent", [(None, "010"), ("", "010"), ("2,3", "232")])
def test_a_study_lends_the_gpus_that_it_was_given(study, monkeypatch, visible, lent):
    loaded, _ = study
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    tool.run(loaded, 3, ["plain"])
    assert "".join(str(tool.gpus.get()) for _ in range(tool.gpus.qsize())) == lent


def test_a_study_keeps_nothing_of_an_unfinished_attempt(study):
    loaded, _ = study
    runs = tool.ROOT / "output" / "studies" / "my_study"
    others = [runs / "plain-2", runs / "plain-10", runs.parent / "plain-1"]
    for folder in (runs / "plain-1", *others):
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text('{"iteration": 5, "a/b/top1": 1.0}\n')
    tool.run(loaded, 1, ["plain"], first=1)
    assert not (runs / "plain-1" / "metrics.json").exists()
    assert all((folder / "metrics.json").is_file() for folder in others)


def test_a_study_removes_nothing_elsewhere(study, capsys):
    loaded, calls = study
    elsewhere = tool.ROOT / "elsewhere" / "plain-1"
    elsewhere.mkdir(parents=True)
    runs = tool.ROOT / "output" / "studies" / "my_study"
    runs.parent.mkdir(parents=True)
    runs.symlink_to(elsewhere.parent)
    with pytest.raises(SystemExit, match="1 runs failed"):
        tool.run(loaded, 1, ["plain"], first=1)
    assert elsewhere.is_dir() and not calls
    assert f"leads to {elsewhere}: expected a folder of output/studies" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        (("baseline: plain", "baseline: x"), "baseline 'x' is none of its methods"),
        (("metrics:", "metric:"), r"unknown \['metric'\]"),
        (("seeds: [2]", "seed: [2]"), r"method 'once' has unknown \['seed'\]"),
        (("{config: configs/Digits/student_scratch.yaml}", "{}"), "'plain' has no config"),
    ],
)
def test_study_files_that_cannot_be(tmp_path, change, message):
    path = tmp_path / "s.yaml"
    path.write_text(STUDY.replace(*change))
    with pytest.raises(ValueError, match=message):
        records.load_study(path)
    with pytest.raises(ValueError, match=r"--only \['y'\]: the methods are"):
        path.write_text(STUDY)
        records.runs_of(records.load_study(path), ["y"])


def test_a_study_without_records_says_how_to_make_them(study, monkeypatch, capsys):
    loaded, _ = study
    monkeypatch.setattr(records, "load_study", lambda path: loaded)
    monkeypatch.setattr(sys, "argv", ["run.py", "s.yaml", "--summarize"])
    with pytest.raises(SystemExit):
        tool.main()
    assert "has no runs of s.yaml: make them with --run" in capsys.readouterr().err


def test_records_do_not_make_the_code_dirty(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    assert tool.commit() is None  # no repository: an installed package
    files = ["studies/s.yaml", "studies/s.json", "code.py"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    (tmp_path / files[1]).write_text("a run")
    assert len(tool.commit()) == 12
    for name in (files[0], files[2]):
        (tmp_path / name).write_text("x")
        assert tool.commit().endswith("-dirty")
        (tmp_path / name).write_text("")


@pytest.fixture
def run_dir(tmp_path):
    """A run of 96 steps; step 95 was run twice."""
    name = "balance/features/weight_features"
    steps = [{"iteration": i, name: float(i), "loss": 1.0} for i in range(96)]
    steps.append({"iteration": 95, name: 1000.0})
    (tmp_path / "balance.json").write_text("\n".join(map(json.dumps, steps)) + "\n")
    (tmp_path / "results.json").write_text(json.dumps({"trees": {"bbox": {"AP": 20.0}}}))
    (tmp_path / "model_final.pth").write_bytes(b"weights")
    return tmp_path


def test_a_run_is_kept_in_few_numbers(run_dir):
    record = tool.read_run(run_dir, balance=True)
    assert record["results"] == {"trees": {"bbox": {"AP": 20.0}}}
    assert set(record["balance"]) == {"weight_features"}
    weights = record["balance"]["weight_features"]
    assert len(weights) == 24 and weights[0] == [1.5, 1.5]
    assert weights[-1] == [93.5, 93.5]  # the median of 92, 93, 94 and 1000
    assert record["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert set(tool.read_run(run_dir)) == {"results", "weights_sha256"}


def test_a_line_that_was_cut_off_by_a_kill_is_left_out(run_dir):
    whole = tool.read_run(run_dir, balance=True)
    text = (run_dir / "balance.json").read_text()
    (run_dir / "balance.json").write_text('{"iteration": 3, "tot\n' + text)
    assert tool.read_run(run_dir, balance=True) == whole


def test_a_run_without_a_teacher_has_no_balance(run_dir):
    (run_dir / "balance.json").unlink()
    assert "balance" not in tool.read_run(run_dir, balance=True)
