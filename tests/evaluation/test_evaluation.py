# Copyright (c) The mokd_det authors.
"""COCO evaluation by the compiled library, tables of results, and rows of a model zoo."""

import copy
import hashlib
import importlib
import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mokd_det.data import register_datasets
from mokd_det.data.paths import sha256_of
from mokd_det.engine import DistillationTrainer, build_trainer
from mokd_det.evaluation import build as evaluation_build
from mokd_det.evaluation import (
    build_evaluator,
    fast_coco,
    fast_coco_eval,
    format_comparison,
    format_zoo_row,
    headlines,
    write_results,
)


from ..conftest import TREES
from ..data.annotated import KEYPOINTS, annotate

# The package has a function of that name.
zoo_row_module = importlib.import_module("mokd_det.evaluation.zoo_row")


@pytest.fixture
def ground_truth(tmp_path):
    """The tiles, with a crowd region and a second class, so that nothing is trivial."""
    path = tmp_path / "train.json"
    annotate(TREES / "train.json", path, TREES / "train")
    coco = json.loads(path.read_text())
    coco["categories"].append({**coco["categories"][0], "id": 2, "name": "Bush"})
    for index, annotation in enumerate(coco["annotations"]):
        annotation["category_id"] = 1 + index % 3 // 2
        annotation["iscrowd"] = int(index % 17 == 16)
    path.write_text(json.dumps(coco))
    return COCO(str(path))


def detections(ground_truth):
    """Shifted ground truth, false alarms and scores with ties, in random order."""
    random = np.random.default_rng(0)
    found = []
    for annotation in ground_truth.dataset["annotations"]:
        for _ in range(random.integers(0, 3)):
            x, y, w, h = annotation["bbox"]
            dx, dy = random.normal(0, 0.2, 2) * (w, h)
            polygon = [v + (dx, dy)[i % 2] for i, v in enumerate(annotation["segmentation"][0])]
            points = [
                v if i % 3 == 2 else v + (dx, dy)[i % 3]
                for i, v in enumerate(annotation["keypoints"])
            ]
            found.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": int(random.integers(1, 3)),
                    "bbox": [x + dx, y + dy, w, h],
                    "segmentation": ground_truth.annToRLE(
                        {"image_id": annotation["image_id"], "segmentation": [polygon]}
                    ),
                    "keypoints": points,
                    "score": round(float(random.random()), 1),
                }
            )
    return found


@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
def test_the_compiled_evaluation_gives_pycocotools_numbers(ground_truth, task):
    assert fast_coco.COCOeval_faster is not None, "faster-coco-eval is not installed"
    found = detections(ground_truth)
    for d in found if task == "segm" else ():
        d.pop("bbox")
    results = []
    for make in (COCOeval, fast_coco_eval):
        # Each with its own: evaluation writes into the annotations.
        truth = copy.deepcopy(ground_truth)
        evaluation = make(truth, truth.loadRes(copy.deepcopy(found)), task)
        if task == "keypoints":
            evaluation.params.kpt_oks_sigmas = np.full(len(KEYPOINTS), 0.1)
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
        results.append(evaluation)
    slow, fast = results
    assert type(fast) is fast_coco.COCOeval_faster
    assert 0.03 < slow.stats[0] < 0.95
    # numpy's and C++'s sums differ in the last bits.
    assert np.allclose(slow.stats, np.asarray(fast.stats)[: len(slow.stats)], atol=1e-9)
    assert np.allclose(slow.eval["precision"], fast.eval["precision"], atol=1e-9)
    assert np.allclose(slow.eval["recall"], fast.eval["recall"], atol=1e-9)


def test_without_the_library_pycocotools_evaluates(ground_truth, monkeypatch):
    monkeypatch.setattr(fast_coco, "COCOeval_faster", None)
    evaluation = fast_coco_eval(ground_truth, ground_truth, "bbox")
    assert type(evaluation) is COCOeval


def test_evaluators_by_type(make_cfg):
    cfg = make_cfg("faster_rcnn")
    register_datasets(cfg)
    assert type(build_evaluator(cfg, "tests_trees_val")) is COCOEvaluator
    MetadataCatalog.get("tests_unknown_type").evaluator_type = "depth"
    with pytest.raises(ValueError, match="'depth'; expected one of 'classification', 'coco', 'co"):
        build_evaluator(cfg, "tests_unknown_type")


@pytest.mark.parametrize("enabled", [True, False])
def test_a_set_without_an_evaluator_is_an_error_before_training(make_cfg, enabled):
    cfg = make_cfg("mokd", ["MOKD.ENABLED", enabled])
    register_datasets(cfg)
    name = "tests_no_evaluator"
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, lambda: [])
    cfg.DATASETS.TEST = (name,)
    with pytest.raises(ValueError, match=f"'{name}' has the evaluator type 'None'"):
        build_trainer(cfg)


