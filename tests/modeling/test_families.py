# Copyright (c) The mokd_det authors.
"""Every family of Detectron2's detectors as student, trained as a whole, and as teacher."""

from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from mokd_det.config import load_config
from mokd_det.data import register_datasets
from mokd_det.engine import DistillationTrainer, build_trainer
from mokd_det.tasks import task_of

from ..conftest import CONFIGS, OUTPUTS, TREE_OPTS, TREES
from .families import FCOS, LAZY, batch_of, families, saved_teacher, step

# C4 and DC5 share no name with the teacher's p3-p6, but the stride 16. RetinaNet's p7 has no
# partner.
LEVELS = {"faster_rcnn_C4": {"res4": "p4"}, "faster_rcnn_DC5": {"res5": "p4"}}
SAME_NAMES = {name: name for name in ("p3", "p4", "p5", "p6")}


@pytest.mark.parametrize("family", families())
def test_students(family_cfg, family):
    """Forward, balanced step on features and outputs, and the stock model at evaluation."""
    cfg = family_cfg(family, ["MOKD.ENABLED", True, *OUTPUTS])
    model = DistillationTrainer.build_model(cfg)
    levels = {level.student: level.teacher for level in model.objectives["features"].levels}
    assert levels == LEVELS.get(family, SAME_NAMES)
    batch = batch_of(cfg)
    stock = build_model(cfg)
    assert type(model.student) is type(stock)
    stock.load_state_dict(model.student.state_dict())
    torch.manual_seed(1)  # boxes are sampled
    losses, decision = step(model, batch)
    assert list(losses) == model.names == ["task", "features", "outputs"]
    assert decision.fallback == "" and (decision.gram.diagonal() > 0).all()
    for parts in losses.values():
        assert parts and all(loss.isfinite() for loss in parts.values())
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    # Nothing of the second run of the heads stays: the same buffers as after the stock's step.
    stock.train()
    torch.manual_seed(1)
    with EventStorage(0):
        stock(batch)
    for (key, ours), (_, theirs) in zip(model.student.named_buffers(), stock.named_buffers()):
        assert torch.equal(ours, theirs), key
    model.eval(), stock.eval()
    with torch.no_grad():
        ours, theirs = model(batch), stock(batch)
    assert torch.equal(ours[0]["instances"].scores, theirs[0]["instances"].scores)


@pytest.mark.parametrize("family", families(quick=["retinanet"]))
def test_teachers_of_the_other_kind(family_cfg, family, tmp_path):
    """R-CNNs teach a RetinaNet, RetinaNets a Faster R-CNN: features and outputs."""
    teacher_cfg = family_cfg(family)
    seed_all_rng(3)
    opts = saved_teacher(teacher_cfg, build_model(teacher_cfg), tmp_path)
    student = "faster_rcnn" if "retinanet" in family else "retinanet"
    cfg = family_cfg(student, [*opts, *OUTPUTS])
    model, batch = DistillationTrainer.build_model(cfg), batch_of(cfg)
    losses, decision = step(model, batch)
    assert all(loss.isfinite() for parts in losses.values() for loss in parts.values())
    assert decision.fallback == "" and (decision.gram.diagonal() > 0).all()
    proposals = model.teacher.run(batch, "BGR").proposals
    assert all(0 < len(boxes) <= cfg.MOKD.TEACHER.PROPOSALS for boxes in proposals)
    assert not any(boxes.requires_grad for boxes in proposals)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mask_rcnn", "keypoint_rcnn", "cascade_rcnn", "faster_rcnn_C4"])
def test_families_train_and_evaluate(family_cfg, family):
    """The whole trainer: two balanced steps, checkpoint, COCO evaluation of every task."""
    opts = ["MOKD.ENABLED", True, *OUTPUTS, "SOLVER.MAX_ITER", 2]
    opts += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    trainer = build_trainer(family_cfg(family, opts))
    trainer.resume_or_load(False)
    trainer.train()
    tasks = {"mask_rcnn": {"bbox", "segm"}, "keypoint_rcnn": {"bbox", "keypoints"}}
    results = trainer._last_eval_results
    assert set(results) == tasks.get(family, {"bbox"})
    assert all({"AP", "AP50", "AP75"} <= set(metrics) for metrics in results.values())


@pytest.mark.slow
def test_panoptic_fpn_trains(family_cfg):
    """Its data have sem_seg besides, so the set is registered in Python, as Detectron2's."""
    cfg = family_cfg("panoptic_fpn", ["MOKD.ENABLED", True, "SOLVER.MAX_ITER", 2])
    register_datasets(cfg)
    _, json_file, image_root = cfg.DATASETS.COCO[0]

    def load():
        dicts = load_coco_json(json_file, image_root, "tests_panoptic")
        folder = Path(json_file).parent / "sem_seg"
        return [
            {**d, "sem_seg_file_name": str(folder / f"{Path(d['file_name']).stem}.png")}
            for d in dicts
        ]

    DatasetCatalog.register("tests_panoptic", load)
    MetadataCatalog.get("tests_panoptic").set(evaluator_type="coco", json_file=json_file)
    try:
        cfg.DATASETS.TRAIN = ("tests_panoptic",)
        trainer = build_trainer(cfg)
        trainer.resume_or_load(False)
        trainer.train()
        storage = trainer.storage.latest()
        assert "loss_sem_seg" in storage and "balance/features/cosine_features" in storage
    finally:
        DatasetCatalog.remove("tests_panoptic")
        MetadataCatalog.remove("tests_panoptic")


