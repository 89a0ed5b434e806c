# Copyright (c) The mokd_det authors.
"""Stock networks by name, and weights that fit or are refused."""

import pytest
import torch
import torchvision
from detectron2.config import CfgNode
from torch import nn

from mokd_det.config import load_config
from mokd_det.data.classification import Batch
from mokd_det.modeling import (
    CLASSIFIERS,
    Classifier,
    build_network,
    default_tap,
    find_taps,
    input_normalisation,
)
from mokd_det.tasks import ClassificationTask

from .classifiers import FAMILIES, classifier, classifier_families


@pytest.mark.parametrize("name", classifier_families(["resnet18", "squeezenet1_1"]))
def test_every_family_is_stock_and_has_a_head(name):
    model = classifier(build_network(name, 10))
    tap, kind, channels = FAMILIES[name]
    assert default_tap(model) == tap
    size = 299 if name == "inception_v3" else 224
    shapes = find_taps(model, [tap], size, "X")
    assert (shapes[tap].kind, shapes[tap].channels) == (kind, channels)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    stock = torchvision.models.get_model(name, num_classes=10, **options)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in stock.state_dict().items()
    }


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_outputs_and_losses_are_those_of_the_stock_network(name):
    model = classifier(build_network(name, 10), label_smoothing=0.1).eval()
    stock = torchvision.models.get_model(name, num_classes=10).eval()
    stock.load_state_dict(model.state_dict())
    images = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
    batch = Batch(images, torch.tensor([1, 2, 3, 4]))
    assert torch.equal(model(batch), stock(images.float()))
    torch.manual_seed(0)  # dropout
    loss = model.train()(batch)["loss_cls"]
    torch.manual_seed(0)
    logits = stock.train()(images.float())
    expected = nn.functional.cross_entropy(logits, batch.targets, label_smoothing=0.1)
    assert torch.equal(loss, expected)


def test_heads_for_training_only_count_less():
    model = classifier(build_network("googlenet", 10)).train()
    batch = Batch(torch.rand(2, 3, 64, 64) * 255, torch.tensor([0, 1]))
    losses = model(batch)
    assert set(losses) == {"loss_cls", "loss_auxiliary"}
    assert 0.3 * 2 * 1 < losses["loss_auxiliary"] < 0.3 * 2 * 6  # about 0.3 * 2 * log(10)
    plain = classifier(build_network("googlenet", 10, options={"aux_logits": False})).train()
    assert set(plain(batch)) == {"loss_cls"}


def test_weights_of_a_file_load_strictly(tmp_path):
    source = build_network("mobilenet_v3_small", 10)
    for content in (source.state_dict(), {"model": source.state_dict()}):
        torch.save(content, tmp_path / "w.pth")
        loaded = build_network("mobilenet_v3_small", 10, str(tmp_path / "w.pth"))
        assert all(
            torch.equal(a, b)
            for a, b in zip(loaded.state_dict().values(), source.state_dict().values())
        )


def test_another_number_of_classes_starts_a_new_last_layer_only_where_that_is_wanted(
    tmp_path, caplog
):
    source = build_network("shufflenet_v2_x0_5", 10)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    caplog.set_level("INFO")
    network = build_network("shufflenet_v2_x0_5", 3, str(tmp_path / "w.pth"), strict=False)
    assert network.fc.out_features == 3
    assert torch.equal(network.conv5[0].weight, source.conv5[0].weight)
    assert "another number of classes: fc.weight, fc.bias start random" in caplog.text
    with pytest.raises(ValueError, match=r"of another shape fc.weight \(file \(10, 1024\)"):
        build_network("shufflenet_v2_x0_5", 3, str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("conv5.0.weight"), "missing conv5.0.weight, unexpected none"),
        (lambda state: state.update(x=torch.zeros(1)), "missing none, unexpected x"),
        (
            lambda state: state.update({"conv5.0.weight": torch.zeros(1024, 9, 1, 1)}),
            "of another shape conv5.0.weight",
        ),
        (  # a wider network, not one of other classes
            lambda state: state.update({"conv1.0.weight": torch.zeros(48, 3, 3, 3)}),
            "of another shape conv1.0.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    state = build_network("shufflenet_v2_x0_5", 10).state_dict()
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        build_network("shufflenet_v2_x0_5", 10, str(tmp_path / "w.pth"), strict=False)


@pytest.mark.parametrize(
    "name, weights, options, message",
    [
        ("resnet17", "", {}, "NAME is 'resnet17': expected a classification model of torchvision"),
        (
            "mobilnet_v2",
            "",
            {},
            r"Did you mean 'mobilenet_v2' or 'mobilenet_v3_\w+' or 'mob\w+'\? ",
        ),
        ("vit", "", {}, r"Did you mean 'maxvit_t' or 'vit_b_16' or 'vit_b_32'\?"),
        ("?", "", {}, "No name is like it. All are listed by torchvision.models.list_models"),
        ("resnet18", "IMAGENET", {}, "neither a file nor one of '', 'DEFAULT', 'IMAGENET1K_V1'"),
        ("resnet18", "", {"wings": 2}, r"OPTIONS \{'wings': 2\} do not suit 'resnet18'"),
        ("vit_tiny_16", "DEFAULT", {}, "expected '' or a file for 'vit_tiny_16'"),
    ],
)
def test_names_that_do_not_exist(name, weights, options, message):
    with pytest.raises(ValueError, match=message) as error:
        build_network(name, 10, weights, options=options)
    assert len(str(error.value)) < 400  # no list of all names


@pytest.mark.slow
def test_torchvisions_weights_are_taken_as_torchvision_takes_them(monkeypatch):
    """Without a download: what the hub would return is a random network's state."""
    weights = torchvision.models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1
    small = {"num_classes": 1000, "image_size": 384}
    with torch.device("meta"):
        expected = torchvision.models.vit_b_16(**small).state_dict()
    given = {k: torch.zeros(v.shape) for k, v in expected.items()}
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **options: given)
    network = build_network("vit_b_16", 1000, "IMAGENET1K_SWAG_E2E_V1")
    assert network.image_size == 384  # of these weights
    assert not any(p.any() for p in network.parameters())
    assert not build_network("inception_v3", 10).transform_input  # as torchvision's from scratch


