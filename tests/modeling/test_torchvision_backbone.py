# Copyright (c) The mokd_det authors.
"""Classification models of torchvision as backbones."""

import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model

from mokd_det.config import load_config
from mokd_det.modeling import TorchvisionBackbone


QUICK = {
    "mobilenet_v2": [24, 32, 96, 1280],
    "mobilenet_v3_small": [16, 24, 48, 576],
    "resnet18": [64, 128, 256, 512],
}
SLOW = {
    "resnet50": [256, 512, 1024, 2048],
    "efficientnet_b0": [24, 40, 112, 1280],
    "convnext_tiny": [96, 192, 384, 768],
    "swin_t": [96, 192, 384, 768],
    "regnet_y_400mf": [48, 104, 208, 440],
    "shufflenet_v2_x0_5": [24, 48, 96, 1024],
    "densenet121": [128, 256, 512, 1024],
    "vgg11_bn": [256, 512, 512, 512],
}


@pytest.mark.parametrize(
    "name, channels",
    [*QUICK.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW.items())],
)
def test_stages_are_the_outputs_of_blocks(name, channels):
    backbone = TorchvisionBackbone(name).eval()
    shapes = backbone.output_shape()
    assert list(shapes) == ["res2", "res3", "res4", "res5"]
    assert [s.channels for s in shapes.values()] == channels
    assert [s.stride for s in shapes.values()] == [4, 8, 16, 32]
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 96, 64))
    for stage, shape in shapes.items():
        expected = (1, shape.channels, 96 // shape.stride, 64 // shape.stride)
        assert tuple(features[stage].shape) == expected


def test_features_are_those_of_the_classifier():
    model = torchvision.models.resnet18().eval()
    backbone = TorchvisionBackbone("resnet18", out_features=["res5"]).eval()
    missing, unexpected = backbone.body.load_state_dict(model.state_dict(), strict=False)
    assert not missing and set(unexpected) == {"fc.weight", "fc.bias"}
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pooled = backbone(image)["res5"].mean((2, 3))
        assert torch.allclose(model.fc(pooled), model(image), atol=1e-5)


def test_weights_from_a_file_are_strict(tmp_path):
    model = torchvision.models.mobilenet_v3_small(num_classes=3)
    path = str(tmp_path / "weights.pth")
    state = model.state_dict()
    torch.save(state, path)  # another number of classes is fine: the classifier is not used
    backbone = TorchvisionBackbone("mobilenet_v3_small", weights=path)
    for key, value in backbone.body.state_dict().items():
        assert torch.equal(value, state[key]), key

    del state["features.0.0.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="missing .'features.0.0.weight'"):
        TorchvisionBackbone("mobilenet_v3_small", weights=path)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(ValueError, match="is not a state dict of mobilenet_v3_small"):
        TorchvisionBackbone("mobilenet_v3_small", weights=path)


def test_frozen_norm_and_freeze_at():
    backbone = TorchvisionBackbone("resnet18", norm="FrozenBN", freeze_at=2)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in backbone.modules())
    assert any(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules())
    trains = {k.split(".")[1] for k, p in backbone.named_parameters() if p.requires_grad}
    assert trains == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize(
    "name, stem",
    [
        ("resnet18", {"conv1", "bn1"}),
        ("mobilenet_v2", {"features.0", "features.1"}),
        pytest.param("swin_t", {"features.0"}, marks=pytest.mark.slow),  # stride 4 at once
    ],
)
def test_the_stem_alone_is_frozen(name, stem):
    backbone = TorchvisionBackbone(name, freeze_at=1).train()
    in_stem = tuple(f"body.{part}." for part in stem)
    frozen = [k for k, p in backbone.named_parameters() if not p.requires_grad]
    trains = [k for k, p in backbone.named_parameters() if p.requires_grad]
    assert frozen and all(k.startswith(in_stem) for k in frozen)
    if name != "swin_t":  # its first layer alone, without the normalisation behind it
        assert not any(k.startswith(in_stem) for k in trains)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone(torch.rand(2, 3, 64, 64))
    moved = {k for k, v in backbone.state_dict().items() if not v.equal(before[k])}
    assert not any(k.startswith(in_stem) for k in moved)


@pytest.mark.slow
def test_a_trained_backbone_is_built_without_the_weights_it_started_from(monkeypatch):
    """torchvision sets the conversion of the input by the weights, which a reload has not."""
    state = torchvision.models.googlenet(init_weights=True).state_dict()
    enum = torchvision.models.GoogLeNet_Weights
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **options: state)
    trained = TorchvisionBackbone("googlenet", weights="DEFAULT").eval()
    again = TorchvisionBackbone("googlenet").eval()
    again.load_state_dict(trained.state_dict())
    image = torch.rand(1, 3, 128, 128)
    for stage, features in trained(image).items():
        assert torch.equal(features, again(image)[stage])


