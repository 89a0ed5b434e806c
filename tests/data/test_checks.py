# Copyright (c) The mokd_det authors.
"""Data sets of a config, at the door of training and evaluation."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mokd_det.config import load_config
from mokd_det.data import register_datasets, trained_class_names
from mokd_det.engine import build_trainer, prepare_datasets
from mokd_det.evaluation.fast_coco import fast_coco_eval
from mokd_det.export.detector_exporter import class_names_of_set as detector_classes
from mokd_det.export.metadata import class_names_of
from mokd_det.tasks import task_of

from ..conftest import TREES
from .test_coco import DROP, GOOD, SUPER, changed, everywhere


@pytest.fixture
def sets(tmp_path, request):
    """From files by split to a config of a RetinaNet for two classes, and its way to be checked."""
    names = {split: f"{request.node.name}_{split}" for split in ("train", "test")}
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / name)

    def make(train=GOOD, test=GOOD, opts=()):
        for split, data in (("train", train), ("test", test)):
            (tmp_path / f"{split}.json").write_text(json.dumps(data))
        entries = [[names[s], str(tmp_path / f"{s}.json"), str(tmp_path)] for s in names]
        options = ["DATASETS.COCO", entries, "DATASETS.TRAIN", (names["train"],), *opts]
        options += ["DATASETS.TEST", (names["test"],), "OUTPUT_DIR", str(tmp_path / "out")]
        options += ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 2]
        return load_config("", [*options, *opts])

    yield make
    for name in names.values():
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def check(cfg, is_training=True):
    prepare_datasets(cfg, task_of(cfg), is_training)


def renamed(*names, ids=None):
    ids = ids or range(1, len(names) + 1)
    return changed(("categories",), [{"id": i, "name": n} for i, n in zip(ids, names)])


def test_good_sets_are_left_alone(sets, tmp_path):
    cfg = sets()
    check(cfg)
    assert MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).json_file == str(tmp_path / "train.json")
    assert not (tmp_path / "out").exists()


def test_completed_sets_are_what_loader_and_evaluator_read(sets, tmp_path, caplog):
    incomplete = everywhere("annotations", "area", [DROP] * 4)
    cfg = sets(incomplete, incomplete)
    check(cfg)
    check(cfg)  # a second time, and in a second run of the process
    register_datasets(cfg)
    for split, name in (("train", cfg.DATASETS.TRAIN[0]), ("test", cfg.DATASETS.TEST[0])):
        path = tmp_path / "out" / "datasets" / f"{name}.json"
        assert MetadataCatalog.get(name).json_file == str(path)
        assert f"{split}.json): annotations without an area" in caplog.text
        assert [row["area"] for row in json.loads(path.read_text())["annotations"]] == [48.0] * 4
        assert [len(image["annotations"]) for image in DatasetCatalog.get(name)] == [2, 2]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("train", "test", "opts", "message"),
    [
        (renamed("apple", "pear", "plum"), GOOD, (), "NUM_CLASSES is 2, .* has 3: .*set it to 3"),
        (GOOD, GOOD, ("MODEL.RETINANET.NUM_CLASSES", 80), "NUM_CLASSES is 80.*set it to 2"),
        (GOOD, GOOD, ("MODEL.RETINANET.NUM_CLASSES", 1), "NUM_CLASSES is 1.*set it to 2"),
        (
            GOOD,
            GOOD,
            ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
            "MODEL.ROI_HEADS.NUM_CLASSES is 80.*set it to 2",
        ),
        (GOOD, renamed("apple", "plum"), (), "TEST: .*apple, plum.* model has .*apple, pear"),
        (GOOD, renamed("apple", "pear", "plum"), (), "TEST: .*apple, pear, plum"),
        (changed(("annotations", 0, "bbox"), None), GOOD, (), "TRAIN: .*train.json.*not four"),
        (GOOD, changed(("annotations", 0, "bbox"), None), (), "TEST: .*test.json.*not four"),
        (GOOD, GOOD, ("INPUT.MAX_SIZE_TRAIN", 0), "TRAIN: .*less than a pixel.*2: a.png, 40 x 30"),
        (GOOD, GOOD, ("INPUT.MAX_SIZE_TEST", 0), "TEST: .*less than a pixel.*2: a.png, 40 x 30"),
    ],
)
def test_sets_that_do_not_suit_the_model(train, test, opts, message, sets):
    with pytest.raises(ValueError, match=message):
        check(sets(train, test, opts))


@pytest.mark.bad_input
def test_a_set_in_another_order_gets_the_models(sets, caplog):
    other = renamed("pear", "apple")
    for row in other["annotations"]:
        row["category_id"] = 3 - row["category_id"]
    cfg = sets(GOOD, other)
    check(cfg)
    assert "classes are 2: pear, apple, which get the numbers of the model's" in caplog.text
    labels = [
        [row["category_id"] for row in image["annotations"]]
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
        for image in DatasetCatalog.get(name)
    ]
    assert labels[:2] == labels[2:]


@pytest.mark.bad_input
def test_evaluation_alone_keeps_the_order_of_training(sets):
    cfg = sets(renamed("pear", "apple"), GOOD)
    check(cfg, is_training=False)
    assert MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes == ["pear", "apple"]


def weights_of(folder, *names):
    path = folder / "model_final.pth"
    torch.save({"model": {"a": torch.ones(1)}, "run": {"class_names": list(names)}}, path)
    return str(path)


@pytest.mark.bad_input
def test_weights_say_the_order_of_their_classes(sets, tmp_path, caplog):
    """A checkpoint that is evaluated or trained further keeps its classes' numbers."""
    for is_training in (False, True):
        cfg = sets()
        cfg.MODEL.WEIGHTS = weights_of(tmp_path, "pear", "apple")
        check(cfg, is_training)
        assert MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes == ["pear", "apple"]
    assert trained_class_names(cfg.MODEL.WEIGHTS) == ["pear", "apple"]
    assert MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes == ["pear", "apple"]


