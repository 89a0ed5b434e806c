# Copyright (c) The mokd_det authors.
"""``mokd visualize``: the work."""

import os

import cv2
import numpy as np
import torch

from .. import compat  # noqa: F401  (first: patches Detectron2 where it needs it)
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..config import check_device, load_config
from ..data import check_datasets, read_rgb, register_datasets
from ..engine import validate
from ..tasks import task_of

GROUND_TRUTH_COLOUR = (80, 220, 80)
PREDICTION_COLOUR = (60, 140, 255)  # BGR


def predict(cfg, elements, score):
    """
    Args:
        cfg (CfgNode): of a trained detector.
        elements (list[dict]): data set dicts.
        score (float): smallest score shown.

    Returns:
        list[ndarray]: for each element (N, 4) boxes x0, y0, x1, y1 in its pixels.
    """
    model = task_of(cfg).load_trained(cfg)
    mapper = DatasetMapper(cfg, is_train=False)
    boxes = []
    with torch.no_grad():
        for element in elements:
            instances = model([mapper(element)])[0]["instances"].to("cpu")
            boxes.append(instances.pred_boxes.tensor[instances.scores >= score].numpy())
    return boxes


def ground_truth(element):
    """Return (N, 4) boxes x0, y0, x1, y1 of a data set dict."""
    boxes = [
        BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
        for a in element.get("annotations", [])
    ]
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)


def draw(image, boxes, colour, scale):
    """Return an enlarged copy of a BGR image with boxes drawn on it."""
    canvas = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    for x0, y0, x1, y1 in np.round(boxes * scale).astype(int).tolist():
        cv2.rectangle(canvas, (x0, y0), (x1, y1), colour, 2)
    return canvas


def grid(elements, columns, scale=1.5):
    """
    Args:
        elements (list[dict]): data set dicts, one for each row.
        columns (list[tuple]): (title, boxes of each element, colour).
        scale (float): enlargement of the images.

    Returns:
        ndarray: (H, W, 3) BGR uint8.
    """
    images = [np.asarray(read_rgb(e["file_name"]))[:, :, ::-1].copy() for e in elements]
    height = round(max(i.shape[0] for i in images) * scale)
    width = round(max(i.shape[1] for i in images) * scale)
    margin, header = 6, 30
    rows = []
    titles = np.full((header, (width + margin) * len(columns), 3), 255, np.uint8)
    for c, (title, _, _) in enumerate(columns):
        x = c * (width + margin) + 4
        cv2.putText(
            titles, title, (x, 21), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA
        )
    rows.append(titles)
    for r, image in enumerate(images):
        row = np.full((height + margin, (width + margin) * len(columns), 3), 255, np.uint8)
        for c, (_, boxes, colour) in enumerate(columns):
            cell = draw(image, boxes[r], colour, scale)
            x = c * (width + margin)
            row[: cell.shape[0], x : x + cell.shape[1]] = cell
        rows.append(row)
    return np.concatenate(rows)


def visualize(dataset, models, output, count=3, score=0.5, opts=()):
    """
    Args:
        dataset (str): name, registered by the first model's config if it is not yet.
        models (list[tuple]): (label, config file, weights file).
        output (str): PNG to write.
        count (int): images: those with the most boxes.
        score (float): smallest score shown.
        opts (sequence): overrides [KEY, VALUE, ...] of all configs.
    """
    if count < 1:
        raise ValueError(f"--count is {count}: expected 1 or more.")
    if not 0 <= score <= 1:
        raise ValueError(f"--score is {score}: expected a number in [0, 1].")
    if not os.path.isdir(os.path.dirname(output) or "."):
        raise FileNotFoundError(f"--output '{output}': its folder does not exist.")
    if not cv2.haveImageWriter(output):
        raise ValueError(f"--output '{output}' has no suffix of an image format, such as .png.")
    cfgs = []
    for label, file, weights in models:
        cfg = load_config(file, [*opts, "MODEL.WEIGHTS", weights], option=f"--model {label}:")
        if task_of(cfg).name != "detection":
            raise ValueError(f"--model {label}: '{file}' is not of a detector.")
        if "://" not in weights and not PathManager.isfile(weights):
            raise FileNotFoundError(f"--model {label}: weights '{weights}' do not exist.")
        validate(cfg, is_training=False)
        check_device(cfg)
        cfgs.append(cfg)
    if dataset not in DatasetCatalog.list():
        register_datasets(cfgs[0])
    check_datasets([dataset], "--dataset")
    elements = DatasetCatalog.get(dataset)
    elements = sorted(elements, key=lambda e: -len(e.get("annotations", [])))[:count]
    columns = [("ground truth", [ground_truth(e) for e in elements], GROUND_TRUTH_COLOUR)]
    for (label, _, _), cfg in zip(models, cfgs):
        columns.append((label, predict(cfg, elements, score), PREDICTION_COLOUR))
    if not cv2.imwrite(output, grid(elements, columns)):
        raise OSError(f"Could not write {output}.")
