# Copyright (c) The mokd_det authors.
"""The distillation model: pairs of different families, the hidden teacher, the level map."""

import pytest
import torch
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from mokd_det.config import load_config
from mokd_det.data import register_datasets
from mokd_det.engine import DistillationTrainer
from mokd_det.modeling import StrictCheckpointer, Teacher, build_level_map, build_teacher

from ..conftest import CONFIGS


@pytest.fixture(autouse=True)
def event_storage():
    """Detectron2's detectors write to one in training."""
    with EventStorage(0):
        yield


@pytest.fixture
def batch(make_cfg):
    cfg = make_cfg("mokd")
    register_datasets(cfg)
    mapper = DatasetMapper(cfg, is_train=True)
    torch.manual_seed(0)
    # Index 1 is square, 2 is 192 x 160.
    return [mapper(d) for d in get_detection_dataset_dicts(cfg.DATASETS.TRAIN)[1:3]]


def step(model, batch):
    objectives = model(batch)
    model.boundary.backward([sum(parts.values()) for parts in objectives.values()])
    return objectives


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet"])
def test_student_families_train_and_infer(make_cfg, batch, name):
    model = DistillationTrainer.build_model(make_cfg(name, ["MOKD.ENABLED", True])).train()
    objectives = step(model, batch)
    assert list(objectives) == ["task", "features"]
    assert all(loss.isfinite() for parts in objectives.values() for loss in parts.values())
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    model.eval()
    with torch.no_grad():
        ours, stock = model(batch), model.student(batch)
    assert torch.equal(ours[0]["instances"].scores, stock[0]["instances"].scores)


def test_default_level_map_of_a_cross_family_pair(make_cfg):
    model = DistillationTrainer.build_model(make_cfg("retinanet", ["MOKD.ENABLED", True]))
    assert model.features.level_map == {name: name for name in ("p3", "p4", "p5", "p6")}
    assert set(model.student.backbone.output_shape()) == {"p3", "p4", "p5", "p6", "p7"}


@pytest.mark.parametrize("side", ["learned", "frozen", "identity"])
@pytest.mark.parametrize("loss", ["smooth_l1", "mse", "cosine"])
def test_explicit_level_map_across_strides(make_cfg, batch, side, loss):
    """Channels 64 and 128, and strides 8 -> 16 and 32 -> 16."""
    opts = ["MOKD.FEATURES.STUDENT", ["p3", "p5"], "MOKD.FEATURES.TEACHER", ["p4", "p4"]]
    opts += ["MOKD.FEATURES.TEACHER_SIDE", side, "MOKD.FEATURES.LOSS", loss]
    opts += ["MOKD.FEATURES.DIM", 0]
    model = DistillationTrainer.build_model(make_cfg("mokd", opts)).train()
    assert step(model, batch)["features"]["loss_features"].isfinite()
    assert set(model.projectors) == {"p3", "p5"}


def test_teacher_is_eval_without_gradient_at_every_step(make_cfg, batch):
    model = DistillationTrainer.build_model(make_cfg("mokd")).train()
    teacher = model.teacher.model
    assert not any(m is teacher for m in model.modules())
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.train()  # somebody's loop over all modules
    step(model, batch)
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    for key, value in teacher.state_dict().items():
        assert torch.equal(before[key], value), key
    with torch.enable_grad():
        features = model.teacher.view(batch, "BGR").features
    assert not any(f.requires_grad for f in features.values())


def test_only_the_teachers_backbone_runs(make_cfg, batch):
    model = DistillationTrainer.build_model(make_cfg("mokd")).train()
    ran = []
    for name, module in model.teacher.model.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    step(model, batch)
    assert ran == ["backbone"]


def test_teacher_sees_its_own_normalisation_and_channel_order(make_cfg, batch):
    """The student's images are BGR; the teacher's features are those of its own RGB loader."""
    cfg = make_cfg("mokd")
    assert cfg.INPUT.FORMAT == "BGR"
    teacher = build_teacher(cfg)
    assert teacher.input_format == "RGB"
    rgb = [{"image": x["image"].flip(0)} for x in batch]
    with torch.no_grad():
        mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
        std = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
        images = [(x["image"] - mean) / std for x in rgb]
        padded = torch.zeros(2, 3, 192, 192)
        for target, image in zip(padded, images):
            target[:, : image.shape[1], : image.shape[2]] = image
        expected = teacher.model.backbone(padded)
    for given, order in ((batch, "BGR"), (rgb, "RGB")):
        features = teacher.view(given, order).features
        for name in expected:
            assert torch.allclose(features[name], expected[name], atol=1e-5), (order, name)


def test_teacher_weights_are_those_of_the_file(make_cfg, teacher_weights):
    state = torch.load(teacher_weights)["model"]
    loaded = build_teacher(make_cfg("mokd")).model.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[key], loaded[key]) for key in state)


def test_student_is_stock_outside_training(make_cfg, batch):
    model = DistillationTrainer.build_model(make_cfg("mokd")).train()
    step(model, batch)
    assert not model.student.backbone._forward_hooks


def test_a_student_that_runs_its_backbone_twice_is_refused(make_cfg, batch):
    model = DistillationTrainer.build_model(make_cfg("mokd")).train()
    preprocess = model.student.preprocess_image

    def run_twice(batched_inputs):
        images = preprocess(batched_inputs)
        model.student.backbone(images.tensor)
        return images

    model.student.preprocess_image = run_twice
    with pytest.raises(RuntimeError, match="ran 2 times in one forward"):
        model(batch)
    assert not model.student.backbone._forward_hooks


