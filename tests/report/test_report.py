# Copyright (c) The mokd_det authors.
"""The page on runs, from small folders written as a run writes them."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from mokd_det.commands.report import argument_parser
from mokd_det.commands.report import run as report
from mokd_det.report import balance, read_runs, write_report
from mokd_det.report.predictions import pictures
from mokd_det.report.runs import role_of
from mokd_det.report.curves import losses
from mokd_det.report.tables import cost_table, differences, gains, results_tables

from ..conftest import ROOT

MODEL = {"META_ARCHITECTURE": "RetinaNet", "WEIGHTS": ""}


@pytest.fixture
def make_run(tmp_path):
    """From (name, config, results) to the folder of a run; ``teacher``: the name of its teacher."""

    def make(name, results=None, teacher="", metrics=(), balance=(), **config):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        full = {"MODEL": MODEL, "DATASETS": {"TEST": ["val"]}, "OUTPUT_DIR": name, **config}
        weights = str(tmp_path / teacher / "model_final.pth") if teacher else ""
        full["MOKD"] = {"ENABLED": bool(teacher), "TEACHER": {"WEIGHTS": weights}}
        (folder / "config.yaml").write_text(yaml.safe_dump(full))
        if results is not None:
            (folder / "results.json").write_text(json.dumps(results))
        for file, lines in (("metrics.json", metrics), ("balance.json", balance)):
            (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(folder)

    return make


def page(folders, tmp_path, **options):
    write_report(folders, str(tmp_path / "r.html"), **options)
    return (tmp_path / "r.html").read_text()


# ---- what runs are -------------------------------------------------------------------------------


def test_roles_labels_results_and_gains(make_run):
    other = {"MODEL": {**MODEL, "META_ARCHITECTURE": "FCOS"}}
    runs = read_runs(
        [
            make_run("a/mokd", {"bbox": {"AP": 20.0, "APl": None}}, teacher="a/teacher"),
            make_run("a/scratch", {"bbox": {"AP": 18.5, "AP-cat": 3.0}}),
            make_run("a/teacher", {"val": {"bbox": {"AP": 40.0}}}, **other),
            make_run("b/mokd", **other),
        ]
    )
    assert [role_of(run, runs) for run in runs] == ["student", "from scratch", "teacher", "run"]
    assert [run.label for run in runs] == ["a/mokd", "a/scratch", "a/teacher", "b/mokd"]
    table = results_tables(runs)["val, bbox"]
    assert table.head == ["run", "is", "AP"] and table.best[2] == 20  # not the teacher's
    assert [row[2:] for row in table.rows] == [[20.0], [18.5], [40.0]]
    assert gains(runs) == ["a/mokd: +1.5 AP on val (bbox) against a/scratch, from scratch."]
    # A student of another model has no baseline among them.
    distilled = make_run("c/mokd", {"bbox": {"AP": 60.0}}, teacher="a/teacher", **other)
    runs = read_runs([*(run.folder for run in runs), distilled])
    assert role_of(runs[-1], runs) == "student" and len(gains(runs)) == 1


def test_a_run_that_has_not_ended_has_its_last_evaluation(make_run):
    lines = [
        {"iteration": 19, "total_loss": 2.0, "time": 0.5, "fast_rcnn/cls_accuracy": 0.9},
        {"iteration": 39, "bbox/AP": 1.0, "bbox/APl": 0.0},
        {"iteration": 59, "total_loss": 1.0, "time": 0.7, "bbox/AP": 2.0, "bbox/APl": math.nan},
    ]
    (run,) = read_runs([make_run("run", metrics=lines)])
    assert run.results == {"val": {"bbox": {"AP": 2.0, "APl": None}}} and run.results_at == 60
    assert results_tables([run])["val, bbox"].head == ["run", "is", "AP"]  # no empty column
    assert cost_table([run]).head == ["run", "iterations", "median s / iteration"]
    assert cost_table([run]).rows == [["run", 60, 0.6]]


def test_the_time_of_training_is_that_of_all_its_parts(make_run):
    (run,) = read_runs([folder := make_run("run")])
    with open(f"{folder}/log.txt", "w") as file:
        for time in ("0:30:00", "1 day, 2:15:36"):
            file.write(f"hooks INFO: Total training time: {time} (0:00:01 on hooks)\n")
    assert run.hours == pytest.approx(26.76)


def test_options_that_differ(make_run):
    folders = [make_run("a", SEED=1, SOLVER={"MAX_ITER": 5}), make_run("b", SEED=2, SOLVER={})]
    table = differences(read_runs(folders))
    assert [row[0] for row in table.rows] == ["SEED", "SOLVER", "SOLVER.MAX_ITER"]
    assert table.rows[0][1:] == ["1", "2"] and table.rows[2][1:] == ["5", "—"]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name, content, message",
    [
        (None, None, "no config.yaml: expected the OUTPUT_DIR of a training"),
        ("config.yaml", "a: [", "is no YAML"),
        ("config.yaml", "text", "is no config"),
        ("config.yaml", "!!python/object/apply:os.system [ls]", "is no YAML"),
        ("results.json", "{", "is no JSON"),
    ],
)
def test_folders_that_are_no_runs(make_run, tmp_path, name, content, message):
    folder = tmp_path / "run"
    if name is None:
        folder.mkdir()
    else:
        make_run("run")
        (folder / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_runs([str(folder)])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "change, message",
    [
        ({"score": 2.0}, "--score is 2.0"),
        ({"count": -1}, "--pictures is -1"),
        ({"output": "no/r.html"}, "--output 'no/r.html': its folder"),
        ({"folders": 2}, "is given twice"),
    ],
)
def test_arguments_out_of_range(make_run, tmp_path, change, message):
    folders = [make_run("run")] * change.pop("folders", 1)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        write_report(folders, **{"output": str(tmp_path / "r.html"), **change})
    assert not (tmp_path / "r.html").exists()


# ---- curves --------------------------------------------------------------------------------------


BALANCE = [
    {
        "iteration": 20 * i + 19,
        "balance/features/weight_task": 1.0,
        "balance/features/weight_outputs": value,
        "balance/features/cosine_outputs": 0.1,
        "balance/features/fallbacks_degenerate": i,
    }
    for i, value in enumerate([0.0, 0.0, 0.004, 3.0])
]


def test_weights_of_zero_are_visible():
    series = {
        name: (list(range(4)), [line[name] for line in BALANCE])
        for name in BALANCE[0]
        if name != "iteration"
    }
    figure = balance.balance_figure([("run $x_", series)])
    (axis,) = [axis for axis in figure.axes if axis.get_ylabel() == "weights"]
    figure.canvas.draw()
    height = figure.bbox.height
    lines = [line for line in axis.lines if len(line.get_ydata()) == 4]
    drawn = np.concatenate([axis.transData.transform(line.get_xydata())[:, 1] for line in lines])
    assert np.isfinite(drawn).all() and (0 < drawn).all() and (drawn < height).all()
    at = {value: axis.transData.transform((0, value))[1] for value in (0, 0.004, 3)}
    assert axis.bbox.y0 + 2 < at[0] < at[0.004] - 5 < at[3] < axis.bbox.y1
    assert "fallbacks: 3 degenerate" in figure.axes[0].get_title()


@pytest.mark.parametrize("values", [[0.0, 0.0], [-1.0, 2.0], [1e-9, 1.0], [float("inf"), 0.0]])
def test_any_weights_can_be_drawn(values):
    series = {"balance/features/weight_outputs": ([0, 1], values)}
    figure = balance.balance_figure([("run", series)])
    figure.canvas.draw()
    assert figure.axes[0].get_yscale() == "symlog"


def test_short_runs_are_drawn_as_they_are_and_long_ones_smoothed():
    short, long = ([0.0, 1.0] * n for n in (5, 20))
    assert balance.running_median(short).tolist() == short
    assert set(balance.running_median(long)[2:-2]) == {0.0, 1.0}
    assert balance.running_median([0.0] * 10 + [9.0] + [0.0] * 10).max() == 0


def test_results_of_each_class(make_run):
    classes = {"AP": 30.0, "AP-cat": 20.0, "AP-dog": 40.0}
    runs = read_runs([make_run("a", {"bbox": classes}), make_run("b", {"bbox": {"AP": 1.0}})])
    table = results_tables(runs)["val, bbox: AP of each class"]
    assert table.head == ["run", "is", "cat", "dog"]
    assert [row[2:] for row in table.rows] == [[20.0, 40.0], [None, None]]
    of_one = {"AP": 30.0, "AP-cat": 30.0}
    assert list(results_tables(read_runs([make_run("c", {"bbox": of_one})]))) == ["val, bbox"]


# ---- pictures ------------------------------------------------------------------------------------


def detection_data(folder):
    """Three images of 40 x 30 with an object each."""
    (folder / "images").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 100, 0)).save(folder / "images" / f"{i}.png")
    data = {
        "categories": [{"id": 7, "name": "cat <b>"}],
        "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(3)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 7, "bbox": [5, 5, 10, 10]} for i in range(3)
        ],
    }
    (folder / "val.json").write_text(json.dumps(data))
    return [["val", str(folder / "val.json"), str(folder / "images")]]


def add_detections(folder, boxes, data_set="val"):
    """``boxes``: (image, x, score)."""
    path = f"{folder}/inference/{data_set}"
    subprocess.run(["mkdir", "-p", path], check=True)
    found = [
        {"image_id": i, "category_id": 7, "bbox": [x, 5, 10, 10], "score": s} for i, x, s in boxes
    ]
    with open(f"{path}/coco_instances_results.json", "w") as f:
        json.dump(found, f)


def test_pictures_of_detectors_begin_with_what_differs_most(make_run, tmp_path):
    sets = {"DATASETS": {"TEST": ["val"], "COCO": detection_data(tmp_path / "data")}}
    first, second = make_run("a", **sets), make_run("b", **sets)
    add_detections(first, [(0, 5, 0.9), (1, 5, 0.9), (2, 6, 0.9), (2, 25, 0.2)])
    add_detections(second, [(0, 5, 0.9), (1, 25, 0.8), (1, 5, 0.3), (2, 5, 0.9)])
    runs = read_runs([first, second])
    shown, reason = pictures(runs, "val", 5, 0.5)
    assert not reason and [p.name for p in shown] == ["1.png"]  # the others are alike
    assert [[box.right for box in side] for side in shown[0].said] == [[True], [False]]
    shown, _ = pictures(runs, "val", 5, 0.1)
    assert [p.name for p in shown] == ["1.png", "2.png"]
    assert [box.right for box in shown[0].said[1]] == [False, True]
    assert [p.name for p in pictures(runs, "val", 1, 0.1)[0]] == ["1.png"]
    # One run is compared with the ground truth.
    shown, _ = pictures(runs[1:], "val", 5, 0.5)
    assert [p.name for p in shown] == ["1.png"]

    text = page([first, second], tmp_path)
    assert text.count("data:image/jpeg;base64,") == 1  # the pixels once, not for each run
    assert "cat &lt;b&gt;" in text and "<b>b</b>: 0 found, 1 missed, 1 wrong" in text


@pytest.mark.parametrize(
    "change, message",
    [
        ("no predictions", "No predictions of run"),
        ("no annotations", "is not on this machine"),
        ("unknown", "No config says where the images of"),
        ("unsure", "give a lower --score"),
        ("no image", "0.png: No such file or directory."),
        ("outside", "it is not in"),
    ],
)
def test_what_is_missing_is_said(make_run, tmp_path, change, message):
    coco = detection_data(tmp_path / "data")
    name = "unknown" if change == "unknown" else "val"
    folder = make_run("run", DATASETS={"TEST": [name], "COCO": coco})
    if change != "no predictions":
        score = 0.1 if change == "unsure" else 0.9
        add_detections(folder, [(i, 25, score) for i in range(3)], name)
    path = tmp_path / "data" / "val.json"
    if change == "no annotations":
        path.unlink()
    if change == "no image":
        (tmp_path / "data/images/0.png").unlink()
    if change == "outside":  # of an annotation file of somebody else
        (tmp_path / "data/images/0.png").rename(tmp_path / "data/secret.png")
        path.write_text(path.read_text().replace('"0.png"', '"../secret.png"'))
    text = page([folder], tmp_path)
    assert message in text
    # The other two images are shown where there are some.
    assert text.count("data:image/jpeg") == (2 if change in ("no image", "outside") else 0)


@pytest.mark.parametrize("packed", [True, False])
def test_pictures_of_classifiers(make_run, tmp_path, packed):
    names = ["cat", "dog"]
    if packed:
        path = tmp_path / "val.npz"
        images = np.zeros((2, 8, 8), np.uint8)
        np.savez(path, images=images, labels=np.array([0, 1]), classes=np.array(names))
        files = ["val.npz#0", "val.npz#1"]
    else:
        path = tmp_path / "val"
        files = [f"{name}/x.png" for name in names]
        for file in files:
            (path / file).parent.mkdir(parents=True)
            Image.new("L", (8, 8)).save(path / file)
    folders = []
    for name, shares in (("a", [0.9, 0.6]), ("b", [0.9, 0.2])):
        sets = {"TEST": ["val"], "CLASSIFICATION": [["val", str(path)]]}
        folders.append(make_run(name, {"classification": {"top1": 50.0}}, DATASETS=sets))
        predictions = []
        for label, (file, share) in enumerate(zip(files, shares)):
            pairs = sorted([(share, label), (1 - share, 1 - label)], reverse=True)
            scores, classes = zip(*pairs)
            predictions.append({"name": file, "label": label, "classes": classes, "scores": scores})
        folder = tmp_path / name / "inference" / "val"
        folder.mkdir(parents=True)
        (folder / "predictions.json").write_text(json.dumps(predictions))
    shown, reason = pictures(read_runs(folders), "val", 5, 0.5)
    assert not reason and [(p.name, p.truth) for p in shown] == [(files[1], "dog")]
    assert [name for name, _ in shown[0].said] == ["dog", "cat"]
    text = page(folders, tmp_path)
    assert 'a: <span class="right">dog</span> 0.60' in text
    assert 'b: <span class="wrong">cat</span> 0.80' in text and "top1" in text


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_needs_no_other_file_and_escapes_what_it_shows(make_run, tmp_path):
    lines = [
        {"iteration": 19, "total_loss": 2.0, "loss_<i>": 1.0},
        {"iteration": 39, "total_loss": 1.0, "loss_<i>": 2.0, "bbox/AP": 1.0},
    ]
    first = make_run("a<script>x", teacher="t", metrics=lines, balance=BALANCE, SEED=1)
    second = make_run("b $x_$", {"bbox": {"AP": 1.0}}, metrics=lines, SEED=2)
    text = page([first, second], tmp_path)
    links = re.findall(r'(?:src|href)="([^"#]*)', text)
    assert all(not link or link.startswith("data:") for link in links)
    assert "<script" not in text and "<i>" not in text and "@import" not in text
    assert "b $x_$" in text and text.count("<svg") >= 3
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))  # the figures would take each other's parts
    for part in ("Results", "Speed and size", "Balance", "Options that differ", "Pictures"):
        assert f"<h2>{part}</h2>" in text


def test_the_command(make_run, tmp_path, capsys):
    output = str(tmp_path / "r.html")
    report(argument_parser().parse_args([make_run("run"), "--output", output]))
    assert capsys.readouterr().out == f"{output}\n"
    assert "No run has results" in (tmp_path / "r.html").read_text()


@pytest.mark.slow
def test_it_needs_no_torch():
    code = "import sys, mokd_det.report, mokd_det.commands.report; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_classifier_without_a_teacher_is_compared_by_its_task(make_run):
    """Its total loss is the task's, and Detectron2 logs the total alone."""
    lines = [{"iteration": 19, "total_loss": 2.0}]
    model = {"MODEL": {**MODEL, "META_ARCHITECTURE": "Classifier"}}
    runs = read_runs([make_run("a", metrics=lines, **model), make_run("b", metrics=lines)])
    assert [[*losses(run)] for run in runs] == [["loss_cls"], ["total_loss"]]