@pytest.mark.bad_input
def test_weights_of_other_classes(sets, tmp_path):
    cfg = sets()
    cfg.MODEL.WEIGHTS = weights_of(tmp_path, "cat", "dog")
    check(cfg)  # to start from
    with pytest.raises(ValueError, match="apple, pear, but the model has 2: cat, dog"):
        check(cfg, is_training=False)
    cfg.MODEL.WEIGHTS = weights_of(tmp_path, "cat\n", "dog")
    with pytest.raises(ValueError, match="a class named 'cat"):
        check(cfg)


def test_weights_without_names(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"x")
    torch.save([1], tmp_path / "b.pth")
    torch.save({"model": {}, "run": 3}, tmp_path / "c.pth")
    for name in ("", "a.pth", "b.pth", "c.pth", "none.pth", "detectron2://x.pkl"):
        assert trained_class_names(str(tmp_path / name) if name else "") is None


@pytest.mark.bad_input
def test_names_of_what_is_no_checkpoint(tmp_path):
    """The message says what the file is, as that of loading it does."""
    path = str(tmp_path / "model.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    for options in ((), ("MOKD.TEACHER.WEIGHTS",)):
        name = f"{options[0] if options else 'MODEL.WEIGHTS'} '{path}'"
        with pytest.raises(ValueError, match=f"{name} is a TorchScript archive, which is a prog"):
            trained_class_names(path, *options)


@pytest.mark.bad_input
def test_a_set_without_some_class(sets):
    cfg = sets(GOOD, with_rows_of_apples_only())
    check(cfg)
    assert MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes == ["apple", "pear"]


def with_rows_of_apples_only():
    data = renamed("apple")
    data["annotations"] = data["annotations"][:2]
    return data


@pytest.mark.bad_input
def test_the_parent_of_all_classes_is_none(sets):
    cfg = sets(changed(("categories",), SUPER), changed(("categories",), SUPER))
    check(cfg)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert MetadataCatalog.get(name).thing_classes == ["apple", "pear"]


FLAT = changed(("annotations", 0, "bbox"), [4, 5, 8, 0])  # as two boxes of COCO's train2017


@pytest.mark.bad_input
def test_sets_that_detectron2_registered_are_completed(sets, tmp_path, caplog):
    """As coco_2017_train, with a box without height and the metadata of Detectron2's own sets."""
    cfg = sets(FLAT, FLAT)
    like_coco = {
        "thing_dataset_id_to_contiguous_id": {1: 0, 2: 1},
        "thing_classes": ["apple", "pear"],
        "keypoint_names": ["stalk"],
    }
    for name, path, root in cfg.DATASETS.COCO:
        register_coco_instances(name, like_coco, path, root)
    cfg.DATASETS.COCO = []
    check(cfg)
    assert "boxes without width or height, which are left out" in caplog.text
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        metadata = MetadataCatalog.get(name)
        assert [len(image["annotations"]) for image in DatasetCatalog.get(name)] == [2, 1]
        with open(metadata.json_file) as file:
            assert len(json.load(file)["annotations"]) == 3
        assert metadata.keypoint_names == ["stalk"]
        assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 2: 1}
    other_run = cfg.clone()
    other_run.MODEL.MASK_ON = True
    check(other_run)


