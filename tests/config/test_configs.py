# Copyright (c) The mokd_det authors.
"""Every file of configs/: options are checked, both sides are built, most train two iterations."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock

from mokd_det.config import load_config
from mokd_det.data import register_datasets
from mokd_det.data.augmentation import build_train_mapper
from mokd_det.data.classification import PackedImages, write_packed
from mokd_det.engine import DistillationTrainer, Trainer, build_trainer, validate
from mokd_det.modeling import detector_names
from mokd_det.readers import feature_shapes
from mokd_det.tasks import build_level_map, task_of

from ..conftest import DIGITS, ROOT, TREES
from ..data.annotated import coco_layout

FILES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "configs").glob("*/*.yaml")  # users' own may be beside the folders
    if not path.name.startswith("Base-") and path.parent.name != "Recipes"  # no whole configs
)
TASKS = {path: task_of(load_config(str(ROOT / path))).name for path in FILES}
CLASSIFIERS = [path for path in FILES if TASKS[path] == "classification"]
CONFIGS = [path for path in FILES if TASKS[path] == "detection"]
TORCHVISION = [path for path in FILES if TASKS[path] == "torchvision_detection"]
DISTILLED = [path for path in CONFIGS + TORCHVISION if "/mokd_" in path and "COCO-" in path]
# Longer schedules and large-scale jitter have the networks of the others: one of each kind.
# Teachers run beside their students.
TRAINED = [
    path
    for path in CONFIGS
    if "_3x" not in path or path.endswith("mokd_faster_rcnn_R_50_to_R_18_FPN_3x_LSJ.yaml")
]
# Small images and few boxes: the networks are those of the file.
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.TORCHVISION.WEIGHTS", ""),
    *("DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2),
    *("SOLVER.STEPS", (), "INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.MAX_SIZE_TRAIN", 96),
    *("INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 96, "INPUT.LSJ.SIZE", 96),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8, "SOLVER.CHECKPOINT_PERIOD", 10**6),
    # Everything is reported, so that there is something to evaluate.
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
    # Untrained, with images of 0 to 255: small steps.
    *("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.BASE_LR", 1e-3),
]
WITHOUT_DOWNLOAD = ["MODEL.TORCHVISION_DETECTOR.DOWNLOAD", False]
# As SMALL.
SMALL_RCNN = {
    "min_size": 96,
    "max_size": 96,
    "rpn_post_nms_top_n_test": 20,
    "box_score_thresh": 0.0,
}


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets") / "coco"
    coco_layout(root, TREES)
    sets = [
        [
            f"tests_coco_{s}",
            str(root / "annotations" / f"instances_{s}2017.json"),
            str(root / f"{s}2017"),
        ]
        for s in ("train", "val")
    ]
    train, val = (name for name, _, _ in sets)
    return ["DATASETS.COCO", sets, "DATASETS.TRAIN", (train,), "DATASETS.TEST", (val,)]


@torch.no_grad()
def tame(model):
    """A hundred random layers with frozen normalisation explode; small residuals do not."""
    for module in model.modules():
        if isinstance(module, BottleneckBlock):
            module.conv3.norm.weight.fill_(0.1)


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """From a teacher's config file to random weights that fit it."""
    folder = tmp_path_factory.mktemp("weights")

    def make(config_file, opts):
        path = folder / f"{Path(config_file).stem}.pth"
        if not path.is_file():
            none = ["MODEL.DEVICE", "cpu", "MODEL.TORCHVISION.WEIGHTS", ""]
            cfg = load_config(config_file, [*none, *opts])
            model = build_model(cfg)
            tame(model)
            torch.save({"model": model.state_dict()}, path)
        return str(path)

    yield make
    shutil.rmtree(folder)  # hundreds of MB


