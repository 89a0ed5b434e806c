# Copyright (c) The mokd_det authors.
"""What is kept of a run, and the pictures of many."""

import hashlib
import json
import math

import pytest
from PIL import Image

from mokd_det.evaluation import write_results
from mokd_det.study import (
    format_table,
    load_study,
    plot_axis,
    plot_balance,
    plot_curves,
    read_records,
    read_run,
    runs_of,
    summarize,
    values_of,
)

METRIC = "trees/bbox/AP"


@pytest.fixture
def run_dir(tmp_path):
    """A run of 96 steps, evaluated at 48 and 96; step 95 was run twice."""
    lines = [{"iteration": i, "total_loss": 96.0 - i, "lr": 0.1} for i in range(0, 96, 2)]
    lines += [{"iteration": 48, METRIC: 10.0}, {"iteration": 96, METRIC: 20.0}]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    steps = [{"iteration": i, "balance/features/weight_features": float(i)} for i in range(96)]
    steps.append({"iteration": 95, "balance/features/weight_features": 1000.0})
    (tmp_path / "balance.json").write_text("\n".join(map(json.dumps, steps)) + "\n")
    (tmp_path / "results.json").write_text(json.dumps({"trees": {"bbox": {"AP": 20.0}}}))
    (tmp_path / "model_final.pth").write_bytes(b"weights")
    return tmp_path


