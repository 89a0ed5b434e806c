# Copyright (c) The mokd_det authors.
"""What two RPNs say at the same anchors."""

import pytest
import torch
from detectron2.modeling import build_model

from mokd_det.readers import AnchorOutputs, RPNReader, build_rpn_readers

from ..modeling.families import batch_of


def random_outputs(seed, *sizes):
    generator = torch.Generator().manual_seed(seed)
    return AnchorOutputs(
        [torch.randn(2, 3, *size, generator=generator) for size in sizes],
        [torch.randn(2, 3, 4, *size, generator=generator) for size in sizes],
    )


def test_maps_of_other_padding_are_compared_where_both_are():
    student, teacher = random_outputs(0, (5, 4), (2, 2)), random_outputs(1, (4, 6), (2, 3))
    ours, theirs = student.cropped_to(teacher), teacher.cropped_to(student)
    assert [x.shape[-2:] for x in ours.logits] == [(4, 4), (2, 2)]
    assert [x.shape for x in ours.deltas] == [x.shape for x in theirs.deltas]
    assert torch.equal(theirs.logits[0], teacher.logits[0][..., :4, :4])


def test_reader_says_what_the_rpn_says(family_cfg):
    """In the order of the RPN's own decoding: logits and deltas of one anchor stay together."""
    cfg = family_cfg("faster_rcnn", ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0]]])
    torch.manual_seed(5)
    model = build_model(cfg).eval()
    rpn = model.proposal_generator
    seen = {}
    predict = rpn.predict_proposals

    def record(anchors, logits, deltas, sizes):
        seen["logits"], seen["deltas"] = logits, deltas
        return predict(anchors, logits, deltas, sizes)

    rpn.predict_proposals = record
    with torch.no_grad():
        images = model.preprocess_image(batch_of(cfg))
        features = model.backbone(images.tensor)
        rpn(images, features)
        read = RPNReader(rpn, [0, 2])(features)
    assert [x.shape[1] for x in read.logits] == [4, 4]
    for level, (logits, deltas) in zip([0, 2], zip(read.logits, read.deltas)):
        assert torch.equal(logits.permute(0, 2, 3, 1).flatten(1), seen["logits"][level])
        assert torch.equal(deltas.permute(0, 3, 4, 1, 2).flatten(1, 3), seen["deltas"][level])
    logits, deltas = AnchorOutputs(read.logits[:1], read.deltas[:1]).flat()
    best = logits[1].argmax()
    anchor, row, column = torch.unravel_index(best, read.logits[0].shape[1:])
    assert torch.equal(deltas[1, best], read.deltas[0][1, anchor, :, row, column])


def rpn_pair(family_cfg, *opts):
    models = [build_model(family_cfg("faster_rcnn", x)) for x in ([], list(opts))]
    return build_rpn_readers(*models)


def test_levels_with_the_same_anchors_are_paired(family_cfg):
    ours, theirs = rpn_pair(family_cfg)
    assert ours.in_features == theirs.in_features == ["p3", "p4", "p5", "p6"]
    sizes = [[16, 32], [48, 64], [96, 100], [192, 256]]
    ours, theirs = rpn_pair(family_cfg, "MODEL.ANCHOR_GENERATOR.SIZES", sizes)
    assert ours.in_features == theirs.in_features == ["p3", "p4", "p6"]
    fewer = ["MODEL.RPN.IN_FEATURES", ["p4", "p5"]]
    sizes = ["MODEL.ANCHOR_GENERATOR.SIZES", [[48, 64], [96, 128]]]
    ours, theirs = rpn_pair(family_cfg, *fewer, *sizes)
    assert ours.in_features == theirs.in_features == ["p4", "p5"]


@pytest.mark.parametrize(
    "opts",
    [
        ["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [9], [10], [11]]],
        ["MODEL.ANCHOR_GENERATOR.OFFSET", 0.5],
        ["MODEL.RPN.BBOX_REG_WEIGHTS", (2.0, 2.0, 1.0, 1.0)],
        ["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"],
    ],
)
def test_other_anchors_or_units_are_not_compared(family_cfg, opts):
    assert rpn_pair(family_cfg, *opts) is None


def test_a_dense_detector_has_no_rpn(family_cfg):
    models = [build_model(family_cfg(family)) for family in ("retinanet", "faster_rcnn")]
    assert build_rpn_readers(*models) is None
