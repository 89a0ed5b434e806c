# Copyright (c) The mokd_det authors.
"""Where a detector that teaches comes from, and what it sees."""

import pickle

import pytest
import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model

from mokd_det.config import find_config, load_config
from mokd_det.engine import DistillationTrainer
from mokd_det.readers import build_rpn_reader
from mokd_det.tasks import task_of

from ..conftest import CONFIGS, OUTPUTS
from ..modeling.families import batch_of, saved_teacher, step
from .helpers import build_teacher


def test_its_weights_are_those_of_the_file(make_cfg, teacher_weights):
    state = torch.load(teacher_weights)["model"]
    loaded = build_teacher(make_cfg("mokd")).model.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[key], loaded[key]) for key in state)


def test_it_sees_its_own_normalisation_and_channel_order(make_cfg):
    """The student's images are BGR; the teacher's features are those of its own RGB loader."""
    cfg = make_cfg("mokd")
    assert cfg.INPUT.FORMAT == "BGR"
    teacher, batch = build_teacher(cfg), batch_of(cfg)
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
        features = teacher.run(given, order).features
        for name in expected:
            assert torch.allclose(features[name], expected[name], atol=1e-5), (order, name)


def test_only_its_backbone_runs_for_features(make_cfg):
    cfg = make_cfg("mokd")
    model = DistillationTrainer.build_model(cfg)
    ran = []
    for name, module in model.teacher.model.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    step(model, batch_of(cfg))
    assert ran == ["backbone"]


def test_objects_are_the_boxes_that_it_is_sure_of(make_cfg):
    cfg = make_cfg("mokd", OUTPUTS)
    outputs = build_teacher(cfg).run(batch_of(cfg), "BGR")
    confidence, classes = outputs.at(outputs.proposals).confidence()
    threshold = confidence.median().item()
    found = outputs.objects(threshold)
    assert sum(map(len, found)) == (confidence > threshold).sum() > 0
    counts = [len(boxes) for boxes in outputs.proposals]
    first = confidence[: counts[0]] > threshold
    boxes = outputs.at(outputs.proposals).boxes_of(classes)[: counts[0]]
    assert torch.equal(found[0], boxes[first])
    assert not any(map(len, outputs.objects(1.0)))


def test_zoo_name_is_config_and_weights(make_cfg, monkeypatch, teacher_weights):
    """Detectron2's own functions resolve the name; here they answer with local files."""
    name = "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
    monkeypatch.setattr(model_zoo, "get_config_file", lambda asked: CONFIGS["teacher"])
    monkeypatch.setattr(model_zoo, "get_checkpoint_url", lambda asked: teacher_weights)
    opts = ["MOKD.TEACHER.CONFIG_FILE", name, "MOKD.TEACHER.WEIGHTS", ""]
    loaded = build_teacher(make_cfg("mokd", opts)).model.state_dict()
    state = torch.load(teacher_weights)["model"]
    assert all(torch.equal(state[key], loaded[key]) for key in state)
    opts += ["MOKD.TEACHER.OPTS", ["MODEL.WEIGHTS", "mine.pth"]]  # what the user says wins
    with pytest.raises(FileNotFoundError, match="'mine.pth' does not exist"):
        build_teacher(make_cfg("mokd", opts))


def test_zoo_names_of_the_installed_detectron2():
    name = "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"
    try:
        path, weights = find_config(name, "OPTION")
    except FileNotFoundError as error:  # the packaged 0.6 has lost its config files
        assert "came without the zoo's config files" in str(error) and "OPTION" in str(error)
    else:
        assert path.endswith(name)
        assert weights.endswith("faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl")
    with pytest.raises(FileNotFoundError, match="'no/such.yaml' does not exist .looked in .* zoo"):
        find_config("no/such.yaml", "OPTION")


def test_old_zoo_weights_load_strictly(make_cfg, tmp_path):
    """Old checkpoints hold the anchors, which are no parameters any more."""
    model = build_model(make_cfg("retinanet"))
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    state["anchor_generator.cell_anchors.0"] = torch.zeros(3, 4).numpy()
    state["pixel_mean"] = model.pixel_mean.numpy()  # once a part of the state
    path = tmp_path / "old.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "Detectron2 Model Zoo"}))
    opts = ["MOKD.ENABLED", True, "MOKD.TEACHER.CONFIG_FILE", CONFIGS["retinanet"]]
    cfg = make_cfg("retinanet", [*opts, "MOKD.TEACHER.WEIGHTS", str(path)])
    for key, value in build_teacher(cfg).model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    state["pixel_mean"] = state["pixel_mean"] + 1  # of other images
    path.write_bytes(pickle.dumps({"model": state, "__author__": "Detectron2 Model Zoo"}))
    with pytest.raises(ValueError, match="unexpected: pixel_mean"):
        build_teacher(cfg)