@pytest.mark.parametrize("source", LAZY)
def test_detectors_of_python_configs(make_cfg, tmp_path, source):
    """FCOS and ViTDet as student (trained, evaluated) and as teacher of a Faster R-CNN."""
    path = tmp_path / "lazy.py"
    path.write_text(source)
    opts = ["MODEL.META_ARCHITECTURE", "LazyConfigDetector", "MODEL.LAZY_CONFIG.FILE", str(path)]
    opts += ["MOKD.ENABLED", True, "SOLVER.MAX_ITER", 1]
    trainer = build_trainer(make_cfg("faster_rcnn", opts))
    trainer.resume_or_load(False)
    trainer.train()
    assert "AP" in trainer._last_eval_results["bbox"]

    weights = str(tmp_path / "run" / "model_final.pth")
    opts = ["MOKD.TEACHER.CONFIG_FILE", str(path), "MOKD.TEACHER.WEIGHTS", weights]
    cfg = make_cfg("mokd", [*opts, "MOKD.TEACHER.OPTS", ["model.num_classes=1"]], "teacher")
    losses, _ = step(DistillationTrainer.build_model(cfg), batch_of(cfg))
    assert losses["features"]["loss_features"].isfinite()


@pytest.mark.parametrize("distils", [True, False], ids=["distilled", "stock step"])
def test_number_of_classes_of_a_python_config(make_cfg, tmp_path, distils):
    """Only the built model says it: it is compared before training."""
    (tmp_path / "lazy.py").write_text(FCOS)
    opts = ["MODEL.META_ARCHITECTURE", "LazyConfigDetector", "MOKD.ENABLED", distils]
    opts += ["MODEL.LAZY_CONFIG.FILE", str(tmp_path / "lazy.py")]
    opts += ["MODEL.LAZY_CONFIG.OVERRIDES", ["model.num_classes=2"]]
    message = (
        r"'num_classes' of the model, a FCOS, \(MODEL.LAZY_CONFIG.OVERRIDES\) is 2, but "
        r"'tests_trees_train' \(DATASETS.TRAIN\) has .*: set it to 1\."
    )
    with pytest.raises(ValueError, match=message):
        build_trainer(make_cfg("faster_rcnn", opts))


def test_channel_order_of_a_python_config(make_cfg, tmp_path):
    """The model of a Python config says it itself: a student's config must agree, and a teacher's
    follows."""
    path = tmp_path / "rgb.py"
    path.write_text(FCOS + 'model.input_format = "RGB"\n')
    opts = ["MODEL.META_ARCHITECTURE", "LazyConfigDetector", "MODEL.LAZY_CONFIG.FILE", str(path)]
    with pytest.raises(ValueError, match="INPUT.FORMAT is 'BGR', but the model of.*takes 'RGB'"):
        build_model(make_cfg("faster_rcnn", opts))
    (tmp_path / "none.pth").touch()
    weights = str(tmp_path / "none.pth")
    opts = ["MOKD.TEACHER.CONFIG_FILE", str(path), "MOKD.TEACHER.WEIGHTS", weights]
    cfg = make_cfg("mokd", opts)
    assert task_of(cfg).teacher_config(cfg).INPUT.FORMAT == "RGB"


def test_python_configs_without_a_model_are_refused(make_cfg, tmp_path):
    (tmp_path / "none.py").write_text("train = 1\n")
    opts = ["MODEL.META_ARCHITECTURE", "LazyConfigDetector"]
    with pytest.raises(ValueError, match="MODEL.LAZY_CONFIG.FILE is empty"):
        build_model(make_cfg("faster_rcnn", opts))
    opts += ["MODEL.LAZY_CONFIG.FILE", str(tmp_path / "none.py")]
    with pytest.raises(ValueError, match="defines no 'model'"):
        build_model(make_cfg("faster_rcnn", opts))


def test_keypoint_names_come_from_the_json(family_cfg):
    register_datasets(family_cfg("keypoint_rcnn"))
    metadata = MetadataCatalog.get("tests_annotated_train")
    assert metadata.keypoint_names == ["left_border", "right_border", "top"]
    assert metadata.keypoint_flip_map == [("left_border", "right_border")]


def test_keypoints_that_the_json_lacks_are_an_error(make_cfg, tmp_path):
    path = tmp_path / "no_keypoints.json"
    path.write_text((TREES / "train.json").read_text())
    sets = [["tests_no_keypoints", str(path), str(TREES / "train")]]
    with pytest.raises(ValueError, match="no category with 'keypoints'"):
        register_datasets(
            make_cfg("faster_rcnn", ["MODEL.KEYPOINT_ON", True, "DATASETS.COCO", sets])
        )


def test_annotated_tiles_are_the_trees(annotated):
    """The drawn masks and keypoints stand on the real boxes of the same images."""
    cfg = load_config(CONFIGS["faster_rcnn"], [*TREE_OPTS, *annotated])
    _, json_file, image_root = cfg.DATASETS.COCO[0]
    dicts = load_coco_json(json_file, image_root, extra_annotation_keys=["keypoints"])
    assert len(dicts) == 6 and all(d["annotations"] for d in dicts)