def test_a_run_is_kept_in_few_numbers(run_dir):
    record = read_run(run_dir)
    assert record["results"] == {"trees": {"bbox": {"AP": 20.0}}}
    assert record["curves"] == {METRIC: [[48, 10.0], [96, 20.0]]}
    assert set(record["losses"]) == {"total_loss"} and len(record["losses"]["total_loss"]) == 24
    assert record["losses"]["total_loss"][0] == [1, 95.0]  # of the iterations 0 and 2
    weights = record["balance"]["weight_features"]
    assert len(weights) == 24 and weights[0] == [1.5, 1.5]
    assert weights[-1] == [93.5, 93.5]  # the median of 92, 93, 94 and 1000
    assert record["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()


def test_a_line_that_was_cut_off_by_a_kill_is_left_out(run_dir):
    whole = read_run(run_dir)
    for name in ("metrics.json", "balance.json"):
        text = (run_dir / name).read_text()
        (run_dir / name).write_text('{"iteration": 3, "tot\n' + text)
    assert read_run(run_dir) == whole


def test_a_run_without_a_teacher_has_no_balance(run_dir):
    (run_dir / "balance.json").unlink()
    assert read_run(run_dir)["balance"] == {}


def record(scale):
    return {
        "curves": {METRIC: [[50, scale], [100, 2 * scale]]},
        "balance": {
            name: [[i, scale / (1 + i)] for i in range(0, 100, 10)]
            for name in ("cosine_features", "dominance_features", "weight_features", "share_task")
        },
    }


def test_pictures(tmp_path):
    records = {"scratch": {1: {**record(3.0), "balance": {}}}, "mokd": {1: record(1.0)}}
    records["mokd"][2] = record(2.0)
    assert plot_curves(records, [METRIC], tmp_path / "curves.png")
    assert plot_balance(records, tmp_path / "balance.png")
    lines = {"mokd": {0.1: [1.0, 2.0], 10.0: [1.5, 2.5]}, "fixed": {0.1: [0.0], 10.0: [1.0]}}
    plot_axis(lines, ("scratch", [1.0]), "factor", METRIC, tmp_path / "axis.png")
    for name in ("curves", "balance", "axis"):
        assert len(Image.open(tmp_path / f"{name}.png").convert("RGB").getcolors(10**6)) > 50


def test_nothing_to_draw_writes_nothing(tmp_path):
    only_end = {"scratch": {1: {"curves": {METRIC: [[100, 1.0]]}, "balance": {}}}}
    assert not plot_curves(only_end, [METRIC], tmp_path / "curves.png")
    assert not plot_balance(only_end, tmp_path / "balance.png")
    assert not list(tmp_path.iterdir())


def test_two_methods_never_share_a_record(tmp_path):
    path = tmp_path / "study.yaml"
    methods = "{x 2^-1: {config: c}, x 2^1: {config: c}}"
    path.write_text(f"{{seeds: [1], baseline: x 2^1, metrics: [a], methods: {methods}}}")
    with pytest.raises(ValueError, match="'x 2\\^-1' and 'x 2\\^1' would both be x_2_1-1.json"):
        load_study(path)


def test_methods_of_older_code_are_shown_and_not_run(tmp_path):
    path = tmp_path / "study.yaml"
    methods = "{now: {config: c}, before: {config: c, commit: 0123abc}}"
    path.write_text(f"{{seeds: [1, 2], baseline: now, metrics: [a], methods: {methods}}}")
    study = load_study(path)
    assert runs_of(study) == [("now", 1), ("now", 2)]
    with pytest.raises(ValueError, match="--only 'before': it is of the code of commit 0123abc"):
        runs_of(study, ["before"])
    study["folder"].mkdir()
    (study["folder"] / "before-2.json").write_text('{"seed": 2}')
    assert read_records(study) == {"before": {2: {"seed": 2}}}


def test_a_study_of_older_code_alone_has_no_runs(tmp_path):
    path = tmp_path / "study.yaml"
    methods = "{before: {config: c, commit: 0123abc}}"
    path.write_text(f"{{seeds: [1, 2], baseline: before, metrics: [a], methods: {methods}}}")
    assert runs_of(load_study(path)) == []


def test_a_detector_that_finds_nothing_has_ap_0(run_dir):
    """Detectron2 has NaN for every AP if there is no box at all; results.json then has null."""
    path = run_dir / "study.yaml"
    methods = "{scratch: {config: c}, mokd: {config: c, line: mokd, x: 1}}"
    path.write_text(
        f"{{seeds: [1, 2], baseline: scratch, metrics: [{METRIC}], axis: x, methods: {methods}}}"
    )
    study = load_study(path)
    study["folder"].mkdir()

    def write(name, seed, value):
        with open(run_dir / "metrics.json", "a") as f:
            f.write(json.dumps({"iteration": 96, METRIC: value}) + "\n")
        write_results({"trees": {"bbox": {"AP": value}}}, run_dir)
        content = json.dumps(read_run(run_dir))
        (study["folder"] / f"{name}-{seed}.json").write_text(content)

    for seed in (1, 2):
        write("scratch", seed, math.nan if seed == 1 else 4.0)
        write("mokd", seed, 10.0)
    rows = {row["method"]: row for row in summarize(study)}
    assert rows["scratch"]["values"] == {1: 0.0, 2: 4.0} and rows["scratch"]["mean"] == 2
    assert rows["mokd"]["differences"]["scratch"]["difference"] == 8  # of 10 and 6
    assert "| scratch |  | 2 | 2.00 (std 2.83) |" in format_table(study, list(rows.values()))
    records = read_records(study)
    assert values_of(records["scratch"], METRIC) == {1: 0.0, 2: 4.0}  # of plot_axis
    assert plot_curves(records, [METRIC], run_dir / "curves.png")


def test_an_axis_needs_its_label(tmp_path):
    path = tmp_path / "s.yaml"
    text = "seeds: [1]\nbaseline: a\nmetrics: [m]\nmethods:\n  a: {config: c, line: l, x: 1}\n"
    path.write_text(text)
    with pytest.raises(ValueError, match="'a' needs line and x, and the study an axis, or none"):
        load_study(path)
    path.write_text(text + "axis: factor\nteacher: t\n")
    study = load_study(path)
    assert study["teacher"] == ["t"] and study["baseline"] == ["a"] and study["axis"] == "factor"


def test_runs_with_other_teachers_are_not_compared(tmp_path):
    """The same seed trains another teacher on another kind of processor."""
    path = tmp_path / "study.yaml"
    methods = "{scratch: {config: c}, fixed: {config: c}, mokd: {config: c}, before: {config: c}}"
    path.write_text(
        f"{{seeds: [1, 2], baseline: [scratch, fixed], metrics: [a/b], methods: {methods}}}"
    )
    (tmp_path / "study").mkdir()

    def write(name, seed, value, teacher):
        content = {"method": name, "seed": seed, "results": {"a": {"b": value}}}
        content |= {"teacher_sha256": teacher} if teacher else {}
        (tmp_path / "study" / f"{name}-{seed}.json").write_text(json.dumps(content))

    for seed in (1, 2):
        write("scratch", seed, 50.0, None)
        write("fixed", seed, 60.0, "x")
        write("mokd", seed, 61.0, "x" if seed == 1 else "y")
        write("before", seed, 70.0, None)  # not recorded
    rows = {row["method"]: row for row in summarize(load_study(path))}
    assert rows["mokd"]["differences"]["fixed"] == {"difference": 1.0, "interval": None}
    assert rows["mokd"]["differences"]["scratch"] == {"difference": 11.0, "interval": 0.0}
    assert rows["before"]["differences"]["fixed"] == {"difference": None, "interval": None}
    assert rows["mokd"]["teachers"] == ["x", "y"] and rows["before"]["teachers"] == []