@pytest.mark.parametrize("config_file", FILES)
def test_builds(config_file, tmp_path):
    """Both sides without memory for their weights, as nothing is computed."""
    given = load_config(config_file)
    assert given.OUTPUT_DIR != "./output", "runs must not share a folder"
    none = ["MODEL.DEVICE", "meta", "MODEL.WEIGHTS", "", "MODEL.TORCHVISION.WEIGHTS", ""]
    cfg = load_config(config_file, none)
    weights = tmp_path / "weights.pth"
    weights.touch()
    if cfg.MOKD.TEACHER.CONFIG_FILE:
        cfg.MOKD.TEACHER.WEIGHTS = str(weights)  # must be there, but is not read
    task = validate(cfg)
    with torch.device("meta"):
        student = task.build_student(task.untrained_config(cfg))
        if not cfg.MOKD.ENABLED:
            return
        teacher_cfg = task.teacher_config(cfg)
        teacher_cfg = task_of(teacher_cfg).untrained_config(teacher_cfg)
    # RegNet computes with numbers of tensors when it is built.
    with torch.device("cpu" if "regnet" in config_file else "meta") as device:
        teacher_cfg.MODEL.DEVICE = str(device)
        teacher = build_model(teacher_cfg)
    task.check_student(cfg, student)
    if task.name != "classification":
        shapes = [feature_shapes(model) for model in (student, teacher)]
        assert build_level_map(*shapes, cfg.MOKD.FEATURES.STUDENT, cfg.MOKD.FEATURES.TEACHER)
    else:
        assert student.num_classes == teacher.num_classes


# Heads for the 80 classes of the data, whatever the file's own data set has.
CLASSES = ["MODEL.ROI_HEADS.NUM_CLASSES", 80, "MODEL.RETINANET.NUM_CLASSES", 80]


def give_teacher(cfg, random_weights):
    if cfg.MOKD.ENABLED and cfg.MOKD.TEACHER.DETECTOR:
        cfg.MOKD.TEACHER.OPTS = WITHOUT_DOWNLOAD
    elif cfg.MOKD.ENABLED:
        cfg.MOKD.TEACHER.OPTS = CLASSES
        cfg.MOKD.TEACHER.WEIGHTS = random_weights(cfg.MOKD.TEACHER.CONFIG_FILE, CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("config_file", TRAINED)
def test_trains_and_evaluates(config_file, data_sets, random_weights, tmp_path, monkeypatch):
    cfg = load_config(config_file, [*SMALL, *data_sets, "OUTPUT_DIR", str(tmp_path)])
    if "COCO-" in config_file:
        assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CLASSES) == (80, 80)
    cfg.merge_from_list(CLASSES)
    give_teacher(cfg, random_weights)
    trainer = build_trainer(cfg)
    tame(trainer.model)
    own_step = cfg.MOKD.ENABLED or cfg.DATALOADER.RESUMABLE
    assert type(trainer) is (DistillationTrainer if own_step else Trainer)
    train(trainer, monkeypatch)
    tasks = {"bbox", "segm"} if cfg.MODEL.MASK_ON else {"bbox"}
    assert set(trainer._last_eval_results) == tasks


def train(trainer, monkeypatch):
    """Two iterations, whatever the schedule."""
    # The file would be the whole optimizer; checkpoints have tests of their own.
    monkeypatch.setattr(trainer.checkpointer, "save", lambda *args, **kwargs: None)
    trainer.max_iter = 2
    trainer.resume_or_load(False)
    trainer.train()
    assert trainer.iter == 2