@pytest.mark.bad_input
@pytest.mark.parametrize("named", [False, True])
def test_sets_of_ones_own_code_are_not_rewritten(sets, tmp_path, named):
    cfg = sets(FLAT)
    name, path, root = cfg.DATASETS.COCO[0]
    DatasetCatalog.register(name, lambda: load_coco_json(path, root, name))
    MetadataCatalog.get(name).set(json_file=path, image_root=root, evaluator_type="coco")
    if not named:
        cfg.DATASETS.COCO = cfg.DATASETS.COCO[1:]
    with pytest.raises(ValueError, match="completed: boxes without .* function of yours.*--write"):
        check(cfg)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_set_like_cocos_trains_and_evaluates(make_cfg, tmp_path):
    for split in ("train", "val"):
        data = json.loads((TREES / f"{split}.json").read_text())
        row = data["annotations"][0]
        data["annotations"].append({**row, "id": 10**6, "bbox": [*row["bbox"][:3], 0]})
        path = tmp_path / f"{split}.json"
        path.write_text(json.dumps(data))
        register_coco_instances(f"like_coco_{split}", {}, str(path), str(TREES / split))
    opts = ["DATASETS.TRAIN", ("like_coco_train",), "DATASETS.TEST", ("like_coco_val",)]
    trainer = build_trainer(make_cfg("retinanet", ["DATASETS.COCO", [], *opts]))
    trainer.resume_or_load(False)
    trainer.train()
    assert "AP50" in trainer._last_eval_results["bbox"]


INCOMPLETE = {
    "no area": everywhere("annotations", "area", [DROP] * 4),
    "area of text": everywhere("annotations", "area", ["48"] * 4),
    "ids from 0": everywhere("annotations", "id", [0, 1, 2, 3]),
    "no ids": everywhere("annotations", "id", [DROP] * 4),
    "crowds null": everywhere("annotations", "iscrowd", [None] * 4),
    "image ids of 64 bit": everywhere("images", "id", [2**40 + 1, 2**40 + 2]),
    "category ids of text": everywhere("categories", "id", ["1", "2"]),
}
for _row in INCOMPLETE["image ids of 64 bit"]["annotations"]:
    _row["image_id"] += 2**40


@pytest.mark.bad_input
@pytest.mark.parametrize("name", INCOMPLETE)
def test_all_evaluators_agree_on_a_completed_file(name, sets):
    """AP of all sizes by Detectron2's evaluator (fast), pycocotools, and of the whole file."""
    cfg = sets(test=INCOMPLETE[name])
    check(cfg)
    evaluator = COCOEvaluator(cfg.DATASETS.TEST[0], tasks=("bbox",), use_fast_impl=True)
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    expected = evaluate(copy.deepcopy(GOOD), [1, 2], COCOeval)
    with open(metadata.json_file) as file:
        content = json.load(file)
    ids = [image["id"] for image in content["images"]]
    for evaluate_with in (COCOeval, fast_coco_eval):
        np.testing.assert_allclose(evaluate(content, ids, evaluate_with), expected)
    DatasetCatalog.get(cfg.DATASETS.TEST[0])  # as every loader does, whereby classes get numbers
    evaluator.reset()
    for image_id in ids:
        instances = Instances((30, 40))
        instances.pred_boxes = Boxes(np.array([[4.0, 5, 12, 10]] * 2))
        instances.scores, instances.pred_classes = np.array([0.9, 0.8]), np.array([0, 1])
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    results = evaluator.evaluate()["bbox"]
    found = [results[key] / 100 for key in ("AP", "AP50", "AP75", "APs")]
    np.testing.assert_allclose(found, expected[:4])


def evaluate(content, ids, evaluate_with):
    """COCO's first four numbers of two detections in each image."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        found = truth.loadRes(
            [
                {"image_id": i, "category_id": c, "bbox": [4, 5, 8, 5], "score": 1 - c / 10}
                for i in ids
                for c in (1, 2)
            ]
        )
        evaluation = evaluate_with(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:4]


@pytest.mark.bad_input
def test_an_export_has_the_classes_of_training(sets):
    cfg = sets(renamed("apple", "pear"), renamed("pear", "apple"))
    register_datasets(cfg)
    assert class_names_of(cfg, 2, detector_classes) == ["apple", "pear"]
    cfg.DATASETS.TRAIN = ()
    assert class_names_of(cfg, 2, detector_classes) == ["pear", "apple"]
    assert class_names_of(cfg, 3, detector_classes) is None
