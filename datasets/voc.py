# Copyright (c) The mokd_det authors.
"""Pascal-VOC XML to COCO JSON. One reader for every VOC-style folder."""

import json
import logging
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

logger = logging.getLogger(__name__)

Box = tuple[float, float, float, float]

MADE_BY = "made by mokd_det"
# EXIF orientations of an image that lies on its side.
SIDEWAYS = (5, 6, 7, 8)
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc_xml(xml_file: str | Path, image_file: str | Path) -> dict[str, Any]:
    """
    Read one annotation file and check it against its image.

    Args:
        xml_file: a Pascal-VOC annotation.
        image_file: the image that it describes. Its size on disk counts, not the size written in
            the XML; turned as EXIF says, as Detectron2 reads it.

    Returns:
        ``width`` and ``height`` in pixels, and ``objects``, a list of dicts with ``name``, ``box``
        (x0, y0, x1, y1) in absolute pixels with 0 at the image's left or top border, and
        ``difficult`` (bool). VOC counts pixels from 1 and includes the last: the minimum moves by
        one. A box is clipped to the image, and dropped with a warning if nothing of it is left.

    Raises:
        FileNotFoundError: the image is missing.
        ValueError: the XML is broken or lacks a box's numbers; the message names the file.
    """
    xml_file, image_file = Path(xml_file), Path(image_file)
    if not image_file.is_file():
        raise FileNotFoundError(f"{xml_file}: its image {image_file} does not exist.")
    width, height = _size_of(image_file)
    try:
        root = ElementTree.parse(xml_file).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{xml_file} is not well-formed XML: {error}.") from error
    objects = []
    for index, node in enumerate(root.iter("object")):
        name = (node.findtext("name") or "").strip()
        try:
            x0, y0, x1, y1 = (float(node.findtext(f"bndbox/{key}") or "") for key in CORNERS)
        except ValueError as error:
            raise ValueError(
                f"{xml_file}: object {index} ('{name}') needs numbers in "
                "bndbox/xmin, ymin, xmax, ymax."
            ) from error
        if not name:
            raise ValueError(f"{xml_file}: object {index} has no name.")
        box = clip_box((x0 - 1, y0 - 1, x1, y1), width, height) if x1 > x0 and y1 > y0 else None
        if box is None:
            logger.warning(
                f"{xml_file}: dropped box (xmin, ymin, xmax, ymax) = ({x0:g}, {y0:g}, {x1:g}, "
                f"{y1:g}) of '{name}': it is empty or outside the image of {width} x {height}."
            )
            continue
        difficult = (node.findtext("difficult") or "0").strip() == "1"
        objects.append({"name": name, "box": box, "difficult": difficult})
    return {"width": width, "height": height, "objects": objects}


def _size_of(image_file: Path) -> tuple[int, int]:
    with Image.open(image_file) as image:
        width, height = image.size
        # Not by ImageOps.exif_transpose, which would decode every image.
        is_sideways = image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    return (height, width) if is_sideways else (width, height)


def clip_box(box: Box, width: int, height: int) -> Box | None:
    """
    Args:
        box: x0, y0, x1, y1 in absolute pixels.
        width, height: of the image in pixels.

    Returns:
        The part of the box inside the image; None if it has no area.
    """
    x0, y0, x1, y1 = box
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def coco_dict(images: Sequence[dict[str, Any]], class_names: Sequence[str]) -> dict[str, Any]:
    """
    Args:
        images: each with ``file_name`` (relative to the image folder), ``width``,
            ``height`` and ``objects`` as from :func:`read_voc_xml`.
        class_names: in the order of their category ids, which count from 1.

    Returns:
        COCO's JSON; ``difficult`` objects are marked ``iscrowd``, so they are neither trained on
        nor counted as misses.

    Raises:
        ValueError: an object's class is not in ``class_names``.
    """
    ids = {name: index for index, name in enumerate(class_names, start=1)}
    coco: dict[str, Any] = {
        "info": {"description": MADE_BY},
        "categories": [{"id": ids[name], "name": name} for name in class_names],
        "images": [],
        "annotations": [],
    }
    for image_id, image in enumerate(images, start=1):
        coco["images"].append(
            {
                "id": image_id,
                "file_name": image["file_name"],
                "width": image["width"],
                "height": image["height"],
            }
        )
        for item in image["objects"]:
            if item["name"] not in ids:
                raise ValueError(
                    f"{image['file_name']}: class '{item['name']}' is not among {class_names}."
                )
            x0, y0, x1, y1 = item["box"]
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": ids[item["name"]],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": int(item["difficult"]),
                }
            )
    return coco


def check_replaceable(json_file: str | Path) -> None:
    """
    Args:
        json_file: in the folder ``--output``, to be written.

    Raises:
        FileExistsError: there is such a file, and it is none of :func:`coco_dict`.
    """
    try:
        description = json.loads(Path(json_file).read_text())["info"]["description"]
    except FileNotFoundError:
        return
    except (IsADirectoryError, ValueError, KeyError, TypeError):  # whatever it is, it is not ours
        description = None
    if description != MADE_BY:
        raise FileExistsError(
            f"{json_file} exists and was not made by mokd_det (its info.description is not "
            f"'{MADE_BY}'), so it is not overwritten: choose another --output, or move it away."
        )