def test_frozen_stages_keep_their_statistics():
    backbone = TorchvisionBackbone("resnet18", norm="BN", freeze_at=2).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone(torch.rand(2, 3, 64, 64))
    moved = {k.split(".")[1] for k, v in backbone.state_dict().items() if not v.equal(before[k])}
    assert moved == {"layer2", "layer3", "layer4"}


def test_named_nodes():
    backbone = TorchvisionBackbone(
        "resnet18", out_features=["res3", "res4"], nodes=["layer2.0.relu", "layer3.0.bn1"]
    )
    assert backbone.output_shape()["res3"].channels == 128


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "resnet19"}, "MODEL.TORCHVISION.NAME is 'resnet19': expected a classification"),
        ({"name": "resnet18", "weights": "no.pth"}, "WEIGHTS is 'no.pth': neither a file nor"),
        ({"name": "resnet18", "norm": "GN"}, "MODEL.TORCHVISION.NORM is 'GN'"),
        ({"name": "resnet18", "out_features": ["p3"]}, r"no stage \['p3'\]"),
        ({"name": "resnet18", "out_features": ["res3"], "nodes": ["no"]}, "has no node"),
        ({"name": "resnet18", "nodes": ["layer1.0.relu"]}, "name one node for each"),
        (
            {"name": "resnet18", "out_features": ["res3"], "nodes": ["layer1.0.relu"]},
            "do not have the strides",
        ),
        ({"name": "vit_b_16"}, "does not take images of"),
        ({"name": "squeezenet1_0"}, "has no feature maps for"),
        (
            {
                "name": "resnet18",
                "out_features": ["res3", "res4"],
                "nodes": ["layer2.0.add", "layer3.0.bn1"],
            },
            "NODES has 'layer2.0.add', which 'layer2_0_relu_1' changes in place",
        ),
        ({"name": "resnet18", "freeze_at": 9}, "MODEL.BACKBONE.FREEZE_AT is 9"),
    ],
)
def test_bad_options_name_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        TorchvisionBackbone(**options)


@pytest.mark.parametrize("family", ["retinanet", "faster_rcnn"])
def test_detectors_on_a_torchvision_backbone(family):
    opts = ["MODEL.TORCHVISION.NAME", "mobilenet_v3_small", "MODEL.DEVICE", "cpu"]
    opts += ["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.PIXEL_STD", [57.0, 57.0, 57.0]]
    if family == "retinanet":
        opts += ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 2]
        opts += ["MODEL.BACKBONE.NAME", "build_retinanet_torchvision_fpn_backbone"]
        opts += ["MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]
        opts += ["MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]]]
        levels = ["p3", "p4", "p5", "p6", "p7"]
    else:
        opts += ["MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone"]
        opts += ["MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]]
        opts += ["MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]]
        opts += ["MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]]]
        opts += ["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 2]
        opts += ["MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]]
        opts += ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1]
        opts += ["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7]
        levels = ["p2", "p3", "p4", "p5", "p6"]
    model = build_model(load_config("", opts)).eval()
    assert list(model.backbone.output_shape()) == levels
    with torch.no_grad():
        assert "instances" in model([{"image": torch.zeros(3, 64, 96)}])[0]