@pytest.mark.slow
@pytest.mark.parametrize("config_file", TORCHVISION)
def test_torchvisions_train_and_evaluate(
    config_file, data_sets, random_weights, tmp_path, monkeypatch
):
    """With random weights in place of torchvision's; SSDlite has images of 320 pixels always."""
    opts = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(tmp_path)]
    opts += ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 1e-3, *WITHOUT_DOWNLOAD, *data_sets]
    cfg = load_config(config_file, opts)
    if "COCO-" in config_file:
        assert cfg.MODEL.TORCHVISION_DETECTOR.NUM_CLASSES == 80
    cfg.MODEL.TORCHVISION_DETECTOR.NUM_CLASSES = 80
    if cfg.MODEL.TORCHVISION_DETECTOR.NAME.startswith("fasterrcnn"):
        cfg.MODEL.TORCHVISION_DETECTOR.OPTIONS = CfgNode(SMALL_RCNN)
    give_teacher(cfg, random_weights)
    trainer = build_trainer(cfg)
    train(trainer, monkeypatch)
    assert set(trainer._last_eval_results) == {"bbox"}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """From a number of classes to a packed set of digits that has as many."""
    root = tmp_path_factory.mktemp("labelled")

    def make(classes):
        path = root / f"{classes}.npz"
        digits = PackedImages(str(DIGITS / "train.npz"))
        names = [f"class {i}" for i in range(classes)]
        write_packed(str(path), digits.images, digits.labels, names)
        name = f"tests_labelled_{classes}"
        return ["DATASETS.CLASSIFICATION", [[name, str(path)]], "DATASETS.TRAIN", (name,)] + [
            *("DATASETS.TEST", (name,)),
        ]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("config_file", CLASSIFIERS)
def test_classifiers_train_and_evaluate(config_file, labelled, tmp_path, monkeypatch):
    """The schedule is one epoch of the file's recipe, in batches of 8 small images."""
    given = load_config(config_file)
    classes = given.MODEL.CLASSIFIER.NUM_CLASSES
    assert classes == (1000 if "ImageNet" in config_file else 10)
    size = min(given.INPUT.CLASSIFICATION.SIZE_TRAIN, 64)
    opts = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(tmp_path)]
    opts += ["SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", ()]
    opts += ["SOLVER.WARMUP_ITERS", 0, "INPUT.CLASSIFICATION.SIZE_TRAIN", size]
    opts += ["INPUT.CLASSIFICATION.SIZE_TEST", size, "INPUT.CLASSIFICATION.RESIZE_TEST", size]
    if given.MODEL.CLASSIFIER.NAME.startswith("vit_"):
        opts += ["MODEL.CLASSIFIER.OPTIONS", {"image_size": size}]
    cfg = load_config(config_file, [*opts, *labelled(classes)])
    if cfg.MOKD.ENABLED:
        monkeypatch.setattr("mokd_det.modeling.networks._load", lambda *args: None)
        monkeypatch.setattr("mokd_det.modeling.networks.torchvision_weights", no_download)
        if cfg.MOKD.TEACHER.CONFIG_FILE:
            weights = tmp_path / "teacher.pth"
            teacher = load_config(cfg.MOKD.TEACHER.CONFIG_FILE)
            torch.save({"model": build_model(teacher).state_dict()}, weights)
            cfg.MOKD.TEACHER.WEIGHTS = str(weights)
        assert task_of(cfg).teacher_config(cfg).MODEL.CLASSIFIER.NAME != cfg.MODEL.CLASSIFIER.NAME
    trainer = build_trainer(cfg)
    monkeypatch.setattr(trainer.checkpointer, "save", lambda *args, **kwargs: None)
    trainer.max_iter = 2  # of the 8 of an epoch
    trainer.resume_or_load(False)
    trainer.train()
    assert trainer.iter == 2
    assert trainer._last_eval_results["classification"]["images"] == 60


def no_download(name, weights, option):
    """The real enum member, whose state nothing is loaded from."""
    member = torchvision.models.get_model_weights(name)[weights]
    return SimpleNamespace(
        get_state_dict=lambda **options: {}, meta=member.meta, transforms=member.transforms
    )


@pytest.mark.parametrize("path", [c for c in CLASSIFIERS if "/mokd_" in c])
def test_distilled_classifier_is_its_baseline_plus_a_teacher(path):
    cfg = load_config(path)
    student = Path(path).stem.split("_to_")[1]
    baseline = load_config(str(Path(path).parent / f"{student}.yaml"))
    assert cfg.MOKD.ENABLED and not baseline.MOKD.ENABLED
    for key in ("MODEL", "DATASETS", "SOLVER", "INPUT", "DATALOADER"):
        assert cfg[key] == baseline[key]
    weights = torchvision.models.get_model_weights(cfg.MOKD.TEACHER.CLASSIFIER)
    assert cfg.MOKD.TEACHER.WEIGHTS in weights.__members__