def test_ones_own_evaluators_are_not_asked_for_a_type(make_cfg):
    class Own(DistillationTrainer):
        build_evaluator = staticmethod(lambda cfg, name: None)

    cfg, name = make_cfg("mokd"), "tests_own_evaluator"
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, lambda: [])
        MetadataCatalog.get(name).evaluator_type = "depth"
    cfg.DATASETS.TEST = (name,)
    Own(cfg)
    with pytest.raises(ValueError, match="has the evaluator type 'depth'"):
        DistillationTrainer(cfg)


def test_panoptic_sets_are_evaluated_in_every_task(make_cfg, monkeypatch):
    """As in Detectron2's train_net; its own evaluators are only counted here."""
    cfg, built = make_cfg("faster_rcnn"), []
    for name in ("COCOEvaluator", "SemSegEvaluator", "COCOPanopticEvaluator"):
        monkeypatch.setattr(
            evaluation_build, name, lambda *a, name=name, **k: built.append((name, a[0])) or name
        )
    name = "coco_2017_val_panoptic_separated"
    assert isinstance(build_evaluator(cfg, name), DatasetEvaluators)
    wanted = ("COCOEvaluator", "SemSegEvaluator", "COCOPanopticEvaluator")
    assert built == [(evaluator, name) for evaluator in wanted]


BOX = {"AP": 12.345, "AP50": 30.0, "AP75": float("nan"), "APs": 1.0, "APm": 2.0, "APl": 3.0}


def test_comparison_of_models():
    one = format_comparison({"teacher": {"bbox": BOX}, "student": {"bbox": {**BOX, "AP": 9.0}}})
    lines = one.splitlines()
    assert len(lines) == 4
    assert lines[0] == "| task | model | AP | AP50 | AP75 | APs | APm | APl |"
    assert lines[2] == "| bbox | teacher | 12.35 | 30.00 | nan | 1.00 | 2.00 | 3.00 |"
    assert "| student | 9.00 |" in lines[3]
    several = {"val": {"bbox": BOX}, "test": {"bbox": BOX, "segm": BOX}}
    lines = format_comparison({"teacher": several, "student": several}).splitlines()
    assert len(lines) == 8 and lines[0].startswith("| data set | task | model | AP |")
    assert [line.split("|")[1:4] for line in lines[2:4]] == [
        [" test ", " bbox ", " teacher "],
        [" test ", " bbox ", " student "],
    ]


def test_headlines():
    several = {"val": {"bbox": BOX}, "test": {"classification": {"top1": 9.0, "images": 5}}}
    assert headlines(several) == [
        "val bbox, in percent: AP 12.3, AP50 30.0, AP75 nan, APs 1.0, APm 2.0, APl 3.0",
        "test classification, in percent: top1 9.0",
    ]
    assert headlines({"bbox": {"AP": 1.0, "AP-cat": 2.0}}) == ["bbox, in percent: AP 1.0"]
    assert not headlines({})


def test_results_without_a_value_become_null(tmp_path):
    path = write_results({"bbox": BOX}, str(tmp_path))
    with open(path) as f:
        assert json.load(f)["bbox"]["AP75"] is None


def test_time_and_memory_come_from_detectron2s_logs(tmp_path):
    """The line is that of its CommonMetricPrinter on a GPU."""
    assert zoo_row_module._training_log(str(tmp_path)) == {"time": None, "max_mem": None}
    entries = [{"iteration": i, "time": t} for i, t in ((19, 0.5), (39, 0.2), (59, 0.3))]
    text = "\n".join(json.dumps(e) for e in [*entries, {"bbox/AP": 1.0}])
    (tmp_path / "metrics.json").write_text(text + "\n")
    line = "d2.utils.events INFO:  eta: 0:01  iter: 19  time: 0.2  lr: 0.02  max_mem: 3071M\n"
    (tmp_path / "log.txt").write_text(line + line.replace("3071", "2971"))
    assert zoo_row_module._training_log(str(tmp_path)) == {"time": 0.3, "max_mem": 3071}


def test_checksum_of_weights_with_an_address(tmp_path, monkeypatch):
    (tmp_path / "w.pkl").write_bytes(b"weights")
    local = lambda path: str(tmp_path / "w.pkl")  # noqa: E731
    monkeypatch.setattr(PathManager, "get_local_path", local)
    wanted = hashlib.sha256(b"weights").hexdigest()
    assert sha256_of("detectron2://COCO-Detection/w.pkl") == wanted


def test_zoo_row_has_what_is_known():
    row = {
        "name": "a",
        "schedule": "90000 x 16 images",
        "train_seconds_per_iteration": None,
        "train_memory_gb": 3.04,
        "inference_seconds_per_image": 0.0456,
        "parameters": 41_500_000,
        "gflops": 134.4,
        "accuracy": {"box AP": 38.04, "mask AP": 35.2},
        "config": "configs/a.yaml",
        "weights": "a.pth",
        "sha256": "0",
    }
    head, _, line = format_zoo_row(row).splitlines()
    assert head.startswith("| Name | schedule | train s/iter | inference s/im | train mem (GB) |")
    assert line == (
        "| [a](configs/a.yaml) | 90000 x 16 images |  | 0.046 | 3.0 | 41.50 | 134.4 | 38.0 | 35.2 "
        "| a.pth |"
    )
