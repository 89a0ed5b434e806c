# Copyright (c) The mokd_det authors.
"""``mokd init`` for classifiers: what it writes is read and checked as in training."""

import os

import pytest
import torch
from PIL import Image
from torchvision.models import get_model_weights

from mokd_det.commands import new_classifier
from mokd_det.commands.new_kind import Data
from mokd_det.config import load_config
from mokd_det.engine import prepare_datasets, validate
from mokd_det.modeling import CLASSIFIERS, build_network, network_facts
from mokd_det.tasks import task_of

from ..conftest import DIGITS, ROOT, TREES
from .test_init import TRAIN as COCO

RUNS = ["teacher.yaml", "student_scratch.yaml", "student_mokd.yaml"]


@pytest.fixture
def photos(tmp_path):
    """A function that writes folders of classes, with two images of a size in each."""

    def write(name="train", side=40, classes=("cat", "dog")):
        for label in classes:
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (side, side + 9)).save(tmp_path / name / label / f"{number}.png")
        return name

    return write


@pytest.fixture
def create(run_init, photos, catalogs_restored):
    """From arguments beside student and data to what is printed, and the commands in it."""

    def run(*args, teacher="resnet18", student="shufflenet_v2_x0_5", data="train", **images):
        if data == "train":
            photos(data, **images)
        given = ["--teacher", teacher, "--student", student, "--data", data, "--output", "pets"]
        said = run_init(*given, *args)
        return said, [line.split()[1::2] for line in said.splitlines() if "  mokd " in line]

    return run


def read(tmp_path, name):
    """From another folder, checked as before training."""
    os.chdir("/")
    cfg = load_config(str(tmp_path / "pets" / name))
    prepare_datasets(cfg, validate(cfg))
    return cfg


def test_a_teacher_by_name_is_trained_on_the_data_first(create, photos, tmp_path):
    photos("val")
    said, commands = create("--val", "val")
    assert "4 images, 2 classes; 500 steps of 32 images" in said
    assert "Schedule: 20 epochs, but at least 500 steps" in said and "--no-download" in said
    assert commands == [
        ["doctor", "pets/teacher.yaml"],
        *(["train", f"pets/{name}"] for name in RUNS[:2]),
        *([what, "pets/student_mokd.yaml"] for what in ("doctor", "train")),
    ]
    teacher, scratch = (read(tmp_path, name) for name in RUNS[:2])
    for cfg, name in ((teacher, "resnet18"), (scratch, "shufflenet_v2_x0_5")):
        assert (cfg.MODEL.CLASSIFIER.NAME, cfg.MODEL.CLASSIFIER.WEIGHTS) == (name, "DEFAULT")
        assert cfg.MODEL.CLASSIFIER.NUM_CLASSES == 2 and not cfg.MOKD.ENABLED
        assert (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) == ("pets_train", "pets_val")
        assert cfg.SOLVER.MAX_ITER == 500 and cfg.MODEL.DEVICE == "cpu"
    with pytest.raises(FileNotFoundError, match="Train the teacher first"):
        read(tmp_path, RUNS[2])
    os.makedirs(teacher.OUTPUT_DIR)
    torch.save(build_network("resnet18", 2).state_dict(), f"{teacher.OUTPUT_DIR}/model_final.pth")
    cfg = read(tmp_path, RUNS[2])
    assert cfg.MOKD.ENABLED and cfg.MODEL.CLASSIFIER == scratch.MODEL.CLASSIFIER
    assert cfg.OUTPUT_DIR == str(tmp_path / "pets/runs/mokd")
    model = task_of(cfg).build_teacher(cfg)
    assert model.model.num_classes == 2 and model.image_size == 64 and not model.is_resized


def test_without_weights_that_are_downloaded(create, tmp_path, monkeypatch):
    """Nothing asks for any."""
    monkeypatch.setattr(get_model_weights("resnet18"), "get_state_dict", None)
    said, _ = create("--no-download", "--epochs", 3)
    assert "Schedule: 3 epochs; another" in said and "downloaded" not in said
    cfg = read(tmp_path, "teacher.yaml")
    assert cfg.MODEL.CLASSIFIER.WEIGHTS == "" and cfg.SOLVER.MAX_ITER == 1
    task_of(cfg).build_student(cfg)


