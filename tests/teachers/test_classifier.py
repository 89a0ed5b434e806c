# Copyright (c) The mokd_det authors.
"""Where a classifier that teaches comes from, and what it sees."""

import pytest
import torch
from torchvision.models import get_model_weights

from mokd_det.engine import validate
from mokd_det.modeling import DistillationModel, build_network, replace_taps
from mokd_det.tasks import task_of
from mokd_det.teachers import PRE_LOGITS, ClassifierTeacher

from ..modeling.classifiers import classifier, digit_batch
from .helpers import build_teacher, prefixed


@pytest.mark.parametrize("name, tap", [("resnet18", "bn1"), ("densenet121", "features")])
def test_a_tap_is_the_same_tensor_on_both_sides(name, tap):
    """On the teacher's, too, what follows may work in place."""
    model = classifier(name).eval()
    seen, batch = {}, digit_batch()
    with replace_taps(model, [tap], lambda features: seen.update(features) or features):
        model(batch)
    teacher = ClassifierTeacher(model, 32)
    teacher.tap([tap])
    outputs = teacher.run(batch)
    teacher.wait(outputs)
    assert seen[tap].min() < 0 and torch.equal(outputs.features[tap], seen[tap])


def test_teacher_sees_the_same_images_under_its_own_normalisation(make_digits_cfg):
    opts = ["MOKD.TEACHER.OPTS", ["MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]]]
    teacher = build_teacher(make_digits_cfg(opts))
    teacher.tap([PRE_LOGITS, "layer4"])
    batch = digit_batch()
    seen = []
    teacher.model.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs = teacher.run(batch)
    mean = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    assert torch.allclose(seen[0], (batch.images.float() - mean) / std)
    assert set(outputs.features) == {PRE_LOGITS, "layer4"}
    assert torch.equal(teacher.model.network.fc(outputs.features[PRE_LOGITS]), outputs.logits)
    assert not outputs.logits.requires_grad


@pytest.mark.parametrize(
    "options, bound",
    [
        (["PRECISION", "bfloat16"], 0.1),
        (["CHANNELS_LAST", True], 1e-3),
        pytest.param(["COMPILE", "aot_eager"], 1e-3, marks=pytest.mark.slow),
        (["INFERENCE_MODE", True], 0.0),
    ],
)
def test_options_of_speed_change_its_outputs_within_bounds_only(make_digits_cfg, options, bound):
    found = []
    for opts in ([], options):
        teacher = build_teacher(make_digits_cfg(prefixed(opts)))
        teacher.tap([PRE_LOGITS])
        teacher.run(digit_batch())
        found.append(teacher.run(digit_batch()))
    for name in ("logits", PRE_LOGITS):
        plain, fast = (x.logits if name == "logits" else x.features[name] for x in found)
        assert fast.dtype == torch.float32 and not fast.is_inference()
        assert (fast - plain).abs().max() <= bound * plain.std()


def test_a_teacher_by_name_wants_what_its_weights_want(make_digits_cfg):
    opts = ["MOKD.TEACHER.CONFIG_FILE", "", "MOKD.TEACHER.CLASSIFIER", "mobilenet_v3_small"]
    cfg = make_digits_cfg([*opts, "MOKD.TEACHER.WEIGHTS", "IMAGENET1K_V1"])
    cfg = task_of(cfg).teacher_config(cfg)
    assert cfg.MODEL.CLASSIFIER.NAME == "mobilenet_v3_small"
    assert cfg.MODEL.CLASSIFIER.WEIGHTS == "IMAGENET1K_V1" and cfg.MODEL.WEIGHTS == ""
    assert cfg.MODEL.PIXEL_MEAN == pytest.approx([123.675, 116.28, 103.53])
    assert cfg.MODEL.CLASSIFIER.NUM_CLASSES == 10


@pytest.mark.parametrize(
    "opts, error, message",
    [
        (["CLASSIFIER", "resnet18"], ValueError, "give one of the two"),
        (["CONFIG_FILE", ""], ValueError, "give one of the two"),
        (["WEIGHTS", ""], ValueError, "MOKD.TEACHER.WEIGHTS is empty, and so are"),
        (["WEIGHTS", "no/file.pth"], FileNotFoundError, "'no/file.pth' does not exist"),
        (["CONFIG_FILE", "configs/Quick-Start/teacher.yaml"], ValueError, "but the student is a c"),
        (["IMAGE_SIZE", -1], ValueError, "IMAGE_SIZE is -1"),
    ],
)
def test_options_that_cannot_be(make_digits_cfg, opts, error, message):
    with pytest.raises(error, match=message):
        validate(make_digits_cfg(prefixed(opts)))


@pytest.mark.parametrize(
    "opts, message",
    [
        (["WEIGHTS", "V9"], "V9': neither a file nor one of"),
        (["STREAM", True], "STREAM True needs a GPU"),
    ],
)
def test_teachers_that_cannot_be_built(make_digits_cfg, opts, message):
    with pytest.raises(ValueError, match=message):
        build_teacher(make_digits_cfg(prefixed(opts)))


@pytest.mark.parametrize("name", ["resnet17", "timm.resnet17"])
def test_an_unknown_teacher_is_not_called_the_student(make_digits_cfg, name):
    if name.startswith("timm."):
        pytest.importorskip("timm")
    opts = ["MOKD.TEACHER.CONFIG_FILE", "", "MOKD.TEACHER.CLASSIFIER", name]
    with pytest.raises(ValueError, match=f"^MOKD.TEACHER.CLASSIFIER is '{name}'"):
        validate(make_digits_cfg(opts))


@pytest.mark.parametrize("weights", ["file", "enum"])
@pytest.mark.parametrize("objectives, refused", [(["features"], False), (["logits"], True)])
def test_a_teacher_by_name_may_have_other_classes_where_none_are_compared(
    make_digits_cfg, tmp_path, monkeypatch, weights, objectives, refused
):
    name, classes = "shufflenet_v2_x0_5", 7 if weights == "file" else 1000
    state = build_network(name, classes).state_dict()
    torch.save(state, tmp_path / "t.pth")
    enum = get_model_weights(name)
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **options: state)
    opts = ["MOKD.TEACHER.CONFIG_FILE", "", "MOKD.TEACHER.CLASSIFIER", name]
    opts += ["MOKD.TEACHER.WEIGHTS", str(tmp_path / "t.pth") if weights == "file" else "DEFAULT"]
    cfg = make_digits_cfg([*opts, "MOKD.OBJECTIVES", objectives])
    if refused:
        with pytest.raises(ValueError, match=f"student has 10 classes and the teacher {classes}"):
            DistillationModel(cfg, task=task_of(cfg))
    else:
        model = DistillationModel(cfg, task=task_of(cfg))
        assert model.teacher.model.num_classes == classes and model.student.num_classes == 10
        assert torch.equal(model.teacher.model.network.fc.weight, state["fc.weight"])
        cfg.MOKD.TEACHER.OPTS = ["MODEL.CLASSIFIER.NUM_CLASSES", 9]
        with pytest.raises(ValueError, match="does not fit"):  # what one says oneself counts
            build_teacher(cfg)


NAME = ["MOKD.TEACHER.CONFIG_FILE", "", "MOKD.TEACHER.CLASSIFIER"]
FILE = ["MOKD.TEACHER.CONFIG_FILE", "configs/Digits/teacher.yaml", "MOKD.TEACHER.WEIGHTS"]
OF_FILE = "MODEL.CLASSIFIER.WEIGHTS"


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "opts, named",
    [
        ([*NAME, "resnet18", "MOKD.TEACHER.WEIGHTS", "DEFAULT"], "MOKD.TEACHER.WEIGHTS 'DEFAULT'"),
        ([*FILE, "IMAGENET1K_V1"], "MOKD.TEACHER.WEIGHTS 'IMAGENET1K_V1'"),
        (
            [*FILE, "", "MOKD.TEACHER.OPTS", [OF_FILE, "DEFAULT"]],
            f"MOKD.TEACHER.OPTS: {OF_FILE} 'DEFAULT'",
        ),
        (
            ["MOKD.TEACHER.CONFIG_FILE", "own.yaml", "MOKD.TEACHER.WEIGHTS", ""],
            f"{OF_FILE} of MOKD.TEACHER.CONFIG_FILE 'own.yaml' 'DEFAULT'",
        ),
    ],
)
def test_weights_that_cannot_be_downloaded_are_called_as_they_were_given(
    make_digits_cfg, monkeypatch, tmp_path, opts, named
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    cfg = make_digits_cfg(opts)
    if "own.yaml" in opts:
        monkeypatch.chdir(tmp_path)
        network = '{NAME: "resnet18", WEIGHTS: "DEFAULT"}'
        (tmp_path / "own.yaml").write_text(
            f"_BASE_: mokd://Digits/teacher.yaml\nMODEL: {{CLASSIFIER: {network}}}\n"
        )
    cached = f"copy it here as {tmp_path}/hub/checkpoints/resnet18-.*pth"
    with pytest.raises(ValueError, match=f"^{named} cannot be downloaded .*https://.*{cached}"):
        build_teacher(cfg)


@pytest.mark.bad_input
def test_weights_of_timm_that_cannot_be_downloaded(make_digits_cfg, monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def without_internet(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no connection")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", without_internet)
    cfg = make_digits_cfg([*NAME, "timm.resnet10t", "MOKD.TEACHER.WEIGHTS", "DEFAULT"])
    remedy = "https://huggingface.co/timm/resnet10t.* set MOKD.TEACHER.WEIGHTS to the path"
    with pytest.raises(ValueError, match=f"^MOKD.TEACHER.WEIGHTS 'DEFAULT' of .*{remedy}"):
        build_teacher(cfg)


@pytest.mark.bad_input
def test_weights_of_the_teachers_config_that_do_not_exist(make_digits_cfg):
    opts = [*FILE, "", "MOKD.TEACHER.OPTS", ["MODEL.WEIGHTS", "no/file.pth"]]
    with pytest.raises(FileNotFoundError, match="^MOKD.TEACHER.OPTS: MODEL.WEIGHTS 'no/file.pth'"):
        validate(make_digits_cfg(opts))
