# Copyright (c) The mokd_det authors.
"""The tiles of tests/data/trees with what other families train on, drawn from their real boxes."""

import json
import shutil

import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image

KEYPOINTS = ["left_border", "right_border", "top"]


def annotate(source, target, images):
    """
    Write a copy of a COCO JSON with an octagon inside each box as its segmentation, and three
    keypoints; beside it ``sem_seg/``, where things are 1 and the rest 0.

    Args:
        source, target (Path): JSON files.
        images (Path): folder of the images.
    """
    coco = json.loads(source.read_text())
    for category in coco["categories"]:
        category["keypoints"] = KEYPOINTS
        category["skeleton"] = []
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        corners = [(0.3, 0), (0.7, 0), (1, 0.3), (1, 0.7), (0.7, 1), (0.3, 1), (0, 0.7), (0, 0.3)]
        polygon = [v for a, b in corners for v in (x + a * w, y + b * h)]
        annotation["segmentation"] = [polygon]
        points = [(0.05, 0.5), (0.95, 0.5), (0.5, 0.05)]
        annotation["keypoints"] = [v for a, b in points for v in (x + a * w, y + b * h, 2)]
        annotation["num_keypoints"] = len(KEYPOINTS)
    target.write_text(json.dumps(coco))
    folder = target.parent / "sem_seg"
    folder.mkdir(exist_ok=True)
    for image in coco["images"]:
        labels = np.zeros((image["height"], image["width"]), np.uint8)
        for annotation in coco["annotations"]:
            if annotation["image_id"] == image["id"]:
                x, y, w, h = (int(v) for v in annotation["bbox"])
                labels[y : y + h, x : x + w] = 1
        Image.fromarray(labels).save(folder / f"{image['file_name'].rsplit('.', 1)[0]}.png")


def coco_layout(root, trees):
    """
    Write the tiles in COCO's layout: ``root/annotations/instances_{train,val}2017.json`` with
    COCO's 80 classes, and ``root/{train,val}2017/``. Trees are COCO's potted plants.

    Args:
        root (Path): to make.
        trees (Path): tests/data/trees.
    """
    (root / "annotations").mkdir(parents=True)
    things = [c for c in COCO_CATEGORIES if c["isthing"]]
    plant = next(c["id"] for c in things if c["name"] == "potted plant")
    for split in ("train", "val"):
        path = root / "annotations" / f"instances_{split}2017.json"
        annotate(trees / f"{split}.json", path, trees / split)
        coco = json.loads(path.read_text())
        coco["categories"] = [{"id": c["id"], "name": c["name"]} for c in things]
        for annotation in coco["annotations"]:
            annotation["category_id"] = plant
        path.write_text(json.dumps(coco))
        shutil.copytree(trees / split, root / f"{split}2017")
    shutil.rmtree(root / "annotations" / "sem_seg")
