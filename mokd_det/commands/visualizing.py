# Copyright (c) The mokd_det authors.
"""``mokd visualize``: the work."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from .. import compat  # noqa: F401  (first: patches Detectron2 where it needs it)
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from detectron2.utils.file_io import PathManager

from ..config import check_device, load_config
from ..data import check_datasets, read_rgb, register_datasets
from ..engine import validate
from ..report import found_once
from ..tasks import task_of

GROUND_TRUTH_COLOUR = (80, 220, 80)  # BGR
RIGHT_COLOUR = (80, 220, 80)
WRONG_COLOUR = (60, 60, 255)
SMALLEST = 256  # pixels of an enlarged image's longer side

Element = dict[str, Any]  # Detectron2's data set dict
Colour = tuple[int, int, int]


class Objects(NamedTuple):
    """
    Attributes:
        boxes: (N, 4) x0, y0, x1, y1 in an image's pixels.
        classes: (N,) numbers of their classes.
    """

    boxes: np.ndarray
    classes: np.ndarray


class Column(NamedTuple):
    """``objects`` and ``colours`` of each image's."""

    title: str
    objects: Sequence[Objects]
    colours: Sequence[Sequence[Colour]]


def predict(cfg: CfgNode, elements: Sequence[Element], score: float) -> list[Objects]:
    """
    Return what the trained detector of ``cfg`` finds in each image with a score of at least
    ``score``, the highest first.
    """
    model = task_of(cfg).load_trained(cfg)
    mapper = DatasetMapper(cfg, is_train=False)
    found = []
    with torch.no_grad():
        for element in elements:
            instances = model([mapper(element)])[0]["instances"].to("cpu")
            instances = instances[instances.scores.sort(descending=True).indices]
            instances = instances[instances.scores >= score]
            boxes, classes = instances.pred_boxes.tensor, instances.pred_classes
            found.append(Objects(boxes.numpy(), classes.numpy()))
    return found


def ground_truth(element: Element) -> Objects:
    """Return the objects of a data set dict."""
    annotations = [a for a in element.get("annotations", []) if not a.get("iscrowd")]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    classes = [a["category_id"] for a in annotations]
    return Objects(np.array(boxes, dtype=np.float32).reshape(-1, 4), np.array(classes, dtype=int))


def are_right(found: Objects, truth: Objects) -> np.ndarray:
    """Return (N,) bool: which of the found objects have the class and place of a true one each."""
    overlaps = pairwise_iou(*(Boxes(torch.as_tensor(o.boxes)) for o in (found, truth))).numpy()
    return found_once(np.where(found.classes[:, None] == truth.classes, overlaps, 0))


def draw(
    image: np.ndarray,
    objects: Objects,
    colours: Sequence[Colour],
    names: Sequence[str],
    scale: float,
) -> np.ndarray:
    """Return an enlarged copy of a BGR image with boxes drawn on it, and names of their classes."""
    canvas = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    boxes = np.round(objects.boxes * scale).astype(int).tolist()
    for (x0, y0, x1, y1), number, colour in zip(boxes, objects.classes, colours):
        cv2.rectangle(canvas, (x0, y0), (x1, y1), colour, 2)
        if len(names) > 1:
            write(canvas, names[number], (x0 + 3, y0 + 17), colour)
    return canvas


def write(canvas: np.ndarray, text: str, place: tuple[int, int], colour: Colour) -> None:
    """Write on a BGR image; ``place``: x, y of the text's left end below."""
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.6, colour, 2, cv2.LINE_AA)


def grid(
    elements: Sequence[Element], columns: Sequence[Column], names: Sequence[str]
) -> np.ndarray:
    """
    Args:
        elements: data set dicts, one for each row.
        names: of the classes.

    Returns:
        (H, W, 3) BGR uint8.
    """
    images = [np.asarray(read_rgb(e["file_name"]))[:, :, ::-1].copy() for e in elements]
    scale = max(1.5, SMALLEST / max(max(i.shape) for i in images))
    height = round(max(i.shape[0] for i in images) * scale)
    width = round(max(i.shape[1] for i in images) * scale)
    margin, header = 6, 30
    titles = np.full((header, (width + margin) * len(columns), 3), 255, np.uint8)
    for c, (title, _, _) in enumerate(columns):
        x = c * (width + margin) + 4
        cv2.putText(
            titles, title, (x, 21), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA
        )
    rows = [titles]
    for r, image in enumerate(images):
        row = np.full((height + margin, (width + margin) * len(columns), 3), 255, np.uint8)
        for c, (_, objects, colours) in enumerate(columns):
            cell = draw(image, objects[r], colours[r], names, scale)
            x = c * (width + margin)
            row[: cell.shape[0], x : x + cell.shape[1]] = cell
        rows.append(row)
    return np.concatenate(rows)


def model_column(label: str, found: Sequence[Objects], truth: Sequence[Objects]) -> Column:
    """Return the column of :func:`grid` of a model that ``found`` these objects."""
    right = [are_right(*pair) for pair in zip(found, truth)]
    colours = [[RIGHT_COLOUR if r else WRONG_COLOUR for r in image] for image in right]
    count = sum(map(sum, right))
    title = f"{label}: {count} of {sum(len(t.boxes) for t in truth)}"
    return Column(title, found, colours)


def visualize(
    dataset: str,
    models: Sequence[Sequence[str]],
    output: str,
    count: int = 3,
    score: float = 0.5,
    opts: Sequence[str] = (),
) -> None:
    """
    Write a grid of images. ValueError, FileNotFoundError, OSError: what cannot be read or written.

    Args:
        dataset: name, registered by the first model's config if it is not yet.
        models: (label, config file, weights file) of each.
        output: PNG to write.
        count: images: those with the most boxes; of equals, the first ones of the set.
        score: smallest score shown.
        opts: overrides [KEY, VALUE, ...] of all configs.
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
    truth = [ground_truth(element) for element in elements]
    colours = [[GROUND_TRUTH_COLOUR] * len(objects.boxes) for objects in truth]
    columns = [Column("ground truth", truth, colours)]
    for (label, _, _), cfg in zip(models, cfgs):
        columns.append(model_column(label, predict(cfg, elements, score), truth))
    names = MetadataCatalog.get(dataset).thing_classes
    if not cv2.imwrite(output, grid(elements, columns, names)):
        raise OSError(f"Could not write {output}.")