@pytest.mark.parametrize(
    "name, weights, option",
    [
        pytest.param("googlenet", "DEFAULT", ("transform_input", True), marks=pytest.mark.slow),
        ("googlenet", "file", ("transform_input", True)),
        pytest.param(
            *("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", ("image_size", 384)), marks=pytest.mark.slow
        ),
    ],
)
def test_a_trained_network_is_built_without_the_weights_it_started_from(
    name, weights, option, tmp_path, monkeypatch
):
    """What torchvision's builder sets by the weights is not in the state."""
    size = {"image_size": 384} if name == "vit_b_16" else {"init_weights": True}
    state = torchvision.models.get_model(name, weights=None, **size).state_dict()
    enum = torchvision.models.get_model_weights(name)
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **options: state)
    path, trained = tmp_path / "start.pth", tmp_path / "trained.pth"
    torch.save(state, path)
    cfg = load_config("configs/Base-Classifier.yaml", ["MODEL.CLASSIFIER.NAME", name])
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 3
    cfg.MODEL.CLASSIFIER.WEIGHTS = str(path) if weights == "file" else weights
    torch.save({"model": Classifier(cfg).state_dict()}, trained)
    path.unlink()
    cfg.MODEL.WEIGHTS = str(trained)
    assert getattr(ClassificationTask().load_trained(cfg).network, option[0]) == option[1]
    exported = ClassificationTask().untrained_config(cfg)
    assert exported.MODEL.CLASSIFIER.WEIGHTS == "" and cfg.MODEL.CLASSIFIER.WEIGHTS != ""
    assert dict(exported.MODEL.CLASSIFIER.OPTIONS) == dict([option])
    cfg.MODEL.CLASSIFIER.OPTIONS = CfgNode({option[0].upper(): option[1]})
    assert dict(ClassificationTask().untrained_config(cfg).MODEL.CLASSIFIER.OPTIONS) == {
        option[0].upper(): option[1]
    }


def test_normalisation_follows_the_weights():
    mean, std = input_normalisation("resnet18", "DEFAULT")
    assert mean == pytest.approx([123.675, 116.28, 103.53])
    assert std == pytest.approx([58.395, 57.12, 57.375])
    assert input_normalisation("vit_tiny_16", "")[0] == mean


def test_ones_own_network(monkeypatch):
    monkeypatch.setattr(CLASSIFIERS, "_objects", dict(CLASSIFIERS._objects))

    @CLASSIFIERS.register("tests_tiny")
    class Tiny(nn.Module):
        def __init__(self, num_classes, width=4):
            super().__init__()
            self.stem = nn.Conv2d(3, width, 3, 2)
            self.last = nn.Linear(width, num_classes)

        def forward(self, x):
            return self.last(self.stem(x).mean((2, 3)))

    opts = ["MODEL.CLASSIFIER.NAME", "tests_tiny", "MODEL.CLASSIFIER.OPTIONS", "{width: 6}"]
    cfg = load_config("configs/Digits/teacher.yaml", opts)
    with pytest.raises(ValueError, match="Tiny has none of 'fc', 'classifier', 'head', 'heads'"):
        Classifier(cfg)
    cfg.MODEL.CLASSIFIER.HEAD = "stim"
    with pytest.raises(ValueError, match="HEAD is 'stim', .* It has: stem, last"):
        Classifier(cfg)
    cfg.MODEL.CLASSIFIER.HEAD = "last"
    model = Classifier(cfg)
    assert find_taps(model, ["pre_logits"], 32, "X")["pre_logits"].channels == 6


