# Copyright (c) The mokd_det authors.
"""Readers of torchvision's detectors, and of FCOS, say what the detectors say."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from mokd_det.readers import build_box_reader, build_rpn_reader, build_rpn_readers, feature_shapes
from mokd_det.readers.dense import logits_of_centerness

from ..modeling.families import FCOS, annotated, batch_of, family_cfg
from ..modeling.torchvision_models import models, random_detector, torchvision_cfg, training_batch

__all__ = ["annotated", "family_cfg", "torchvision_cfg"]
MOBILE = "fasterrcnn_mobilenet_v3_large_320_fpn"
DENSE = ["fcos_resnet50_fpn", "retinanet_resnet50_fpn", "ssd300_vgg16"]
DENSE += ["ssdlite320_mobilenet_v3_large"]


def eval_model(cfg):
    """Return a detector, its preprocessed images, and its features."""
    model = random_detector(cfg).eval()
    images = model.preprocess_image(model.prepare(training_batch(cfg)))
    with torch.no_grad():
        return model, images, model.backbone(images.tensor)


def random_boxes(count, side):
    torch.manual_seed(0)
    corners = torch.rand(count, 2) * side * 0.8
    return torch.cat([corners, corners + 4 + torch.rand(count, 2) * side / 2], 1)


@pytest.mark.parametrize("name", models(quick=[MOBILE], names=[MOBILE, "maskrcnn_resnet50_fpn_v2"]))
def test_two_stage(torchvision_cfg, name):
    model, images, features = eval_model(torchvision_cfg(name))
    network, reader = model.network, build_box_reader(model, "teacher")
    with torch.no_grad():
        found, _ = network.rpn(ImageList(images.tensor, images.image_sizes), features)
        proposals = reader.propose(features, images, 7)
        assert all(torch.equal(a, b[:7]) for a, b in zip(proposals, found))
        read = reader(features, proposals, images.image_sizes)
        pooled = network.roi_heads.box_roi_pool(features, proposals, images.image_sizes)
        logits, deltas = network.roi_heads.box_predictor(network.roi_heads.box_head(pooled))
        # Background first in torchvision, last here.
        assert torch.equal(read.logits, logits[:, [1, 0]])
        boxes = network.roi_heads.box_coder.decode(deltas, proposals)
        assert torch.equal(read.boxes[:, 0], boxes[:, 1]) and read.exclusive
        assert reader.elsewhere(proposals) == 0
        # With one of its levels, boxes of the others are pooled there, and counted.
        part = build_box_reader(model, "teacher", ["1"])
        assert part.in_features == ["1"]
        assert part(features, proposals, images.image_sizes).logits.shape == logits.shape
        rpn = build_rpn_reader(model, list(feature_shapes(model)))
        objectness, _ = network.rpn.head(list(features.values()))
        assert all(torch.equal(a, b) for a, b in zip(rpn(features).logits, objectness))
    ours, theirs = build_rpn_readers(model, model)
    assert ours.in_features == theirs.in_features == list(features)


@pytest.mark.parametrize("name", models(names=DENSE))
def test_dense(torchvision_cfg, name):
    model, images, features = eval_model(torchvision_cfg(name))
    network, reader = model.network, build_box_reader(model, "student")
    with torch.no_grad():
        maps = list(features.values())
        anchors = network.anchor_generator(ImageList(images.tensor, images.image_sizes), maps)[0]
        outputs = network.head(maps)
        state = reader.run(features)
        assert torch.equal(state.anchors, anchors)

        boxes = random_boxes(200, min(images.image_sizes[0]))
        indices = reader._nearest(state.anchors, state.grids, boxes)
        compared = anchors
        if reader.scale != 1:  # FCOS has locations
            middle, half = (anchors[:, :2] + anchors[:, 2:]) / 2, (anchors[:, 2:] - anchors[:, :2])
            half = half * reader.scale / 2
            compared = torch.cat([middle - half, middle + half], 1)
        best = box_iou(boxes, compared)
        chosen = best.gather(1, indices[:, None])[:, 0]
        # At the border default boxes are clipped, and another cell's may be as good.
        assert (chosen >= best.max(1).values - (0.05 if "ssd" in name else 1e-5)).all()

        some = torch.randperm(len(anchors))[:40]
        read = reader.at(state, [anchors[some]] * 2, images.image_sizes)
        places = reader._nearest(state.anchors, state.grids, anchors[some])
        logits = outputs["cls_logits"][:, places]
        if "fcos" in name:
            scores = logits.sigmoid() * outputs["bbox_ctrness"][:, places].sigmoid()
            expected = scores.sqrt()[..., 1:]
            assert torch.allclose(read.logits.sigmoid(), expected.flatten(0, 1), atol=1e-5)
        elif "ssd" in name:
            assert torch.equal(read.logits, logits[..., [1, 0]].flatten(0, 1))
        else:
            assert torch.equal(read.logits, logits[..., 1:].flatten(0, 1))
        assert read.exclusive == ("ssd" in name)
        for found, size in zip(reader.propose(state, images, 20), images.image_sizes):
            assert 0 < len(found) <= 20 and (found >= 0).all()
            assert (found[:, 2] <= size[1]).all() and (found[:, 3] <= size[0]).all()

        # Some levels only: the same anchors and outputs of those.
        names = list(features)[1:3]
        part = build_box_reader(model, "teacher", names)
        assert part.in_features == names
        smaller = part.run({n: features[n] for n in names})
        start = state.grids[0].height * state.grids[0].width * state.grids[0].count
        stop = start + len(smaller.anchors)
        if "ssd" in name:  # others' anchors depend on the size that the first map tells
            assert torch.equal(smaller.anchors, state.anchors[start:stop])
        assert torch.equal(smaller.logits, state.logits[:, start:stop])


@pytest.mark.parametrize("name", models(names=["ssd300_vgg16", "ssdlite320_mobilenet_v3_large"]))
def test_ssd_at_the_size_of_its_student(torchvision_cfg, name):
    """As a teacher it sees images of any size: default boxes are where torchvision's are."""
    model = random_detector(torchvision_cfg(name)).eval()
    images = model.preprocess_image([{"image": torch.rand(3, 330, 350)}] * 2)
    assert images.tensor.shape == (2, 3, 352, 352)
    with torch.no_grad():
        features = model.backbone(images.tensor)
        reader = build_box_reader(model, "teacher")
        state = reader.run(features)
        maps = list(features.values())
        own = ImageList(images.tensor, images.image_sizes)
        middles = [
            a[:, :2] + a[:, 2:]
            for a in (state.anchors, model.network.anchor_generator(own, maps)[0])
        ]
        assert torch.allclose(*middles, atol=1e-3)
        assert len(state.anchors) == state.logits.shape[1]