@pytest.mark.parametrize(
    "side, name, size",
    [
        (28, "resnet18", 32),
        (64, "resnet18", 64),
        (70, "resnet18", 96),
        (300, "resnet18", 128),
        (28, "vit_b_16", 224),
        (28, "inception_v3", 75),
        (28, "vit_tiny_16", 224),
        (300, "timm.vit_tiny_patch16_224", 224),
        (300, "timm.resnet10t", 128),
    ],
)
def test_images_have_the_size_of_the_data_unless_a_network_needs_more(
    monkeypatch, side, name, size
):
    if "timm" in name:
        pytest.importorskip("timm")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(new_classifier, "has_layer_norm", lambda name, classes: False)
    kind = new_classifier.Classifiers()
    options = kind.options(kind.student(name), Data(["cat", "dog"], 4, side), 32)
    keys = [f"INPUT.CLASSIFICATION.{key}" for key in ("SIZE_TRAIN", "SIZE_TEST", "RESIZE_TEST")]
    is_small = side <= 64
    resized = size if is_small else round(size * 8 / 7)
    assert [options[key] for key in keys] == [size, size, resized]
    assert options["INPUT.CLASSIFICATION.CROP"] == ("padded" if is_small else "resized")


def test_weights_may_need_a_size_of_their_own():
    sizes = [network_facts("vit_h_14", "--student", x).least_size for x in (False, True)]
    assert sizes == [518, 224]


@pytest.mark.parametrize(
    "student, weights, solver",
    [
        ("resnet18", "DEFAULT", ("SGD", 0.005, 0.0001)),
        ("resnet18", "", ("SGD", 0.0125, 0.0001)),
        ("timm.vit_tiny_patch16_224", "DEFAULT", ("AdamW", 0.000071, 0.05)),
        ("vit_tiny_16", "", ("AdamW", 0.000177, 0.05)),
    ],
)
def test_solvers_and_rates(create, tmp_path, student, weights, solver):
    if "timm" in student:
        pytest.importorskip("timm")
    create(*([] if weights else ["--no-download"]), student=student)
    cfg = read(tmp_path, "student_scratch.yaml")
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY) == solver
    assert cfg.MODEL.CLASSIFIER.WEIGHTS == weights
    assert cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR"


