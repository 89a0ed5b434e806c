# Copyright (c) The mokd_det authors.
"""Study files, the file of records, paired differences, and the pictures."""

import json
import multiprocessing

import plots
import pytest
import records
from PIL import Image

METRIC = "trees/bbox/AP"


def make_study(folder, methods, **keys):
    keys = {"seeds": [1, 2], "baseline": "scratch", "metrics": [METRIC], **keys}
    path = folder / "study.yaml"
    path.write_text(json.dumps({**keys, "methods": methods}))
    return records.load_study(path)


def write(study, name, seed, value, teacher=None):
    record = {"method": name, "seed": seed, "results": {"trees": {"bbox": {"AP": value}}}}
    record |= {"teacher_sha256": teacher} if teacher else {}
    records.add_record(study["records"], "runs", record)


def add(path, name):
    for seed in range(10):
        records.add_record(path, "runs", {"method": name, "seed": seed})


def test_processes_that_write_one_file_lose_nothing(tmp_path):
    path = tmp_path / "folder" / "study.json"
    jobs = [multiprocessing.get_context("fork").Process(target=add, args=(path, n)) for n in "abc"]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    runs = records.read_file(path)["runs"]
    assert sorted((r["method"], r["seed"]) for r in runs) == [
        (n, s) for n in "abc" for s in range(10)
    ]
    assert [p.name for p in path.parent.iterdir()] == ["study.json"]


def test_a_record_of_the_same_run_is_replaced(tmp_path):
    study = make_study(tmp_path, {"scratch": {"config": "c"}})
    for value in (1.0, 2.0):
        write(study, "scratch", 1, value)
        for config in "cd":
            teacher = {"config": config, "results": value}
            records.add_record(study["records"], "teachers", teacher)
    content = records.read_file(study["records"])
    assert [t["results"] for t in content["teachers"]] == [2.0, 2.0]
    assert records.values_of(records.read_records(study)["scratch"], METRIC) == {1: 2.0}
    assert len(study["records"].read_text().splitlines()) == 2 + 2 + 2 + 2 + 1


def test_two_methods_never_share_a_folder(tmp_path):
    with pytest.raises(ValueError, match="'x 2\\^-1' and 'x 2\\^1' share x_2_1-1: rename one"):
        make_study(tmp_path, {n: {"config": "c"} for n in ("x 2^-1", "x 2^1")}, baseline="x 2^1")


def test_an_axis_needs_its_label(tmp_path):
    methods = {"scratch": {"config": "c", "line": "l", "x": 1}}
    with pytest.raises(ValueError, match="'scratch' needs line and x, and the study an axis"):
        make_study(tmp_path, methods)
    study = make_study(tmp_path, methods, axis="factor", teacher="t")
    assert study["teacher"] == ["t"] and study["axis"] == "factor"


def test_a_balance_of_a_method_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="balance 'mokd' is none of its methods"):
        make_study(tmp_path, {"scratch": {"config": "c"}}, balance=["mokd"])


def test_a_detector_that_finds_nothing_has_ap_0(tmp_path):
    """Detectron2 has NaN for every AP if there is no box at all; results.json then has null."""
    study = make_study(tmp_path, {n: {"config": "c"} for n in ("scratch", "mokd")})
    for seed in (1, 2):
        write(study, "scratch", seed, None if seed == 1 else 4.0)
        write(study, "mokd", seed, 10.0)
    rows = records.summarize(study)
    assert rows["scratch"][METRIC]["values"] == {1: 0.0, 2: 4.0}
    assert rows["mokd"][METRIC]["differences"]["scratch"][0] == 8  # of 10 and 6


def test_runs_with_other_teachers_are_not_compared(tmp_path):
    """The same seed trains another teacher on another kind of processor."""
    names = ("scratch", "fixed", "mokd", "before")
    methods = {name: {"config": "c"} for name in names}
    study = make_study(tmp_path, methods, baseline=["scratch", "fixed"])
    for seed in (1, 2):
        write(study, "scratch", seed, 50.0)
        write(study, "fixed", seed, 60.0, "x")
        write(study, "mokd", seed, 61.0, "x" if seed == 1 else "y")
        write(study, "before", seed, 70.0)  # not recorded
    rows = records.summarize(study)
    assert rows["mokd"][METRIC]["differences"] == {"scratch": (11.0, 0.0), "fixed": (1.0, None)}
    assert rows["before"][METRIC]["differences"]["fixed"] is None


@pytest.mark.parametrize(
    "value, text", [(4.25, "4.3"), (-2.95, "-3.0"), (-0.04, "0.0"), (42.747, "42.7")]
)
def test_numbers_are_rounded_as_a_reader_rounds(value, text):
    assert f"{records.rounded(value):.1f}" == text


def balance_of(scale):
    names = ("cosine_features", "dominance_features", "weight_features", "share_task")
    return {name: [[i, scale / (1 + i)] for i in range(0, 100, 10)] for name in names}


def test_pictures(tmp_path):
    runs = {"scratch": {1: {}}, "mokd": {1: {"balance": balance_of(1.0)}}}
    runs["mokd"][2] = {"balance": balance_of(2.0)}
    assert plots.plot_balance(runs, tmp_path / "balance.png")
    lines = {"mokd": {0.1: [1.0, 2.0], 10.0: [1.5, 2.5]}, "fixed": {0.1: [0.0], 10.0: [1.0]}}
    plots.plot_axis(lines, ("scratch", [1.0]), "factor", METRIC, tmp_path / "axis.png")
    for name in ("balance", "axis"):
        assert len(Image.open(tmp_path / f"{name}.png").convert("RGB").getcolors(10**6)) > 50


def test_nothing_to_draw_writes_nothing(tmp_path):
    assert not plots.plot_balance({"scratch": {1: {}}}, tmp_path / "balance.png")
    assert not list(tmp_path.iterdir())
