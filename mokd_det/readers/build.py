# Copyright (c) The mokd_det authors.
"""Which reader a detector's heads have."""

from collections.abc import Collection

from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.roi_heads import Res5ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.rotated_fast_rcnn import RROIHeads
from torch import nn

from .boxes import BoxReader
from .dense import FCOSReader, RetinaNetReader
from .torchvision import build_torchvision_reader, is_torchvision
from .two_stage import TwoStageReader


def build_box_reader(
    detector: nn.Module, who: str, names: Collection[str] | None = None
) -> BoxReader:
    """
    Return the reader of the detector that is the "student" or "teacher", on the feature maps with
    these names only (None: on all that its heads look at); ValueError if it cannot be read.
    """
    heads = getattr(detector, "roi_heads", None)
    rotated = isinstance(heads, RROIHeads)
    if isinstance(heads, (StandardROIHeads, Res5ROIHeads)) and not rotated:
        if getattr(detector, "proposal_generator", None) is None and who == "teacher":
            raise ValueError(
                "The teacher has no proposal generator "
                "(MODEL.PROPOSAL_GENERATOR.NAME is 'PrecomputedProposals'), and its boxes are "
                "what outputs are compared at."
            )
        return TwoStageReader(detector, names)
    if isinstance(detector, RetinaNet):
        return RetinaNetReader(detector, names)
    if isinstance(detector, FCOS):
        return FCOSReader(detector, names)
    if is_torchvision(detector):
        return build_torchvision_reader(detector, names)
    asked = "'outputs' in MOKD.OBJECTIVES"
    instead = "Its features can be distilled: MOKD.OBJECTIVES ['teacher_head'] or ['features']."
    if who == "teacher":
        asked += ", 'teacher_head' there, or MOKD.FEATURES.FOREGROUND 'teacher'"
        instead = (
            "Its features can be distilled: MOKD.OBJECTIVES ['features'], with FOREGROUND '' or "
            "'ground_truth'."
        )
    raise ValueError(
        f"The heads of the {who}, a {type(detector).__name__}, cannot be read, which {asked} asks "
        f"for: expected an R-CNN with Detectron2's ROI heads, RetinaNet, FCOS, or a detector "
        f"of torchvision. {instead}"
    )