class TestMistakes:
    """Every one of these before any image is read."""

    @pytest.fixture(autouse=True)
    def no_data(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("data was read")

        monkeypatch.setattr("mokd_det.data.loader.get_detection_dataset_dicts", refuse)

    @pytest.mark.parametrize(
        "opts, error, message",
        [
            (["CONFIG_FILE", ""], ValueError, "MOKD.TEACHER.CONFIG_FILE is '' and DETECTOR"),
            (
                ["CONFIG_FILE", "configs/no.yaml"],
                FileNotFoundError,
                "MOKD.TEACHER.CONFIG_FILE 'configs/no.yaml' does not exist",
            ),
            (["WEIGHTS", ""], ValueError, "MOKD.TEACHER.WEIGHTS is empty"),
            (
                ["WEIGHTS", "no.pth"],
                FileNotFoundError,
                "MOKD.TEACHER.WEIGHTS 'no.pth' does not exist",
            ),
            (["OPTS", ["INPUT.FORMAT", "L"]], ValueError, "INPUT.FORMAT is 'BGR'"),
            (["OPTS", ["MODEL.FPN.OUT", 3]], ValueError, "no option MODEL.FPN.OUT"),
            (["PROPOSALS", 0], ValueError, "MOKD.TEACHER.PROPOSALS is 0: expected an integer >= 1"),
        ],
    )
    def test_options(self, make_cfg, opts, error, message):
        with pytest.raises(error, match=message):
            DistillationTrainer(make_cfg("mokd", [f"MOKD.TEACHER.{opts[0]}", opts[1]]))

    def test_weights_of_another_architecture(self, make_cfg, tmp_path):
        cfg = load_config(CONFIGS["retinanet"])
        *_, weights = saved_teacher(cfg, build_model(cfg), tmp_path)
        with pytest.raises(ValueError, match="MOKD.TEACHER.WEIGHTS.*does not fit") as error:
            DistillationTrainer(make_cfg("mokd", ["MOKD.TEACHER.WEIGHTS", weights]))
        for part in ("missing: ", "unexpected: head.", "in all"):
            assert part in str(error.value)

    def test_weights_of_another_width(self, make_cfg):
        opts = ["MOKD.TEACHER.OPTS", ["MODEL.ROI_BOX_HEAD.FC_DIM", 64]]
        with pytest.raises(ValueError, match="of another shape: roi_heads.box_head.fc1.weight"):
            DistillationTrainer(make_cfg("mokd", opts))

    def test_images_of_another_number_of_channels(self, make_cfg, tmp_path):
        opts = ["MODEL.PIXEL_MEAN", [1.0], "MODEL.PIXEL_STD", [1.0], "INPUT.FORMAT", "L"]
        cfg = load_config(CONFIGS["faster_rcnn"], opts)
        opts = saved_teacher(cfg, build_model(cfg), tmp_path)
        with pytest.raises(ValueError, match="only RGB and BGR can be converted"):
            DistillationTrainer(make_cfg("mokd", opts))

    def test_a_level_that_is_not_there(self, make_cfg):
        with pytest.raises(ValueError, match=r"MOKD.FEATURES.STUDENT has \['p2'\]"):
            DistillationTrainer(make_cfg("mokd", ["MOKD.FEATURES.STUDENT", ["p2"]]))

    def test_a_classifier(self, make_cfg):
        cfg = make_cfg("mokd", ["MOKD.TEACHER.CLASSIFIER", "resnet18"])
        with pytest.raises(ValueError, match="CLASSIFIER is 'resnet18', but the student is no cla"):
            task_of(cfg).teacher_config(cfg)


@pytest.mark.parametrize("opts", [[], ["MOKD.TEACHER.INFERENCE_MODE", True]])
def test_its_rpn_runs_once_for_proposals_and_for_what_it_says_at_anchors(make_cfg, opts):
    cfg = make_cfg("mokd", [*OUTPUTS, *opts])
    teacher = build_teacher(cfg)
    reader = build_rpn_reader(teacher.model, ["p3", "p5"])
    runs = []
    teacher.model.proposal_generator.rpn_head.conv.register_forward_hook(lambda *_: runs.append(1))
    outputs = teacher.run(batch_of(cfg), "BGR")
    count = len(runs)
    found = outputs.anchors(reader)
    assert len(runs) == count > 0
    with torch.no_grad():
        wanted = reader(outputs.features)
    for ours, theirs in zip((*found.logits, *found.deltas), (*wanted.logits, *wanted.deltas)):
        assert torch.equal(ours, theirs)
    assert len(found.logits) == 2
