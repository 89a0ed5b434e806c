# Copyright (c) The mokd_det authors.
"""Accuracy of classifiers."""

import json

import pytest
import torch

from mokd_det.config import load_config
from mokd_det.data import register_datasets
from mokd_det.data.classification import Batch
from mokd_det.evaluation import ClassificationEvaluator, build_evaluator

from ..conftest import DIGIT_OPTS


@pytest.fixture(autouse=True)
def registered():
    cfg = load_config("configs/Digits/teacher.yaml", DIGIT_OPTS)
    register_datasets(cfg)


def run(evaluator, count=40):
    logits = torch.randn(count, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 10
    evaluator.reset()
    for part in (slice(0, 16), slice(16, count)):
        names = [f"x#{i}" for i in range(count)][part]
        images = torch.zeros(len(names), 3, 1, 1)
        evaluator.process(Batch(images, labels[part], names), logits[part])
    return logits, labels, evaluator.evaluate()["classification"]


def test_top1_and_top5():
    logits, labels, results = run(ClassificationEvaluator("tests_digits_val"))
    order = logits.argsort(dim=1, descending=True)
    assert results["top1"] == pytest.approx(100 * (order[:, 0] == labels).float().mean().item())
    assert results["top5"] == pytest.approx(
        100 * (order[:, :5] == labels[:, None]).any(1).float().mean().item()
    )
    assert results["images"] == 40 and results["skipped"] == 0


def test_images_that_could_not_be_read_do_not_count(caplog):
    _, _, results = run(ClassificationEvaluator("tests_digits_val"), 36)
    assert results["images"] == 36 and results["skipped"] == 4
    assert "4 images of 'tests_digits_val' could not be read" in caplog.text


def test_every_class_on_request():
    logits, labels, results = run(ClassificationEvaluator("tests_digits_val", per_class=True))
    right = logits.argmax(1) == labels
    for digit in range(10):
        expected = 100 * right[labels == digit].float().mean().item()
        assert results[f"top1-{digit}"] == pytest.approx(expected)


def test_predictions_are_kept(tmp_path):
    cfg = load_config("configs/Digits/teacher.yaml", [*DIGIT_OPTS, "OUTPUT_DIR", str(tmp_path)])
    logits, labels, _ = run(build_evaluator(cfg, "tests_digits_val"))
    path = tmp_path / "inference" / "tests_digits_val" / "predictions.json"
    predictions = json.loads(path.read_text())
    assert [p["name"] for p in predictions] == [f"x#{i}" for i in range(40)]
    assert [p["label"] for p in predictions] == labels.tolist()
    assert [p["classes"][0] for p in predictions] == logits.argmax(1).tolist()
    assert predictions[0]["scores"][0] == pytest.approx(logits[0].softmax(0).max().item())


def test_logits_that_are_close_are_no_ties():
    evaluator = ClassificationEvaluator("tests_digits_val")
    logits = (1 + 1e-7 * torch.arange(10.0))[None]  # equal after a softmax
    evaluator.process(Batch(torch.zeros(1, 3, 1, 1), torch.tensor([9]), ["x"]), logits)
    assert evaluator.evaluate()["classification"]["top1"] == 100


@pytest.mark.parametrize("said, warned", [([3, 3], True), ([3, 4], False)])
def test_one_class_for_every_image_is_warned_of(caplog, said, warned):
    evaluator = ClassificationEvaluator("tests_digits_val")
    logits = torch.nn.functional.one_hot(torch.tensor(said), 10).float()
    evaluator.process(Batch(torch.zeros(2, 3, 1, 1), torch.tensor([3, 4]), ["x", "y"]), logits)
    evaluator.evaluate()
    assert ("Every image of 'tests_digits_val' got the same class" in caplog.text) == warned


def test_no_image_at_all():
    evaluator = ClassificationEvaluator("tests_digits_val")
    with pytest.raises(ValueError, match="'tests_digits_val' has no image that could be"):
        evaluator.evaluate()
