# Copyright (c) The mokd_det authors.
"""Images on which the saved predictions of runs differ most."""

import dataclasses
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask

from .runs import Run

IOU = 0.5  # from which on two boxes are the same object, as in AP50
PREFIX = "datasets://"
# What the evaluators write.
DETECTIONS, CLASSES = "coco_instances_results.json", "predictions.json"


@dataclasses.dataclass
class Box:
    """(x, y, width, height) in pixels; ``right``: ground truth has it, or it was found."""

    xywh: tuple[float, float, float, float]
    category: str
    score: float = 1.0
    right: bool = True


@dataclasses.dataclass
class Picture:
    """
    An image beside what the runs say about it.

    Attributes:
        truth: boxes of the ground truth, or the name of the class.
        said: by run: boxes, or (class, probability).
        image: None if it cannot be read; ``problem`` says why.
    """

    name: str
    size: tuple[int, int]
    image: Image.Image | None
    truth: Any
    said: list[Any]
    problem: str = ""


def pictures(
    runs: Sequence[Run], data_set: str, count: int, score: float
) -> tuple[list[Picture], str]:
    """
    Return the images of a data set, at most ``count``, on which the runs differ most (of one run:
    on which it differs from the ground truth), and if there are none, why not.

    Detectors differ by the number of boxes of at least this ``score`` that only one of a pair of
    runs has; classifiers by the probability of the right class.

    Args:
        runs: all with predictions, see :func:`predictions_file`.
    """
    files = [predictions_file(run, data_set) for run in runs]
    if len({file.name for file in files if file}) > 1:
        return [], "Some of the runs are detectors, some classifiers."
    said = [json.loads(file.read_text()) for file in files if file]
    find = _detections if files[0] and files[0].name == DETECTIONS else _classifications
    return find(runs, data_set, said, count, score)


def predictions_file(run: Run, data_set: str) -> Path | None:
    """Return the file in which a run's evaluation has left its predictions; None: there is none."""
    files = [run.folder / "inference" / data_set / name for name in (DETECTIONS, CLASSES)]
    return next((file for file in files if file.is_file()), None)


# ---- detectors -----------------------------------------------------------------------------------


def _detections(runs, data_set, said, count, score):
    source = _coco_source(runs, data_set)
    if source is None:
        return [], f"No config says where the images of '{data_set}' are (DATASETS.COCO)."
    file, root = source
    if not os.path.isfile(file):
        return [], f"'{file}', the annotations of '{data_set}', is not on this machine."
    data = json.loads(Path(file).read_text())
    names = {c["id"]: str(c.get("name", c["id"])) for c in data.get("categories", [])}
    truth = _by_image((a for a in data.get("annotations", []) if not a.get("iscrowd")), names)
    found = [_by_image((p for p in x if p["score"] >= score), names) for x in said]
    if not any(found):
        return [], f"No prediction has a score of {score:g} or more: give a lower --score."
    sides = found if len(found) > 1 else [truth, *found]
    differing = [
        (sum(_difference(a[i["id"]], b[i["id"]]) for a, b in itertools.combinations(sides, 2)), i)
        for i in data["images"]
    ]
    differing = [pair for pair in differing if pair[0]]
    differing.sort(key=lambda pair: -pair[0])
    shown = []
    for _, entry in differing[:count]:
        boxes = [side[entry["id"]] for side in found]
        truth_here = truth[entry["id"]]
        for side in boxes:
            for box, matched in zip(side, _matched(side, truth_here)):
                box.right = matched
        image, problem = _open(root, entry["file_name"])
        size = image.size if image else (entry["width"], entry["height"])
        shown.append(Picture(entry["file_name"], size, image, truth_here, boxes, problem))
    return shown, "" if shown else "The runs say the same about every image."


def _by_image(annotations: Iterable[Mapping], names: Mapping) -> defaultdict[Any, list[Box]]:
    boxes: defaultdict[Any, list[Box]] = defaultdict(list)
    for a in annotations:
        category = names.get(a["category_id"], str(a["category_id"]))
        boxes[a["image_id"]].append(Box(tuple(a["bbox"]), category, a.get("score", 1.0)))
    return boxes


def _difference(first: Sequence[Box], second: Sequence[Box]) -> int:
    """Return how many boxes of two lists the other one does not have."""
    return len(first) + len(second) - 2 * sum(_matched(first, second))


def _matched(boxes: Sequence[Box], others: Sequence[Box]) -> list[bool]:
    """Return which boxes, the surest first, find one of the others that none has found before."""
    if not boxes or not others:
        return [False] * len(boxes)
    boxes_xywh, others_xywh = (np.array([b.xywh for b in x], float) for x in (boxes, others))
    ious = mask.iou(boxes_xywh, others_xywh, [0] * len(others))
    same = np.array([[a.category == b.category for b in others] for a in boxes])
    order = np.argsort([-box.score for box in boxes], kind="stable")
    matched = np.empty(len(boxes), dtype=bool)
    matched[order] = found_once(np.where(same, ious, 0)[order])
    return matched.tolist()