def test_timms_networks(tmp_path):
    pytest.importorskip("timm")
    model = classifier(build_network("timm.resnet10t", 10))
    shapes = find_taps(model, ["pre_logits", "layer3"], 64, "X")
    assert [(k, v.kind, v.channels) for k, v in shapes.items()] == [
        ("layer3", "map", 256),
        ("pre_logits", "vector", 512),
    ]
    mean, _ = input_normalisation("timm.vit_tiny_patch16_224.augreg_in21k_ft_in1k", "DEFAULT")
    assert mean == [127.5] * 3
    torch.save({}, tmp_path / "file.pth")
    file = str(tmp_path / "file.pth")  # says nothing of its normalisation
    assert input_normalisation("timm.vit_tiny_patch16_224", file)[0][0] == pytest.approx(123.675)
    with pytest.raises(ValueError, match="'timm.resnet10x', which timm .* does not have"):
        input_normalisation("timm.resnet10x", "DEFAULT")
    with pytest.raises(ValueError, match="'timm.resnet10x', which timm .* does not have"):
        build_network("timm.resnet10x", 10)
    with pytest.raises(ValueError, match="timm names its weights in the model"):
        build_network("timm.resnet10t", 10, "IMAGENET1K_V1")


@pytest.mark.parametrize(
    "name, meant",
    [
        ("timm.mobilenetv3_smal_100", "'timm.mobilenetv3_small_100'"),
        ("timm.resnt50.a1_in1k", "'timm.resnet50'"),
        ("timm.resnet10t.c3_in1", "'timm.resnet10t.c3_in1k'"),
    ],
)
def test_names_that_timm_does_not_have(name, meant):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=f"{name}'.* Did you mean {meant}"):
        build_network(name, 10)


@pytest.mark.parametrize(
    "name, weights, message",
    [
        (*("resnet18", "DEFAULT"), "Download https://.*resnet18.*copy it here as .*resnet18"),
        (*("resnet18", "https://127.0.0.1:9/a.pth"), "Download https://127.0.0.1:9/a.pth.* set"),
        (*("timm.resnet10t", "DEFAULT"), "Download model.safetensors of .*timm/resnet10t.* set"),
    ],
)
def test_weights_that_cannot_be_downloaded(name, weights, message, monkeypatch, tmp_path):
    if name.startswith("timm."):
        timm = pytest.importorskip("timm")
        create = timm.create_model

        def no_hub(name, pretrained=False, **options):
            if pretrained:  # the hub's own client tries for a minute
                raise FileNotFoundError("An error happened while trying to locate the file")
            return create(name, **options)

        monkeypatch.setattr(timm, "create_model", no_hub)
    for variable in ("TORCH_HOME", "FVCORE_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    option = "MODEL.CLASSIFIER.WEIGHTS"
    with pytest.raises(ValueError, match=f"^{option} '{weights}'.* cannot be .*{message}"):
        build_network(name, 10, weights)


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match=r"needs timm: pip install -e '\.\[timm\]'"):
        build_network("timm.resnet10t", 10)
    with pytest.raises(ImportError, match="needs timm"):
        input_normalisation("timm.resnet10t", "DEFAULT")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("INPUT.FORMAT", "BGR", "INPUT.FORMAT is 'BGR': classifiers take 'RGB'"),
        ("MODEL.PIXEL_MEAN", [0.0], r"MODEL.PIXEL_MEAN is \[0.0\]: a classifier takes 3"),
        ("MODEL.CLASSIFIER.LABEL_SMOOTHING", 1.0, "LABEL_SMOOTHING is 1.0"),
    ],
)
def test_configs_that_do_not_suit_a_classifier(key, value, message):
    with pytest.raises(ValueError, match=message):
        Classifier(load_config("configs/Digits/student_scratch.yaml", [key, value]))


def test_trained_classifiers_need_weights_that_fit(tmp_path):
    cfg = load_config("configs/Digits/student_scratch.yaml")
    with pytest.raises(ValueError, match="MODEL.WEIGHTS and MODEL.CLASSIFIER.WEIGHTS are empty"):
        ClassificationTask().load_trained(cfg)
    path = tmp_path / "w.pth"
    torch.save(build_network("shufflenet_v2_x0_5", 7).state_dict(), path)
    cfg.MODEL.WEIGHTS = str(path)
    with pytest.raises(ValueError, match="MODEL.WEIGHTS .* does not fit .*\n.*fc.weight"):
        ClassificationTask().load_trained(cfg)
    cfg.MODEL.WEIGHTS, cfg.MODEL.CLASSIFIER.WEIGHTS = "", str(path)
    with pytest.raises(ValueError, match="of another shape fc.weight"):
        ClassificationTask().load_trained(cfg)
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 7
    loaded = ClassificationTask().load_trained(cfg)
    assert not loaded.training and loaded.network.fc.out_features == 7
