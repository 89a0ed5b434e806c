# Copyright (c) The mokd_det authors.
"""Which task a config's model is for, and a task of one's own."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import nn

from mokd_det.config import load_config
from mokd_det.engine import DistillationTrainer, build_trainer, validate
from mokd_det.tasks import TASKS, ClassificationTask, DetectionTask, task_of

from ..conftest import CONFIGS


@pytest.mark.parametrize(
    "name, task",
    [
        ("Classifier", ClassificationTask),
        ("GeneralizedRCNN", DetectionTask),
        ("RetinaNet", DetectionTask),
        ("LazyConfigDetector", DetectionTask),
        ("YourOwn", DetectionTask),
    ],
)
def test_task_of_a_meta_architecture(name, task):
    cfg = load_config("", ["MODEL.META_ARCHITECTURE", name])
    assert type(task_of(cfg)) is task and task_of(cfg).name in TASKS


def test_options_of_another_task_are_refused(make_cfg, make_digits_cfg):
    with pytest.raises(ValueError, match="FOREGROUND is 'teacher', but it is read for detection o"):
        validate(make_digits_cfg(["MOKD.FEATURES.FOREGROUND", "teacher"]))
    with pytest.raises(ValueError, match="IMAGE_SIZE is 64, .* for classification only, and MODEL"):
        validate(make_cfg("mokd", ["MOKD.TEACHER.IMAGE_SIZE", 64]))


def test_what_is_distilled_unless_the_config_says(make_cfg, make_digits_cfg):
    """Detectors trust the teacher's head as far as outputs agree with the task."""

    def of(cfg):
        model = DistillationTrainer.build_model(cfg)
        rule = model.boundary.balancer.rule
        return model.names[1:], rule.cap, rule.agreement, rule.together, rule.trusted

    def detector(names, *opts):
        free = ["MOKD.FEATURES.STUDENT", [], "MOKD.FEATURES.DIM", 0]
        more = [f"MOKD.BALANCING.LOSS_RATIO.{x}" if i % 2 == 0 else x for i, x in enumerate(opts)]
        return make_cfg("mokd", [*free, "MOKD.OBJECTIVES", names, *more])

    both = ["teacher_head", "outputs"]
    assert of(make_digits_cfg()) == (["features", "logits"], 10.0, 0.1, (), ())
    assert of(detector(None)) == (both, 2.0, 0.1, (1, 2), ())
    assert of(detector(["teacher_head"])) == (["teacher_head"], 2.0, 0.0, (), ())
    assert of(detector(["features"], "CAP", 5.0)) == (["features"], 5.0, 0.1, (), ())
    assert of(detector(None, "AGREEMENT", 0.3)) == (both, 2.0, 0.3, (1, 2), ())
    three = ["outputs", "features", "teacher_head"]
    assert of(detector(three)) == (three, 2.0, 0.1, (3, 1), ())
    assert of(detector(three[1:])) == (three[1:], 2.0, 0.1, (), (2,))

    script = detector(None)
    script.MOKD.TEACHER.TORCHSCRIPT.FILE = "teacher.ts"  # has features only
    assert task_of(script).objectives(script) == ["features"]


class CountingTask(DetectionTask):
    """The student's first level only, whatever the config says; and an option of its own."""

    meta_architectures = ("tests_Wrapped",)
    options = ("TEST.AUG",)

    def match_features(self, *args):
        return super().match_features(*args)[:1]

    def stock_module(self, model):
        return model.detector

    def check_config(self, cfg):
        super().check_config(cfg)
        if cfg.TEST.AUG.MAX_SIZE == 1:
            raise ValueError("TEST.AUG.MAX_SIZE is 1")


class Wrapped(nn.Module):
    """A detector in a module, whose checkpoints are the detector's."""

    def __init__(self, cfg):
        super().__init__()
        self.detector = META_ARCH_REGISTRY.get("GeneralizedRCNN")(cfg)

    @property
    def backbone(self):
        return self.detector.backbone

    def forward(self, batch):
        return self.detector(batch)


