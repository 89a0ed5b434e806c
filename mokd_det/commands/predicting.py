# Copyright (c) The mokd_det authors.
"""``mokd predict``: the work."""

import argparse
import colorsys
import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from .. import compat  # noqa: F401  (first: patches Detectron2 where it needs it)
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn
from torchvision.transforms import functional as F
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks

from ..config import check_device, load_config, split_overrides
from ..data import known_class_names, local_path, read_coco, read_rgb, trained_class_names
from ..data.classification.folders import IMAGE_EXTENSIONS, LeftOut, list_images
from ..engine import validate
from ..files import replace_file
from ..tasks import Task
from ..untrusted import printable

PHOTOS = "photos_to_predict"  # the name under which they are registered
USUAL_THRESHOLD = 0.5
TOP = 5  # classes of a photo
SAID = 10  # photos whose classes are printed
FEW = 32  # photos for which no processes are started


class Photo(NamedTuple):
    """``name``: of its picture in the output folder."""

    path: str
    name: str


def predict(args: argparse.Namespace) -> None:
    """
    Write ``args.output``. ValueError, FileNotFoundError: no photo at a path, weights that do not
    fit, an image that cannot be read.
    """
    paths, opts = split_overrides(args.paths)
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold is {args.threshold}: expected a number in [0, 1].")
    if "://" not in args.weights and not PathManager.isfile(args.weights):
        raise FileNotFoundError(f"--weights '{args.weights}' does not exist.")
    photos = _find(paths, args.output)
    file = os.path.join(args.output, "predictions.json")
    if os.path.exists(file) and not args.overwrite:
        raise ValueError(f"'{file}' is there already: name another --output, or --overwrite it.")
    cfg = load_config(args.config_file, [*opts, "MODEL.WEIGHTS", args.weights])
    task = validate(cfg, is_training=False)
    check_device(cfg)
    is_classifier = cfg.MODEL.META_ARCHITECTURE == "Classifier"
    if is_classifier and args.threshold is not None:
        raise ValueError("--threshold is for detectors, and the config is a classifier's: drop it.")
    if len(photos) < FEW:
        cfg.DATALOADER.NUM_WORKERS = 0
    model = task.load_trained(cfg, "--weights")
    os.makedirs(args.output, exist_ok=True)
    names = trained_class_names(args.weights, "--weights") or known_class_names(cfg) or []
    results = (
        _classify(cfg, task, model, photos, names)
        if is_classifier
        else _detect(cfg, task, model, photos, names, args)
    )
    content = json.dumps(results, indent=1).encode()
    replace_file(file, lambda f: f.write(content))
    if is_classifier and len(results) <= SAID:
        for result in results:
            best = (f"{x['name']} {x['score']:.2f}" for x in result["classes"][:3])
            print(f"{result['file_name']}: {', '.join(best)}")
    least = _least_score(args)
    boxes = f"{len(results)} boxes that score {least:g} or more (--threshold)"
    what = "the five best classes of each" if is_classifier else boxes
    print(f"{len(photos)} photo{'s' * (len(photos) > 1)}, {what}: {file}")


def _least_score(args: argparse.Namespace) -> float:
    return USUAL_THRESHOLD if args.threshold is None else args.threshold


def _find(paths: Sequence[str], output: str) -> list[Photo]:
    photos = []
    for path in paths:
        if os.path.isdir(path):
            if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(path)):
                raise ValueError(
                    f"--output '{output}' is in '{path}', so the next call would find its pictures "
                    "there: name a folder elsewhere."
                )
            files = list_images(path, LeftOut())
            if not files:
                kinds = ", ".join(IMAGE_EXTENSIONS)
                raise FileNotFoundError(f"'{path}' has no image in it ({kinds}).")
            photos += [Photo(file, os.path.relpath(file, path)) for file in files]
        elif os.path.isfile(path):
            photos.append(Photo(path, os.path.basename(path)))
        else:
            raise FileNotFoundError(f"'{path}' does not exist: expected a photo or a folder.")
    if not photos:
        raise ValueError("No PATH is given: name a photo or a folder of photos.")
    names: dict[str, str] = {}
    for file, name in photos:
        if (other := names.setdefault(_picture(name), file)) != file:
            raise ValueError(
                f"'{other}' and '{file}' would have one picture: predict them one after the other, "
                "with another --output each."
            )
        if os.path.realpath(os.path.join(output, _picture(name))) == os.path.realpath(file):
            raise ValueError(f"--output '{output}' has the photo '{file}': name another folder.")
    return photos


def _picture(name: str) -> str:
    """Return the name of a photo's picture; formats that not every viewer has become PNG."""
    return name if name.lower().endswith((".jpg", ".jpeg", ".png")) else f"{name}.png"


