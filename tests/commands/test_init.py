# Copyright (c) The mokd_det authors.
"""``mokd init`` for detectors: what it writes is read and checked as in training."""

import json
import os
import statistics

import pytest
import torch

from mokd_det.commands import init, new_detector, new_project
from mokd_det.commands.new_kind import Data
from mokd_det.config import load_config
from mokd_det.engine import prepare_datasets, validate
from mokd_det.tasks import task_of

from ..conftest import CONFIGS, ROOT, TREES

TRAIN, VAL = ([f"{TREES}/{split}.json", f"{TREES}/{split}"] for split in ("train", "val"))


@pytest.fixture
def create(run_init):
    """From arguments, beside a student and data, to what is printed; in a folder of its own."""

    def run(*args, student="r18-retinanet", data=TRAIN, output="cells"):
        return run_init("--student", student, "--data", *data, "--output", output, *args)

    return run


@pytest.fixture
def own_teacher(tmp_path):
    """The arguments of one that is trained."""
    (tmp_path / "t.pth").touch()
    return ["--teacher", str(ROOT / CONFIGS["teacher"]), "--teacher-weights", "t.pth"]


@pytest.mark.parametrize("student", new_detector.STUDENTS)
def test_students_with_a_teacher_that_is_trained(create, own_teacher, tmp_path, student):
    said = create(*own_teacher, "--val", *VAL, student=student, output=student)
    assert "6 images with objects, 1 class; 1500 steps of 4 images (1000 epochs) on the CPU" in said
    assert "Schedule: 12 epochs, but at least 1500 steps" in said
    assert "mokd train --config-file " + f"{student}/student_mokd.yaml" in said
    assert "teacher.yaml" not in said
    os.chdir("/")
    for name in ("scratch", "mokd"):
        cfg = load_config(str(tmp_path / student / f"student_{name}.yaml"))
        task = validate(cfg)
        prepare_datasets(cfg, task)  # also that the number of classes is right
        assert cfg.MOKD.ENABLED == (name == "mokd") and cfg.SOLVER.MAX_ITER == 1500
        assert cfg.OUTPUT_DIR == str(tmp_path / student / "runs" / name)
        is_stock = cfg.MODEL.BACKBONE.NAME.endswith("resnet_fpn_backbone")
        if student.startswith(("r18", "r50", "mobilenet")):
            assert is_stock != student.startswith("mobilenet")
            assert cfg.MODEL.RESNETS.DEPTH == (18 if student.startswith("r18") else 50)
    assert cfg.MOKD.TEACHER.WEIGHTS == str(tmp_path / "t.pth")


def test_a_teacher_of_the_model_zoo(create, tmp_path, monkeypatch):
    """Of the same number of classes; its weights have an address."""
    monkeypatch.setattr(new_detector.Detectors, "check_teacher", lambda *args: None)
    create("--teacher", ZOO)
    teacher = load_config(str(tmp_path / "cells/student_mokd.yaml")).MOKD.TEACHER
    assert teacher.CONFIG_FILE.endswith(ZOO)
    assert teacher.WEIGHTS.startswith("https://") and "retinanet_R_50_FPN_3x" in teacher.WEIGHTS


def test_configs_are_replaced_and_runs_stay(create, own_teacher, tmp_path):
    create("--teacher", "r50-retinanet")
    run = tmp_path / "cells/runs/teacher/model_final.pth"
    run.parent.mkdir(parents=True)
    run.touch()
    create(*own_teacher, "--epochs", "3", "--overwrite")
    left = {path.name for path in (tmp_path / "cells").iterdir()}
    assert left == {"common.yaml", "student_scratch.yaml", "student_mokd.yaml", "runs"}
    assert run.exists()
    assert load_config(str(tmp_path / "cells/student_mokd.yaml")).SOLVER.MAX_ITER == 5