def test_timms_networks_have_their_normalisation(create, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setattr(new_classifier, "has_layer_norm", lambda name, classes: False)
    create(teacher="timm.vit_tiny_patch16_224", student="timm.mobilenetv3_small_100")
    teacher, student = (read(tmp_path, name) for name in RUNS[:2])
    assert teacher.MODEL.PIXEL_MEAN == [127.5] * 3 and student.MODEL.PIXEL_MEAN[0] == 123.675
    assert teacher.MODEL.CLASSIFIER.WEIGHTS == student.MODEL.CLASSIFIER.WEIGHTS == "DEFAULT"


@pytest.fixture
def own_network():
    CLASSIFIERS.register("tiny_net")(lambda num_classes: torch.nn.Linear(3, num_classes))
    yield "tiny_net"
    CLASSIFIERS.remove("tiny_net")


def test_a_network_of_ones_own(create, own_network, tmp_path):
    create(student=own_network)
    cfg = read(tmp_path, "student_scratch.yaml")
    assert cfg.MODEL.CLASSIFIER.NAME == own_network and cfg.MODEL.CLASSIFIER.WEIGHTS == ""


SMALL = "shufflenet_v2_x0_5"


def checkpoint(path, classes, names=None):
    state = build_network(SMALL, classes).state_dict()
    torch.save({"model": state, "run": {"class_names": names}}, path)
    return path


def config(path, classes):
    base = ROOT / "configs/Base-Classifier.yaml"
    sizes = "INPUT: {CLASSIFICATION: {SIZE_TEST: 96}}\n"
    path.write_text(
        f"_BASE_: {base}\n{sizes}OUTPUT_DIR: {path.parent}\n"
        f"MODEL: {{CLASSIFIER: {{NAME: {SMALL}, NUM_CLASSES: {classes}}}}}\n"
    )
    return path


@pytest.mark.parametrize("by", ["config", "checkpoint", "name"])
def test_a_teacher_that_is_trained(create, tmp_path, by):
    weights = checkpoint(tmp_path / "model_final.pth", 2, ["cat", "dog"])
    file = config(tmp_path / "config.yaml", 2)
    args = {"config": file, "checkpoint": "model_final.pth", "name": SMALL}
    given = ["--teacher-weights", "model_final.pth"] if by == "name" else []
    _, commands = create(*given, teacher=args[by])
    assert commands == [
        ["doctor", "pets/student_mokd.yaml"],
        *(["train", f"pets/{name}"] for name in RUNS[1:]),
    ]
    cfg = read(tmp_path, "student_mokd.yaml")
    assert cfg.MOKD.TEACHER.WEIGHTS == str(weights)
    assert cfg.MOKD.TEACHER.CONFIG_FILE == ("" if by == "name" else str(file))
    assert cfg.MOKD.TEACHER.IMAGE_SIZE == (64 if by == "name" else 96)
    assert task_of(cfg).build_teacher(cfg).model.num_classes == 2


def test_of_imagenets_own_classes_the_teacher_is_ready_and_the_student_is_not():
    data = Data([f"n{number:08d}" for number in range(1000)], 1_281_167, 500)
    kind = new_classifier.Classifiers()
    assert kind.ready("resnet34", "", data) == (
        {"CLASSIFIER": "resnet34", "WEIGHTS": "DEFAULT"},
        new_classifier.MOST_PIXELS if torch.cuda.is_available() else new_classifier.MOST_ON_CPU,
    )
    options = kind.options(kind.student("resnet18"), data, 64)
    assert options["MODEL.CLASSIFIER.WEIGHTS"] == "" and kind.epochs(data) == 100
    others = data._replace(classes=[f"class{number}" for number in range(1000)])
    assert kind.ready("resnet34", "", others) is None and kind.epochs(others) == 20
    assert new_classifier.Classifiers(is_random=True).ready("resnet34", "", data) is None


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "args, changes, message",
    [
        ([], {"student": "resnet81"}, "--student is 'resnet81': .* Did you mean 'resnet18'"),
        ([], {"teacher": "resnet81"}, "no checkpoint .* did you mean resnet18 or "),
        ([], {"student": "timm.xyz"}, "--student is 'timm.xyz', which timm"),
        (
            [],
            {"student": "ssdlite"},
            "--student 'ssdlite' is a detector, but --data 'train' is for",
        ),
        ([], {"teacher": "r50-retinanet"}, "'r50-retinanet' is a detector, .* a JSON file in COCO"),
        (
            [],
            {"teacher": str(ROOT / "configs/Quick-Start/teacher.yaml")},
            "is no classifier's conf",
        ),
        ([], {"teacher": "no.pth"}, "--teacher 'no.pth' does not exist"),
        (
            [],
            {"teacher": "alone.pth"},
            "'alone.pth' is a checkpoint, but 'config.yaml' is not ther",
        ),
        (["--teacher-weights", "x.pth"], {"teacher": "alone.pth"}, "has weights itself"),
        (
            ["--teacher-weights", "no.pth"],
            {"teacher": SMALL},
            "--teacher-weights 'no.pth' does not exist",
        ),
        (
            ["--teacher-weights", "alone.pth"],
            {"teacher": SMALL},
            "--teacher knows 3 classes, but --data has 2: cat",
        ),
        (
            ["--teacher-weights", "named.pth"],
            {"teacher": SMALL},
            "knows the classes 2: dog, cat, but --data has 2",
        ),
        ([], {"teacher": "three.yaml"}, "--teacher knows 3 classes"),
        ([], {"data": "no"}, "--data 'no' does not exist"),
        ([], {"data": "empty"}, "--data 'empty': .* has no folders: expected one for each class"),
        ([], {"data": "splits"}, "--data 'splits': .* which are splits, no classes"),
        (["--val", "train/cat"], {}, "--val 'train/cat': .* has no folders"),
        (["--val", "train", "train"], {}, "--val 'train' 'train': a classifier takes one folder"),
        (["--val", *COCO], {}, "--val '.*json' is for a detector, but --data 'train' for a class"),
        (["--val", "other"], {}, "--val 'other' has the classes 1: pear, but --data 2: cat, dog"),
        (["--output", "splits"], {}, "--output 'splits' is there already"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_written(
    create, photos, tmp_path, args, changes, message
):
    if "timm" in changes.get("student", ""):
        pytest.importorskip("timm")
    (tmp_path / "empty").mkdir()
    for name in ("splits/train", "splits/val"):
        photos(name)
    photos("other", classes=["pear"])
    checkpoint(tmp_path / "alone.pth", 3)
    checkpoint(tmp_path / "named.pth", 2, ["dog", "cat"])
    config(tmp_path / "three.yaml", 3)
    (tmp_path / "model_final.pth").symlink_to("alone.pth")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        create(*args, **changes)
    assert not (tmp_path / "pets").exists()


def test_packed_images(create, tmp_path):
    create("--val", DIGITS / "val.npz", data=DIGITS / "train.npz")
    cfg = read(tmp_path, "student_scratch.yaml")
    assert cfg.INPUT.CLASSIFICATION.SIZE_TRAIN == 32 and cfg.MODEL.CLASSIFIER.NUM_CLASSES == 10


@pytest.mark.bad_input
def test_a_folder_of_photos_alone_is_no_data(create):
    with pytest.raises(ValueError, match="--data .* has no folders: expected one for each class"):
        create(data=TREES / "train")