@contextlib.contextmanager
def _loader(cfg: CfgNode, task: Task, photos: Sequence[Photo]) -> Iterator[Any]:
    """That of evaluation, over the photos."""
    elements = [
        {"file_name": photo.path, "name": photo.path, "image_id": number, "label": 0}
        for number, photo in enumerate(photos, 1)
    ]
    DatasetCatalog.register(PHOTOS, lambda: elements)
    try:
        yield task.build_test_loader(cfg, PHOTOS)
    finally:
        DatasetCatalog.remove(PHOTOS)
        with contextlib.suppress(KeyError):
            MetadataCatalog.remove(PHOTOS)


def _classify(
    cfg: CfgNode, task: Task, model: nn.Module, photos: Sequence[Photo], names: Sequence[str]
) -> list[dict[str, Any]]:
    results = []
    with _loader(cfg, task, photos) as loader, torch.no_grad():
        for batch in loader:
            for path, scores in zip(batch.names, model(batch).softmax(1).cpu()):
                best = scores.topk(min(TOP, len(scores)))
                classes = [
                    {"class": label, "name": _name(names, label), "score": score}
                    for score, label in zip(best.values.tolist(), best.indices.tolist())
                ]
                results.append({"file_name": path, "classes": classes})
    return results


def _detect(
    cfg: CfgNode,
    task: Task,
    model: nn.Module,
    photos: Sequence[Photo],
    names: Sequence[str],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    pictures = {photo.path: os.path.join(args.output, _picture(photo.name)) for photo in photos}
    least = _least_score(args)
    ids = _category_ids(cfg, names)
    results = []
    best = 0.0
    with _loader(cfg, task, photos) as loader, torch.no_grad():
        for batch in loader:
            for element, outputs in zip(batch, model(batch)):
                if "instances" not in outputs:
                    raise ValueError(
                        f"MODEL.META_ARCHITECTURE '{cfg.MODEL.META_ARCHITECTURE}' finds no objects "
                        "but something else: expected a detector or a classifier."
                    )
                found = outputs["instances"].to("cpu")
                best = max([best, *found.scores.tolist()])
                found = found[found.scores >= least]
                for result in instances_to_coco_json(found, element["image_id"]):
                    label = result["category_id"]
                    result["category_id"] = ids[label] if ids else label
                    result["category_name"] = _name(names, label)
                    results.append({"file_name": element["file_name"], **result})
                picture = pictures[element["file_name"]]
                os.makedirs(os.path.dirname(picture) or ".", exist_ok=True)
                draw(read_rgb(element["file_name"]), found, names).save(picture)
    if others := set(list_images(args.output, LeftOut())) - set(pictures.values()):
        print(f"'{args.output}' has pictures of earlier calls, too: {len(others)}")
    if not results:
        print(f"No box scores {least:g} or more; the highest score is {best:.3g}: see --threshold")
    return results


def _category_ids(cfg: CfgNode, names: Sequence[str]) -> list[int]:
    """Return the ids of classes in the training set's annotations, if it is known here."""
    known = MetadataCatalog.get(next(iter(cfg.DATASETS.TRAIN), PHOTOS))
    label_of = known.get("thing_dataset_id_to_contiguous_id") or {}
    if names and len(label_of) == len(names):
        print(f"category_id is as in '{known.name}'")
        return sorted(label_of, key=label_of.__getitem__)
    files = {name: local_path(file) for name, file, _ in cfg.DATASETS.COCO}
    file = files.get(next(iter(cfg.DATASETS.TRAIN), ""))
    if names and file and os.path.isfile(file):
        by_name = {x.get("name"): x.get("id") for x in read_coco(file)["categories"]}
        if all(isinstance(by_name.get(name), int) for name in names):
            print(f"category_id is as in {file}")
            return [by_name[name] for name in names]
    print("category_id counts the classes from 0: the training set is not known here")
    return []


def _name(names: Sequence[str], label: int) -> str:
    return printable(names[label]) if label < len(names) else str(label)


def _colour(label: int) -> tuple[int, ...]:
    """Return a class's own colour: hues in steps of the golden ratio stay apart."""
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.9, 1))


def draw(image: Image.Image, found: Instances, names: Sequence[str] = ()) -> Image.Image:
    """Return an RGB picture with boxes, names, scores, masks and keypoints drawn on it."""
    if not len(found):
        return image
    canvas: Tensor = F.pil_to_tensor(image)
    if found.has("pred_masks"):
        canvas = draw_segmentation_masks(canvas, found.pred_masks.bool(), alpha=0.4)
    labels = [
        f"{_name(names, label)} {score:.2f}"
        for label, score in zip(found.pred_classes.tolist(), found.scores.tolist())
    ]
    width = max(min(image.size) // 200, 1)
    colours = [_colour(label) for label in found.pred_classes.tolist()]
    canvas = draw_bounding_boxes(canvas, found.pred_boxes.tensor, labels, colours, width=width)
    if found.has("pred_keypoints"):
        canvas = draw_keypoints(canvas, found.pred_keypoints[..., :2], radius=2 * width)
    return F.to_pil_image(canvas)
