# Copyright (c) The mokd_det authors.
"""
The door for annotations in COCO's format: what would make training or evaluation wrong is an error,
what has one meaning is completed, with a warning. Detectron2's loader and both evaluators (its own
and pycocotools) differ on incomplete files, so both are given what this returns.
"""

import contextlib
import gc
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from detectron2.utils.file_io import PathManager

from ..untrusted import is_class_name
from .coco_annotations import check_annotations
from .coco_ids import canonical, check_ids
from .images import ImageError, upright_size
from .report import Report

# Sets up to this size have the headers of their image files read unless told otherwise.
FEW_IMAGES = 5000


def read_coco(json_file: str) -> dict[str, Any]:
    """
    Return the content of a JSON file in COCO's format. ValueError: no UTF-8, no JSON, or no dict
    with ``images`` and ``categories`` at its top. A byte-order mark is skipped.
    """
    with PathManager.open(json_file, "rb") as f, _without_garbage_collection():
        content = f.read()
        try:
            data = json.loads(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{json_file} is not UTF-8 (byte {error.start}: {content[error.start]:#x}): save "
                "it as UTF-8, e.g. iconv -f latin1 -t utf-8."
            ) from error
        except (ValueError, RecursionError) as error:  # also a number of 5,000 digits
            raise ValueError(f"{json_file} is no JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{json_file} has a {type(data).__name__} at its top: expected a dict with images, "
            "annotations and categories (COCO's format)."
        )
    for key in ("images", "annotations", "categories"):
        rows = data.get(key, [] if key == "annotations" else None)
        if not isinstance(rows, list) or not set(map(type, rows)) <= {dict}:
            raise ValueError(
                f"{json_file}: {key!r} is {'missing' if rows is None else 'no list of dicts'}: "
                "expected COCO's format, a dict with lists of images, annotations and categories."
            )
    if not data["categories"]:
        raise ValueError(f"{json_file}: 'categories' is empty: it names the classes.")
    return data


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Millions of small lists make Python look for cycles again and again, in vain."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def check_coco(
    data: dict[str, Any],
    image_root: str | None,
    *,
    training: bool = True,
    masks: str | None = None,
    keypoints: bool = False,
    read_images: bool | None = None,
    broken: str = "error",
) -> tuple[dict[str, Any], Report]:
    """
    Args:
        data: of :func:`read_coco`; it is not changed.
        image_root: folder of the images. None, or an address: the files are not looked at.
        training: annotations are needed; else a set without any is for prediction only.
        masks: ``INPUT.MASK_FORMAT`` of a model that learns masks, "polygon" or "bitmask".
        keypoints: of a model that learns keypoints.
        read_images: read the headers of the image files: their sizes. None: of few images only.
        broken: ``DATASETS.BROKEN_IMAGES``; with "skip", files that cannot be read are warnings.

    Returns:
        the completed data (``data`` itself if nothing had to be completed), with boxes (x, y, w, h)
        in pixels; and the report. After errors the data is of no use.
    """
    with _without_garbage_collection():
        return _check(data, image_root, training, masks, keypoints, read_images, broken == "skip")


def _check(data, image_root, training, masks, keypoints, read_images, skips):
    report = Report()
    categories, category_ids = _check_categories(data, report)
    images, image_ids = _check_images(data["images"], image_root, report, read_images, skips)
    completed = {**data, "categories": categories, "images": images}
    if "annotations" not in data:
        if training:
            report.error("it has no 'annotations': a set to train with needs them")
    elif not report.errors:
        completed["annotations"] = check_annotations(
            data["annotations"],
            images,
            image_ids,
            categories,
            category_ids,
            report,
            training=training,
            masks=masks,
            keypoints=keypoints,
        )
    unchanged = all(completed[key] is value for key, value in data.items())
    return (data if unchanged else completed), report


def class_names(data: dict[str, Any]) -> list[str]:
    """Return the classes in the order in which Detectron2 numbers them: by their ids."""
    return [category["name"] for category in sorted(data["categories"], key=lambda c: c["id"])]


def read_class_names(json_file: str) -> list[str]:
    """Return :func:`class_names` of a file whose annotations are not checked; ValueError: none."""
    data, report = read_coco(json_file), Report()
    categories, _ = _check_categories(data, report)
    report.raise_for_errors(json_file)
    return class_names({"categories": categories})


def with_classes(data: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """
    Return checked data with its classes numbered as in ``names``, of which it may lack some; itself
    if they are numbered so already. ValueError: it has a class that is not among them.
    """
    if class_names(data) == list(names):
        return data
    if unknown := [name for name in class_names(data) if name not in names]:
        raise ValueError(f"the classes {unknown} are not among {list(names)}")
    numbers = {name: number for number, name in enumerate(names, 1)}
    by_name = {category["name"]: category for category in data["categories"]}
    new_ids = {category["id"]: numbers[category["name"]] for category in data["categories"]}
    # Names of keypoints, which all categories share, are needed by those that are added, too.
    some = {k: v for k, v in data["categories"][0].items() if k in ("keypoints", "skeleton")}
    completed = {
        **data,
        "categories": [
            {**some, **by_name.get(name, {}), "id": number, "name": name}
            for name, number in numbers.items()
        ],
    }
    if "annotations" in data:
        completed["annotations"] = [
            {**annotation, "category_id": new_ids[annotation["category_id"]]}
            for annotation in data["annotations"]
        ]
    return completed


def _check_categories(data, report):
    """Return the completed categories, and from ids as they are in the file to those now."""
    categories = data["categories"]
    names = [category.get("name") for category in categories]
    if odd := [c for c in categories if not is_class_name(c.get("name"))]:
        report.error("categories without a name, a text without line ends", odd)
        return categories, None
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        report.error("names of several categories, so that they cannot be told apart", twice)
    categories, ids = check_ids(categories, "categories", report, lambda c: c["name"])
    if report.errors or ids is None:
        return categories, None
    return _without_super_category(categories, data.get("annotations", []), ids, report), ids


def _without_super_category(categories, annotations, ids, report):
    """Some exports name the project as a category of its own, the parent of all others."""
    for parent in categories:
        others = [category for category in categories if category is not parent]
        if others and all(c.get("supercategory") == parent["name"] for c in others):
            used = {ids.get(canonical(annotation.get("category_id"))) for annotation in annotations}
            if parent["id"] not in used:
                names = ", ".join(f"{c['name']} ({c['id']})" for c in others)
                report.warn(
                    f"the category '{parent['name']}' ({parent['id']}) is the parent of all others "
                    f"and has no annotation: it is no class. The classes are {names}"
                )
                return others
    return categories


def _check_images(images, image_root, report, read_images, skips):
    """Return the completed images, and from ids as they are in the file to those now."""
    if not images:
        report.error("it has no images")
        return images, None
    images, ids = check_ids(images, "images", report, lambda image: image.get("file_name"))
    odd = [i for i in images if not isinstance(i.get("file_name"), str) or not i["file_name"]]
    if odd:
        report.error("images without a file_name", [image.get("id") for image in odd])
        return images, ids
    names = [image["file_name"] for image in images]
    if len(set(names)) < len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        report.warn("files of several images", twice)
    if image_root is None or "://" in image_root:
        return _check_sizes(images, None, report), ids
    if missing := _missing_files(names, image_root):
        report.error(f"image files that are not in {os.path.abspath(image_root)}", missing)
        return images, ids
    if read_images is None:
        read_images = len(images) <= FEW_IMAGES

    def size_of(image):
        return upright_size(os.path.join(image_root, image["file_name"]))

    return _check_sizes(images, size_of, report, read_images, skips), ids


def _missing_files(names, image_root):
    """One listing of each folder is faster than to ask for each file."""
    folders: dict[str, set[str]] = {}
    for folder in {os.path.dirname(name) for name in names}:
        path = os.path.join(image_root, folder)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # its files are missing
            folders[folder] = {entry.name for entry in os.scandir(path)}
    return [
        name
        for name in names
        if os.path.basename(name) not in folders.get(os.path.dirname(name), ())
    ]


def _check_sizes(
    images: list[dict[str, Any]],
    size_of: Callable[[dict[str, Any]], tuple[int, int]] | None,
    report: Report,
    read_all: bool = False,
    skips: bool = False,
) -> list[dict[str, Any]]:
    if not read_all and _all_sizes_fine(images):
        return images
    completed: list[dict[str, Any]] = []
    read: list[str] = []
    unread: list[str] = []
    other: list[str] = []
    turned: list[str] = []
    for image in images:
        name = image["file_name"]
        given = _side(image.get("width")), _side(image.get("height"))
        if size_of is None or (None not in given and not read_all):
            if None in given:
                report.error("images without width and height", [name])
            completed.append({**image, "width": given[0], "height": given[1]})
            continue
        size: tuple[int | None, int | None]
        try:
            size = size_of(image)
        except ImageError as error:
            if None in given:
                report.error("images without width and height, which cannot be read", [error])
            unread.append(str(error))
            size = given
        if None in given:
            read.append(name)
        elif given != size:
            (turned if given == size[::-1] else other).append(f"{name} {given}, the file {size}")
        same = (image.get("width"), image.get("height")) == size
        completed.append(image if same else {**image, "width": size[0], "height": size[1]})
    if unread:
        (report.warn if skips else report.error)("image files that cannot be read", unread)
    if read:
        report.warn("images without width and height, which are the file's", read)
    if turned:
        report.error(
            "images with width and height exchanged: their boxes are of the picture before it was "
            "turned as its EXIF data says, as which it is read. Turn boxes or files",
            turned,
        )
    if other:
        report.error("images of another width and height than their file", other)
    changed = any(a is not b for a, b in zip(images, completed))
    return completed if changed else images


def _all_sizes_fine(images):
    sides = [image.get(key) for image in images for key in ("width", "height")]
    return set(map(type, sides)) == {int} and min(sides) > 0


def _side(value: Any) -> int | None:
    """A number of pixels; None if the value is none."""
    value = canonical(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