def found_once(ious: np.ndarray) -> np.ndarray:
    """
    Return (N,) bool: which rows of (N, M) IoUs, the surest first, find a column that no row before
    has found.
    """
    ious, found = ious.copy(), np.zeros(len(ious), dtype=bool)
    for i in range(len(ious) if ious.size else 0):
        best = ious[i].argmax()
        found[i] = ious[i, best] >= IOU
        if found[i]:
            ious[:, best] = 0
    return found


def _coco_source(runs: Sequence[Run], data_set: str) -> tuple[str, str] | None:
    """Return the annotation file and image folder of a set of DATASETS.COCO, or Detectron2's."""
    for run in runs:
        for name, file, root in run.options.get("DATASETS.COCO") or []:
            if name == data_set:
                return _local(file), _local(root)
    from .. import compat  # noqa: F401  (first: patches Detectron2 where it needs it)
    from detectron2.data import MetadataCatalog  # here: it needs torch

    metadata = MetadataCatalog.get(data_set)
    if not hasattr(metadata, "json_file"):
        return None
    return metadata.json_file, metadata.image_root


# ---- classifiers ---------------------------------------------------------------------------------


def _classifications(runs, data_set, said, count, score):
    by_name = [{p["name"]: p for p in predictions} for predictions in said]
    shared = [name for name in by_name[0] if all(name in side for side in by_name)]
    right = {name: [_of_right(side[name]) for side in by_name] for name in shared}
    spread = {
        name: max(values) - min(values) if len(values) > 1 else 1 - values[0]
        for name, values in right.items()
    }
    names = sorted((n for n in shared if spread[n] > 0), key=lambda n: -spread[n])[:count]
    if not names:
        return [], "The runs say the same about every image."
    path = _class_source(runs, data_set)
    classes = _class_names(path, by_name[0].values())
    shown = []
    for name in names:
        entries = [side[name] for side in by_name]
        image, problem = _open_classified(path, name)
        pairs = [(classes(e["classes"][0]), e["scores"][0]) for e in entries]
        size = image.size if image else (1, 1)
        truth = classes(entries[0]["label"])
        shown.append(Picture(name, size, image, truth, pairs, problem))
    return shown, ""


def _of_right(prediction: Mapping) -> float:
    """Return the probability of the right class, 0 if it is not among the saved ones."""
    found = dict(zip(prediction["classes"], prediction["scores"]))
    return found.get(prediction["label"], 0.0)


def _class_source(runs: Sequence[Run], data_set: str) -> str:
    """Return the folder or file of a set of DATASETS.CLASSIFICATION; "" if no config has it."""
    builtin = {f"imagenet_{split}": f"{PREFIX}imagenet/{split}" for split in ("train", "val")}
    found = builtin | {
        name: path for run in runs for name, path in run.options.get("DATASETS.CLASSIFICATION", [])
    }
    return _local(found.get(data_set, ""))


def _class_names(path: str, predictions: Iterable[Mapping]):
    """Return a function from a label to the class's name; the number where it is not known."""
    names: dict[int, str] = {}
    if path.endswith(".npz"):
        if os.path.isfile(path):
            with np.load(path) as arrays:
                names = dict(enumerate(map(str, arrays["classes"])))
    else:  # a folder for each class
        names = {p["label"]: p["name"].split(os.sep)[0] for p in predictions}
    return lambda label: names.get(label, f"class {label}")


def _open_classified(path: str, name: str) -> tuple[Image.Image | None, str]:
    if not path.endswith(".npz"):
        return _open(path, name)
    if not os.path.isfile(path):
        return None, f"'{path}' is not on this machine"
    with np.load(path) as arrays:
        return Image.fromarray(arrays["images"][int(name.rsplit("#", 1)[1])]).convert("RGB"), ""


# ---- both ----------------------------------------------------------------------------------------


def _local(path: str) -> str:
    if path.startswith(PREFIX):
        root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
        return os.path.join(root, path[len(PREFIX) :])
    return os.path.expanduser(path)


def _open(root: str, name: str) -> tuple[Image.Image | None, str]:
    """Return an image as a viewer shows it; None and why, if it is not there."""
    path = os.path.realpath(os.path.join(root, name))
    # A page is passed on: no annotation file shall put another file of this machine into it.
    if not path.startswith(os.path.realpath(root) + os.sep):
        return None, f"it is not in '{root}'"
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB"), ""
    except OSError as error:
        return None, error.strerror or str(error)