ZOO = {
    "faster_rcnn_R_101_FPN_3x": "COCO-Detection",
    "faster_rcnn_R_50_FPN_3x": "COCO-Detection",
    "retinanet_R_101_FPN_3x": "COCO-Detection",
    "retinanet_R_50_FPN_3x": "COCO-Detection",
    "mask_rcnn_R_101_FPN_3x": "COCO-InstanceSegmentation",
}


@pytest.mark.parametrize("name", ZOO)
def test_teachers_are_the_model_zoos(name):
    """The addresses are those of Detectron2's own table."""
    cfg = load_config(f"configs/{ZOO[name]}/{name}.yaml")
    url = model_zoo.get_checkpoint_url(f"{ZOO[name]}/{name}.yaml")
    prefix = model_zoo.model_zoo._ModelZooUrls.S3_PREFIX
    assert cfg.MODEL.WEIGHTS == url.replace(prefix, "detectron2://")


def test_retinanet_base_spells_out_detectron2s_anchors():
    sizes = [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in [32, 64, 128, 256, 512]]
    assert load_config("configs/Base-RetinaNet.yaml").MODEL.ANCHOR_GENERATOR.SIZES == sizes


@pytest.mark.parametrize("path", DISTILLED)
def test_distilled_config_is_its_baseline_plus_a_teacher(path):
    """Schedule, data and model of a 1x file are those of the file that it is based on."""
    cfg = load_config(path)
    teacher = cfg.MOKD.TEACHER
    assert cfg.MOKD.ENABLED
    assert teacher.DETECTOR in detector_names() or (ROOT / teacher.CONFIG_FILE).is_file()
    baseline = load_config(str(Path(path).parent / f"{baseline_of(Path(path).stem)}.yaml"))
    assert cfg.MODEL == baseline.MODEL and cfg.DATASETS == baseline.DATASETS
    if "_3x" not in path:
        assert cfg.SOLVER == baseline.SOLVER and cfg.INPUT == baseline.INPUT
    else:
        assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (270000, (210000, 250000))
    assert cfg.INPUT.LSJ.ENABLED == path.endswith("LSJ.yaml")


def baseline_of(name):
    teacher, student = name.removeprefix("mokd_").split("_to_")
    if teacher.startswith("tv_"):
        return f"{student}_FPN_1x" if "_R_" in student else f"tv_{student}"
    return f"{teacher.split('_R_')[0]}_{student.split('_FPN')[0]}_FPN_1x"


def test_large_scale_jitter_makes_square_images(data_sets):
    cfg = load_config("configs/Base-RCNN-FPN.yaml", [*SMALL, *data_sets])
    cfg.INPUT.LSJ.ENABLED = True
    register_datasets(cfg)
    from detectron2.data import DatasetCatalog

    mapper, dicts = build_train_mapper(cfg), DatasetCatalog.get("tests_coco_train")
    counts = []
    for index in range(8):
        result = mapper(dicts[index % len(dicts)])
        assert tuple(result["image"].shape) == (3, 96, 96)
        boxes = result["instances"].gt_boxes.tensor
        assert (boxes >= 0).all() and (boxes <= 96).all()
        counts.append(len(boxes))
    assert len(set(counts)) > 1  # crops differ
    names = [type(a).__name__ for a in mapper.augmentations.augs]
    assert names == ["ResizeScale", "FixedSizeCrop", "RandomFlip"]


@pytest.mark.parametrize(
    "name",
    ["Quick-Start/student_scratch", "Quick-Start/student_mokd"]
    + ["Blood-Cells/student_retinanet", "Blood-Cells/mokd_faster_rcnn_to_retinanet"],
)
def test_a_baseline_sees_the_same_images(name):
    """Without it, the student from scratch has Detectron2's own loader, and other augmentations."""
    assert load_config(f"configs/{name}.yaml").DATALOADER.RESUMABLE
