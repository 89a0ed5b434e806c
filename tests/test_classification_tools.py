# Copyright (c) The mokd_det authors.
"""The command line for classifiers."""

import json
import statistics
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from mokd_det.config import load_config
from mokd_det.data import check_classes, register_datasets
from mokd_det.engine import Trainer
from mokd_det.tasks import task_of
from mokd_det.teachers import ClassifierTeacher

from .conftest import DIGIT_OPTS, ROOT, TREES
from .test_tools import load_script, run_here

STUDENT = "configs/Digits/student_mokd.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_teacher_weights):
    output = tmp_path_factory.mktemp("cli")
    opts = [*DIGIT_OPTS, "MOKD.TEACHER.WEIGHTS", digits_teacher_weights, "OUTPUT_DIR", output]
    printed = run_here("tools/train_net.py", "--config-file", STUDENT, "--zoo-row", *opts)
    return output, opts, printed


def test_train_net_trains_evaluates_and_prints_the_zoo_row(trained):
    output, _, stdout = trained
    results = json.loads((output / "results.json").read_text())["classification"]
    assert set(results) == {"top1", "top5", "images", "skipped"} and results["images"] == 40
    assert (
        len(json.loads((output / "inference/tests_digits_val/predictions.json").read_text())) == 40
    )
    row = json.loads((output / "zoo_row.json").read_text())
    assert row["parameters"] == 352_042 and row["accuracy"] == {"top-1": results["top1"]}
    assert row["schedule"] == "3 x 8 images" and 0 < row["gflops"] < 0.01
    assert f"| [student_mokd]({STUDENT}) | 3 x 8 images |" in stdout
    # What mokd_det logs itself is in the log, too.
    said = "  objectives features (pre_logits -> pre_logits), logits\n"
    assert said in (output / "log.txt").read_text() and said in stdout
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=10)
    network.load_state_dict(torch.load(output / "model_final.pth", weights_only=True)["model"])
    kept = load_config(str(output / "student.yaml"))
    kept.MODEL.WEIGHTS = str(output / "model_final.pth")
    assert task_of(kept).load_trained(kept).num_classes == 10


def test_evaluation_beside_the_teacher_and_of_every_class(trained, tmp_path):
    output, opts, _ = trained
    opts = [*opts[:-1], tmp_path, "MODEL.WEIGHTS", output / "model_final.pth"]
    args = ["--config-file", STUDENT, "--eval-only", "--with-teacher", *opts]
    printed = run_here("tools/train_net.py", *args, "TEST.PER_CLASS", "True")
    lines = printed.splitlines()
    table = lines.index("| task | model | top1 | top5 |")
    assert lines[table + 2].startswith("| classification | teacher |")
    first, second = (
        json.loads((folder / "results.json").read_text())["classification"]
        for folder in (output, tmp_path)
    )
    assert first.items() <= second.items()
    assert sum(second[f"top1-{i}"] for i in range(10)) == pytest.approx(10 * second["top1"])
    assert "Top-1 of every class of 'tests_digits_val':" in printed