def test_a_teacher_by_the_checkpoint_of_a_run(create, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model_final.pth").touch()
    (tmp_path / "run/config.yaml").write_text(f"_BASE_: {ROOT / CONFIGS['teacher']}\n")
    said = create("--teacher", "run/model_final.pth")
    assert "teacher.yaml" not in said
    teacher = load_config(str(tmp_path / "cells/student_mokd.yaml")).MOKD.TEACHER
    assert teacher.CONFIG_FILE == str(tmp_path / "run/config.yaml")
    assert teacher.WEIGHTS == str(tmp_path / "run/model_final.pth")


NAMES = [
    *new_detector.TEACHERS,
    "mobilenet-faster-rcnn",
    "retinanet_resnet50_fpn_v2",
    "ssd300_vgg16",
]


@pytest.mark.parametrize("teacher", NAMES)
def test_teachers_by_name_are_tuned_first(create, tmp_path, teacher):
    """From any folder, and with paths that were given relative to this one."""
    (tmp_path / "train.json").write_text((TREES / "train.json").read_text())
    (tmp_path / "train").symlink_to(TREES / "train")
    said = create("--teacher", teacher, data=["train.json", "train"], output=f"my-{teacher}")
    assert "Without --val nothing is evaluated" in said
    commands = [line.split()[1::2] for line in said.splitlines() if line.startswith("  mokd ")]
    assert [os.path.basename(file) for _, file in commands] == [
        *["teacher.yaml"] * 2,
        *["student_scratch.yaml", "student_mokd.yaml", "student_mokd.yaml"],
    ]
    os.chdir("/")
    folder = tmp_path / f"my-{teacher}"
    cfg = load_config(str(folder / "teacher.yaml"))
    prepare_datasets(cfg, validate(cfg))
    student = load_config(str(folder / "student_mokd.yaml"))
    assert student.MOKD.TEACHER.WEIGHTS == f"{cfg.OUTPUT_DIR}/model_final.pth"
    with pytest.raises(FileNotFoundError, match="Train the teacher first"):
        validate(student)
    os.makedirs(cfg.OUTPUT_DIR)
    open(student.MOKD.TEACHER.WEIGHTS, "w").close()
    validate(student)
    assert task_of(student).teacher_config(student).MODEL.META_ARCHITECTURE == (
        cfg.MODEL.META_ARCHITECTURE
    )


@pytest.mark.parametrize("student", ["small-faster-rcnn", "mobilenet-retinanet"])
@pytest.mark.parametrize("teacher", ["mobilenet-faster-rcnn", "own"])
def test_without_a_download(create, own_teacher, tmp_path, monkeypatch, student, teacher):
    monkeypatch.setenv("DETECTRON2_DATASETS", "sets")
    weights = tmp_path / "sets/pretrained/mobilenet_v2-b0353104.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    teachers = own_teacher if teacher == "own" else ["--teacher", teacher]
    said = create(*teachers, "--no-download", student=student)
    assert "download" not in said
    written = list((tmp_path / "cells").glob("[!c]*.yaml"))
    assert len(written) == (2 if teacher == "own" else 3)
    for file in written:
        assert load_config(str(file)).MODEL.TORCHVISION.WEIGHTS == str(weights)
    assert "will be downloaded" in create(*teachers, student=student, output="online")


@pytest.mark.parametrize("student, regions", [("r18-retinanet", 512), ("small-faster-rcnn", 128)])
def test_on_a_cpu_images_and_regions_are_few(create, own_teacher, tmp_path, student, regions):
    """The images' own size, for their shorter sides are small."""
    create(*own_teacher, student=student)
    cfg = load_config(str(tmp_path / "cells/student_mokd.yaml"))
    sides = {cfg.INPUT.MIN_SIZE_TEST, *cfg.INPUT.MIN_SIZE_TRAIN}
    rows = json.loads((TREES / "train.json").read_text())["images"]
    assert sides == {statistics.median_low(min(row["width"], row["height"]) for row in rows)}
    assert cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE == regions
    assert cfg.MOKD.TEACHER.PROPOSALS == 128


def test_torchvisions_detectors_on_a_cpu(create, own_teacher, tmp_path):
    create(*own_teacher, student="tv-mobilenet-faster-rcnn")
    options = load_config(str(tmp_path / "cells/student_scratch.yaml")).MODEL.TORCHVISION_DETECTOR
    assert options.OPTIONS == {"min_size": 192, "max_size": 320, "box_batch_size_per_image": 128}


def test_data_in_the_folder_of_data_sets(create, own_teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(TREES.parent))
    data = [f"datasets://{TREES.name}/train{end}" for end in (".json", "")]
    create(*own_teacher, data=data)
    cfg = load_config(str(tmp_path / "cells" / "student_mokd.yaml"))
    assert cfg.DATASETS.COCO == [["cells_train", *TRAIN]]


@pytest.mark.parametrize(
    "gpus, images, args, expected",
    [
        (0, 100, [], (4, 1500)),
        (1, 1000, [], (4, 3000)),
        (8, 118_287, [], (32, 44358)),
        (0, 100, ["--epochs", "2"], (4, 50)),
    ],
)
def test_the_schedule_grows_with_data_and_devices(monkeypatch, gpus, images, args, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    given = ["--teacher", "x", "--student", "x", "--data", "a.json", "a", *args]
    args = init.argument_parser().parse_args(given)
    common = new_project._common(args, new_detector.Detectors(), Data([], images), "x")
    assert (common["SOLVER.IMS_PER_BATCH"], common["SOLVER.MAX_ITER"]) == expected
    assert common["MODEL.DEVICE"] == ("cuda" if gpus else "cpu")


ZOO = "COCO-Detection/retinanet_R_50_FPN_3x.yaml"


def write(path, **changes):
    path.write_text(json.dumps({**json.loads((TREES / "train.json").read_text()), **changes}))
    return [str(path), str(TREES / "train")]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "args, changes, message",
    [
        (
            [],
            {"student": "r18-retinanett"},
            "--student 'r18-retinanett' is unknown: did you mean r",
        ),
        ([], {"student": "xyz"}, "--student 'xyz' is unknown: expected r18-retinanet, "),
        (["--teacher", "r50-retinant"], {}, "no known name: did you mean r50-retinanet"),
        ([], {"student": "resnet18"}, "--student 'resnet18' is a classifier"),
        (
            ["--teacher", "resnet34"],
            {},
            "--teacher 'resnet34' is a classifier, but --data '.*json'",
        ),
        (["--teacher", "no.yaml"], {}, "--teacher 'no.yaml' does not exist"),
        (["--teacher-weights", "no.pth"], {}, "train it first: mokd train --config-file"),
        (["--teacher", str(ROOT / "configs/Digits/teacher.yaml")], {}, "is no detector's config"),
        (["--teacher", "r50-retinanet", "--teacher-weights", "t.pth"], {}, "has its own"),
        (
            ["--teacher", ZOO],
            {},
            "--teacher knows 80 classes, but --data has 1: Tree. A teacher by",
        ),
        ([], {"data": ["no.json", TRAIN[1]]}, "--data 'no.json' does not exist"),
        ([], {"data": [str(TREES), TRAIN[1]]}, "--data '.*' '.*': a detector .*prepare_voc.py"),
        ([], {"data": TRAIN[:1]}, "--data '.*json': a detector takes a JSON .* and the folder"),
        ([], {"data": ["no"]}, "--data 'no' does not exist"),
        (["--no-download"], {}, "--student 'r18-retinanet' .* Expected mobilenet-retinanet, mob"),
        (["--no-download"], {"student": "small-faster-rcnn"}, "python datasets/prepare_pretr"),
        ([], {"data": ["datasets://no.json", TRAIN[1]]}, "--data '.*no.json' does not exist"),
        ([], {"data": [TRAIN[0], "no"]}, "--data: the folder of images 'no' does not exist"),
        ([], {"data": [TRAIN[0], str(TREES)]}, "(?s)--data '.*/train.json'.*6.* 0.jpg"),
        ([], {"data": "empty"}, "(?s)--data '.*/empty.json'.* no images"),
        ([], {"data": "bare"}, "--data '.*/bare.json' has no object to learn from"),
        (["--val", VAL[1]], {}, "--val '.*/val' is for a classifier, but --data"),
        (["--val", *VAL[:1], "no"], {}, "--val: the folder of images 'no' does not exist"),
        (["--val", "other"], {}, "--val '.*/other.json' has the classes 1: pear, but --data 1: "),
        ([], {"output": "."}, "--output '.' is there already: name a new folder"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_written(
    create, own_teacher, tmp_path, monkeypatch, args, changes, message
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    if changes.get("data") == "empty":
        changes = {"data": write(tmp_path / "empty.json", images=[], annotations=[])}
    if changes.get("data") == "bare":
        changes = {"data": write(tmp_path / "bare.json", annotations=[])}
    if args[-1:] == ["other"]:
        args = ["--val", *write(tmp_path / "other.json", categories=[{"id": 1, "name": "pear"}])]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        create(*own_teacher, *args, **changes)
    assert not (tmp_path / "cells").exists()
