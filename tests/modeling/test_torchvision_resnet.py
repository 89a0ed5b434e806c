# Copyright (c) The mokd_det authors.
"""The stock ResNet-18 of configs/COCO-Detection, from torchvision's file."""

import pytest
import torch
import torchvision
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.modeling import build_model

from mokd_det.config import load_config
from mokd_det.modeling import SafeCheckpointer
from mokd_det.tasks import task_of

CONFIGS = ["faster_rcnn_R_18_FPN_1x", "retinanet_R_18_FPN_1x"]


def cfg_of(name, opts=()):
    return load_config(f"configs/COCO-Detection/{name}.yaml", ["MODEL.DEVICE", "cpu", *opts])


@pytest.fixture
def resnet18(tmp_path):
    """torchvision's network with statistics of its own, in eval mode, and its file."""
    network = torchvision.models.resnet18().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    path = tmp_path / "resnet18-f37072fd.pth"
    torch.save(network.state_dict(), path)
    return network, str(path)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_it_computes_what_torchvisions_does(name, resnet18):
    network, path = resnet18
    model = build_model(cfg_of(name)).eval()
    SafeCheckpointer(model).load(path, checkpointables=[])
    x = torch.randn(1, 3, 64, 64)
    ours = model.backbone.bottom_up(x)
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    for stage, layer in zip(("res2", "res3", "res4", "res5"), range(1, 5)):
        x = network.get_submodule(f"layer{layer}")(x)
        if stage in ours:
            assert torch.allclose(ours[stage], x, rtol=1e-4, atol=1e-5)
    assert "res5" in ours


@pytest.mark.parametrize("name", CONFIGS)
def test_its_config_is_stock(name):
    """No key of ours is needed: stock Detectron2 builds the same model from it."""
    cfg = cfg_of(name)
    stock = get_detectron2_cfg()
    stock.merge_from_other_cfg(task_of(cfg).stock_config(cfg))
    state = build_model(cfg).state_dict()
    build_model(stock).load_state_dict(state, strict=True)
    assert "torchvision" not in stock.MODEL.BACKBONE.NAME
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    assert stock.MODEL.WEIGHTS == weights.url
    assert stock.MODEL.PIXEL_STD == pytest.approx([255 * x for x in weights.transforms().std])


@pytest.mark.parametrize("opts, warned", [((), False), (["INPUT.FORMAT", "BGR"], True)])
def test_other_pixels_are_warned_of(resnet18, caplog, opts, warned):
    model = build_model(cfg_of(CONFIGS[0], opts))
    with caplog.at_level("WARNING", "mokd_det"):
        SafeCheckpointer(model).load(resnet18[1], checkpointables=[])
    assert ("which reads normalised RGB, but INPUT.FORMAT is 'BGR'" in caplog.text) == warned


def test_a_bottleneck_of_other_strides_is_refused(tmp_path):
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "r.pth")
    path = str(tmp_path / "r.pth")
    opts = ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256]
    model = build_model(cfg_of(CONFIGS[1], opts))
    with pytest.raises(ValueError, match="MODEL.WEIGHTS '.*r.pth' .*.STRIDE_IN_1X1 is True: set"):
        SafeCheckpointer(model).load(path, checkpointables=[])


def test_other_models_take_it_as_it_is(resnet18):
    network, path = resnet18
    model = torchvision.models.resnet18()
    SafeCheckpointer(model).load(path, checkpointables=[])
    assert torch.equal(model.fc.weight, network.fc.weight)