SHAPES = {
    "p3": ShapeSpec(channels=8, stride=8),
    "p4": ShapeSpec(channels=8, stride=16),
}
OTHER = {"p4": ShapeSpec(channels=16, stride=16), "p5": ShapeSpec(channels=16, stride=32)}


def test_level_map():
    assert build_level_map(SHAPES, OTHER) == {"p4": "p4"}
    assert build_level_map(SHAPES, OTHER, ["p3", "p4"], ["p5", "p4"]) == {"p3": "p5", "p4": "p4"}
    assert build_level_map(SHAPES, SHAPES, ["p3"]) == {"p3": "p3"}


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        (["p3"], [], r"MOKD.FEATURES.TEACHER has \['p3'\].*p4 \(stride 16, 16 ch"),
        (["p6"], ["p4"], r"MOKD.FEATURES.STUDENT has \['p6'\].*p3 \(stride 8, 8 ch"),
        (["p3", "p4"], ["p4"], "must have the same length"),
        ([], ["p4"], "MOKD.FEATURES.STUDENT is empty"),
        (["p4", "p4"], ["p4", "p5"], "names a level twice"),
    ],
)
def test_bad_level_maps(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        build_level_map(SHAPES, OTHER, student, teacher)


def test_no_common_level_needs_an_explicit_map():
    with pytest.raises(ValueError, match="share neither a feature name nor a stride"):
        build_level_map({"res3": SHAPES["p3"]}, OTHER)


class TestBadTeacher:
    """Every one of these before any data is read."""

    @pytest.fixture(autouse=True)
    def no_data(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("data was read")

        monkeypatch.setattr("mokd_det.data.loader.get_detection_dataset_dicts", refuse)

    @pytest.mark.parametrize(
        "opts, error, message",
        [
            (["MOKD.TEACHER.CONFIG_FILE", ""], ValueError, "MOKD.TEACHER.CONFIG_FILE is empty"),
            (
                ["MOKD.TEACHER.CONFIG_FILE", "configs/no.yaml"],
                FileNotFoundError,
                "MOKD.TEACHER.CONFIG_FILE 'configs/no.yaml' does not exist",
            ),
            (["MOKD.TEACHER.WEIGHTS", ""], ValueError, "MOKD.TEACHER.WEIGHTS is empty"),
            (
                ["MOKD.TEACHER.WEIGHTS", "no.pth"],
                FileNotFoundError,
                "MOKD.TEACHER.WEIGHTS 'no.pth' does not exist",
            ),
            (["MOKD.TEACHER.OPTS", ["INPUT.FORMAT", "L"]], ValueError, "INPUT.FORMAT is 'BGR'"),
            (["MOKD.TEACHER.OPTS", ["MODEL.FPN.OUT", 3]], ValueError, "no option MODEL.FPN.OUT"),
            (["MOKD.FEATURES.STUDENT", ["p2"]], ValueError, "MOKD.FEATURES.STUDENT has"),
            (["MOKD.FEATURES.LOSS", "l7"], ValueError, "MOKD.FEATURES.LOSS is 'l7'"),
            (["MOKD.FEATURES.PROJECTOR", "P"], ValueError, "MOKD.FEATURES.PROJECTOR is 'P'"),
            (["MOKD.BALANCING.RULE", "magic"], ValueError, "MOKD.BALANCING.RULE is 'magic'"),
            (["MOKD.FEATURES.LOSS_WEIGHT", 0.0], ValueError, "FEATURES.LOSS_WEIGHT is 0.0"),
            (["MOKD.BALANCING.SCHEDULE", [1.0]], ValueError, "MOKD.BALANCING.SCHEDULE is"),
            (["MOKD.META_ARCHITECTURE", "No"], ValueError, "MOKD.META_ARCHITECTURE 'No'"),
        ],
    )
    def test_is_a_clear_error(self, make_cfg, opts, error, message):
        with pytest.raises(error, match=message):
            DistillationTrainer(make_cfg("mokd", opts))

    def test_weights_of_another_architecture(self, make_cfg, tmp_path):
        cfg = load_config(CONFIGS["retinanet"])
        torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "retinanet.pth")
        opts = ["MOKD.TEACHER.WEIGHTS", str(tmp_path / "retinanet.pth")]
        with pytest.raises(ValueError, match="MOKD.TEACHER.WEIGHTS.*does not fit") as error:
            DistillationTrainer(make_cfg("mokd", opts))
        for part in ("missing: ", "unexpected: head.", "in all"):
            assert part in str(error.value)

    def test_weights_of_another_width(self, make_cfg):
        opts = ["MOKD.TEACHER.OPTS", ["MODEL.ROI_BOX_HEAD.FC_DIM", 64]]
        with pytest.raises(ValueError, match="of another shape: roi_heads.box_head.fc1.weight"):
            DistillationTrainer(make_cfg("mokd", opts))


def test_strict_loading_takes_what_fits(make_cfg, tmp_path):
    model = build_model(make_cfg("faster_rcnn"))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    StrictCheckpointer(model).load(str(tmp_path / "model.pth"))


def test_teacher_is_no_module():
    """So that no parameters(), state_dict() or DistributedDataParallel can ever see it."""
    assert not issubclass(Teacher, torch.nn.Module)