def test_stock_weights_on_imagenets_layout_as_plain_torchvision(tmp_path, monkeypatch):
    """Image by image, with a thousand classes of which a few have images."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    root = tmp_path / "imagenet" / "val"
    for label in range(1000):
        (root / f"n{label:08d}").mkdir(parents=True)
    files = []
    for label, file in zip(range(7, 1000, 150), sorted(TREES.rglob("*.jpg"))):
        image = Image.open(file)
        for i, size in enumerate([(300, 260), (256, 256)]):
            files.append(root / f"n{label:08d}" / f"ILSVRC2012_val_{i}.JPEG")
            image.resize(size).save(files[-1])
    torch.manual_seed(0)
    stock = torchvision.models.mobilenet_v3_small().eval()
    torch.save(stock.state_dict(), tmp_path / "w.pth")

    opts = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(tmp_path)]
    opts += ["MODEL.CLASSIFIER.WEIGHTS", str(tmp_path / "w.pth")]
    cfg = load_config("configs/ImageNet-Classification/mobilenet_v3_small.yaml", opts)
    register_datasets(cfg)
    check_classes(cfg, ("TEST",))  # without a training set
    results = Trainer.test(cfg, task_of(cfg).load_trained(cfg))
    found = json.loads((tmp_path / "inference/imagenet_val/predictions.json").read_text())

    preset = torchvision.models.MobileNet_V3_Small_Weights.IMAGENET1K_V1.transforms()
    folder = torchvision.datasets.ImageFolder(str(root), allow_empty=True)
    right = []
    assert [str(root / p["name"]) for p in found] == [path for path, _ in folder.samples]
    for (image, label), prediction in zip(folder, found):
        with torch.no_grad():
            logits = stock(preset(image)[None])
        assert prediction["label"] == label
        assert prediction["classes"] == logits.topk(5).indices[0].tolist()
        right.append(prediction["classes"][0] == label)
    assert results["classification"]["top1"] == 100 * statistics.mean(right)
    assert results["classification"]["images"] == len(files)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    return load_script("tools/benchmark_classification.py")


def test_benchmark(make_digits_cfg, benchmark):
    # No weights are needed.
    cfg = make_digits_cfg(["MOKD.FEATURES.DIM", 32, "MOKD.TEACHER.WEIGHTS", "gone/model.pth"])
    result = benchmark.compare_steps(cfg, size=32, count=4, rounds=2)
    assert set(result) == {"student", "fixed", "balanced", "all", "torchdistill"}
    theirs = result.pop("torchdistill")
    assert "not installed" in theirs["error"] if "error" in theirs else theirs["seconds"] > 0
    for entry in result.values():
        assert entry["images_per_second"] == pytest.approx(4 / entry["seconds"])


def test_benchmark_of_a_teacher_at_its_own_size(make_digits_cfg, benchmark, monkeypatch):
    cfg = make_digits_cfg(["MOKD.TEACHER.CONFIG_FILE", "", "MOKD.TEACHER.CLASSIFIER", "resnet18"])
    cfg.merge_from_list(["MOKD.TEACHER.WEIGHTS", "IMAGENET1K_V1", "MOKD.TEACHER.IMAGE_SIZE", 48])
    sizes = []
    run = ClassifierTeacher.run

    def run_at(teacher, *args):
        assert teacher.is_resized
        sizes.append(teacher.image_size)
        return run(teacher, *args)

    monkeypatch.setattr(ClassifierTeacher, "run", run_at)
    result = benchmark.compare_steps(cfg, size=32, count=2, rounds=2)
    assert set(sizes) == {48}
    assert "MOKD.TEACHER.IMAGE_SIZE is 48" in result["torchdistill"]["error"]


def test_benchmark_of_the_loader(make_digits_cfg, benchmark):
    cfg = make_digits_cfg(["DATALOADER.NUM_WORKERS", 1])
    found = benchmark.measure_loader(cfg, rounds=2)
    assert found["images_per_second"] > 0 and found["workers"] == 1


def test_benchmark_needs_a_distilled_classifier(benchmark, capsys):
    args = benchmark.argument_parser().parse_args(["--config-file", "configs/Digits/teacher.yaml"])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(args)
    assert "with MOKD.ENABLED True" in capsys.readouterr().err


def test_mnist_and_fashion_mnist_are_prepared(tmp_path):
    import gzip

    tool = load_script("datasets/prepare_fashion_mnist.py")
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        tool.prepare(tmp_path, tmp_path / "out")
    for part, count in (("train", 5004), ("t10k", 6)):
        pixels = (np.arange(count * 16) % 251).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        head = b"\x00\x00\x08\x03" + np.array([count, 4, 4], ">i4").tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(head + pixels.tobytes())
        )
        head = b"\x00\x00\x08\x01" + np.array([count], ">i4").tobytes()
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(head + labels.tobytes())
        )
    assert tool.prepare(tmp_path, tmp_path / "out", subset=3) == {
        "train": 4, "val": 5000, "test": 6, "train_3": 3
    }  # fmt: skip
    arrays = np.load(tmp_path / "out" / "val.npz")
    assert arrays["labels"][0] == 4 and arrays["images"][0, 0, 0] == 64
    with pytest.raises(ValueError, match="--subset is 9: expected 0"):
        tool.prepare(tmp_path, tmp_path / "out", subset=9)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ValueError, match="MNIST.s format: it does not hold unsigned bytes"):
        tool.prepare(tmp_path, tmp_path / "out")

    mnist = load_script("datasets/prepare_mnist.py")
    assert sum(mnist.SPLITS.values()) == 500
