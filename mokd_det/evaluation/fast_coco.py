# Copyright (c) The mokd_det authors.
"""COCO's evaluation by a compiled library, where Detectron2's own compiled one is absent."""

from typing import Any

from pycocotools.coco import COCO as StockCOCO
from pycocotools.cocoeval import COCOeval

try:
    from faster_coco_eval import COCO, COCOeval_faster
except ImportError:  # an optional extra: pycocotools gives the same numbers, slower
    COCOeval_faster = None


def fast_coco_eval(coco_gt: StockCOCO, coco_dt: StockCOCO, iou_type: str) -> Any:
    """Return faster-coco-eval's evaluation of "bbox", "segm" or "keypoints", else pycocotools'."""
    if COCOeval_faster is None:
        return COCOeval(coco_gt, coco_dt, iou_type)
    # It reads keypoints from its own index only.
    sides = [COCO(coco.dataset) for coco in (coco_gt, coco_dt)]
    return COCOeval_faster(*sides, iou_type, print_function=print)