@pytest.mark.parametrize("name", models(quick=(), names=["fcos_resnet50_fpn"]))
def test_fcos_level_is_its_own_choice(torchvision_cfg, name):
    """Objects of 8 to 16 strides are found on a level."""
    model, images, features = eval_model(torchvision_cfg(name, {"min_size": 512, "max_size": 600}))
    reader = build_box_reader(model, "student")
    with torch.no_grad():
        state = reader.run(features)
    starts = [0]
    for grid in state.grids:
        starts.append(starts[-1] + grid.height * grid.width * grid.count)
    for level, side in enumerate([50, 180, 400]):
        box = torch.tensor([[20.0, 20.0, 20.0 + side, 20.0 + side]])
        index = int(reader._nearest(state.anchors, state.grids, box))
        assert starts[level] <= index < starts[level + 1]


def test_logits_of_centerness():
    logits, centerness = torch.randn(50, 3) * 8, torch.randn(50, 1) * 8
    expected = (logits.double().sigmoid() * centerness.double().sigmoid()).sqrt()
    logits.requires_grad_()
    found = logits_of_centerness(logits, centerness)
    assert torch.allclose(found.sigmoid().double(), expected, atol=1e-5)
    extreme = logits_of_centerness(torch.tensor([[90.0], [-90.0]]), torch.tensor([[90.0], [-90.0]]))
    assert extreme.isfinite().all()
    F.softplus(found).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_fcos_of_detectron2(family_cfg, tmp_path, side):
    path = tmp_path / "fcos.py"
    path.write_text(FCOS)
    cfg = family_cfg("retinanet", ["MODEL.META_ARCHITECTURE", "LazyConfigDetector"])
    cfg.MODEL.LAZY_CONFIG.FILE = str(path)
    model = build_model(cfg).eval()
    reader = build_box_reader(model, side)
    with torch.no_grad():
        images = model.preprocess_image(batch_of(cfg))
        features = model.backbone(images.tensor)
        state = reader.run(features)
        logits, _, centerness = model.head([features[n] for n in model.head_in_features])
    scores = [(x.sigmoid() * c.sigmoid()).sqrt() for x, c in zip(logits, centerness)]
    expected = torch.cat([s.flatten(2).movedim(1, 2) for s in scores], 1)
    assert torch.allclose(state.logits.sigmoid(), expected, atol=1e-5)
    assert state.logits.shape[1] == len(state.anchors)


@pytest.mark.parametrize("name", models(names=["ssd300_vgg16", "ssdlite320_mobilenet_v3_large"]))
def test_ssd_finds_an_object_of_its_size_in_a_larger_image(torchvision_cfg, name):
    """Its layers see as many pixels as before, so default boxes have as many, too."""
    reader = build_box_reader(random_detector(torchvision_cfg(name)).eval(), "teacher")
    side, shapes = reader.fixed_size[0], reader._shapes

    def anchors(size):
        strides = (shape.stride for shape in shapes.values())
        maps = [torch.zeros(1, s.channels, *[-(-size // s.stride)] * 2) for s in shapes.values()]
        return reader.anchors_of(maps), [m.shape[2] for m in maps], list(strides)

    (own, grids), sizes, strides = anchors(side)
    (other, other_grids), other_sizes, _ = anchors(640)
    widths = [
        (x[:, 2:] - x[:, :2]).split([g.width**2 * g.count for g in y])
        for x, y in ((own, grids), (other, other_grids))
    ]
    for before, after, grid in zip(*widths, grids):
        assert torch.allclose(before[: grid.count], after[: grid.count], rtol=1e-3)
    if name.startswith("ssdlite"):  # and where they are: by the layer's stride
        count = grids[0].count
        assert torch.allclose(own[:count], other[:count], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("names, levels", [(["0", "3"], [0, 0, 3, 3]), (["1"], [1, 1, 1, 1])])
def test_boxes_of_absent_levels_are_pooled_on_the_nearest(torchvision_cfg, names, levels):
    """Whichever levels there are; each box's own is the first to the fourth."""
    model = random_detector(torchvision_cfg("fasterrcnn_resnet50_fpn")).eval()
    reader = build_box_reader(model, "teacher", names)
    maps = {str(i): torch.full((1, 256, 128 >> i, 128 >> i), float(i)) for i in range(4)}
    boxes = [torch.tensor([[10.0, 10.0, 10.0 + s, 10.0 + s] for s in (50, 150, 300, 480)])]
    pooled = reader.pooler({name: maps[name] for name in names}, boxes, [(512, 512)])
    assert pooled.mean((1, 2, 3)).tolist() == pytest.approx(levels)
    assert reader.elsewhere(boxes) == sum(own != used for own, used in enumerate(levels))