@pytest.fixture
def counting(make_cfg):
    """From overrides to the config of a student of this task."""
    TASKS.register("counting")(CountingTask)
    META_ARCH_REGISTRY._do_register("tests_Wrapped", Wrapped)
    wrapped = ["MODEL.META_ARCHITECTURE", "tests_Wrapped", "MOKD.ENABLED", True]
    yield lambda opts=(): make_cfg("faster_rcnn", [*wrapped, *opts])
    TASKS.remove("counting")
    del META_ARCH_REGISTRY._obj_map["tests_Wrapped"]


def test_a_third_task_is_picked_by_its_meta_architectures(counting, make_cfg):
    cfg = counting(["SOLVER.MAX_ITER", 1, "DATASETS.TEST", ()])
    assert type(task_of(cfg)) is type(validate(cfg)) is CountingTask
    assert type(task_of(make_cfg("mokd"))) is DetectionTask
    trainer = build_trainer(cfg)
    assert isinstance(trainer.model.task, CountingTask)
    assert [x.student for x in trainer.model.objectives["features"].levels] == ["p3"]
    trainer.resume_or_load(False)
    trainer.train()
    saved = torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=False)["model"]
    build_model(make_cfg("faster_rcnn")).load_state_dict(saved)


def test_its_options_are_its_own(counting, make_cfg):
    with pytest.raises(ValueError, match="TEST.AUG.MAX_SIZE is 1$"):
        validate(counting(["TEST.AUG.MAX_SIZE", 1]))
    with pytest.raises(ValueError, match="TEST.AUG.MAX_SIZE is 1, but it is read for counting onl"):
        validate(make_cfg("mokd", ["TEST.AUG.MAX_SIZE", 1]))
    validate(counting(["INPUT.LSJ.ENABLED", True]))  # it derives from the task that reads it
    with pytest.raises(ValueError, match="IMAGE_SIZE is 64, but it is read for classification onl"):
        validate(counting(["MOKD.TEACHER.IMAGE_SIZE", 64]))


def test_weights_that_nobody_gave(make_cfg, make_digits_cfg):
    for cfg in (make_cfg("faster_rcnn"), make_digits_cfg()):
        with pytest.raises(ValueError, match="MODEL.WEIGHTS .*(is|are) empty"):
            task_of(cfg).load_trained(cfg)


def test_a_trained_detector_is_built_without_the_weights_it_started_from(
    make_cfg, teacher_weights, tmp_path
):
    """The student alone, of a config that distils."""
    opts = ["MODEL.TORCHVISION.WEIGHTS", "gone.pth", "MODEL.WEIGHTS", teacher_weights]
    cfg = load_config(CONFIGS["teacher"], opts)
    model = task_of(cfg).load_trained(cfg)
    assert not model.training and task_of(cfg).stock_module(model) is model
    state = torch.load(teacher_weights)["model"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert cfg.MODEL.TORCHVISION.WEIGHTS == "gone.pth"
    cfg = make_cfg("mokd", ["MODEL.WEIGHTS", str(tmp_path / "student.pth")])
    student = DistillationTrainer.build_model(cfg).student
    torch.save({"model": student.state_dict()}, cfg.MODEL.WEIGHTS)
    assert type(task_of(cfg).load_trained(cfg)) is type(student)


@pytest.mark.parametrize(
    "claimed, error, message",
    [
        ("MyRetinaNet", TypeError, r"meta_architectures 'MyRetinaNet': expected a tuple, \('MyR"),
        (("MyNet", "Classifier"), KeyError, "'Classifier' is served by the task 'classification'"),
    ],
)
def test_a_task_claims_its_own_architectures_only(claimed, error, message):
    """A string would claim every name that is a part of it."""
    kind = type("Claiming", (DetectionTask,), {"meta_architectures": claimed})
    with pytest.raises(error, match=message):
        TASKS.register("claiming")(kind)
    assert "claiming" not in TASKS
