# Copyright (c) The mokd_det authors.
"""Pascal-VOC XML to COCO JSON. One reader for every VOC-style folder."""

import json
import logging
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mokd_det.data.images import upright_size
from mokd_det.untrusted import check_class_names

logger = logging.getLogger(__name__)

Box = tuple[float, float, float, float]

MADE_BY = "made by mokd_det"
UNUSABLE = "it is empty, reversed or outside the image"
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc_xml(xml_file: str | Path, image_file: str | Path) -> dict[str, Any]:
    """
    Read one annotation file and check it against its image: :func:`parse_xml` and
    :func:`read_annotation`, with a warning for each box that is dropped.
    """
    xml_file = Path(xml_file)
    record = read_annotation(parse_xml(xml_file), xml_file, image_file)
    for dropped in record["dropped"]:
        logger.warning(f"{xml_file}: dropped box (xmin, ymin, xmax, ymax) = {dropped}: {UNUSABLE}.")
    return record


def parse_xml(xml_file: str | Path) -> ElementTree.Element:
    """Return the root of an XML file; ValueError: it is broken."""
    try:
        return ElementTree.parse(xml_file).getroot()
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # or in unknown encoding
        raise ValueError(f"{xml_file} is not well-formed XML: {error}.") from error


def read_annotation(
    root: ElementTree.Element, xml_file: str | Path, image_file: str | Path
) -> dict[str, Any]:
    """
    Args:
        root: of a Pascal-VOC annotation, which is ``xml_file``.
        image_file: the image that it describes. Its size on disk counts, not the size written in
            the XML; turned as EXIF says, as Detectron2 reads it.

    Returns:
        ``width`` and ``height`` in pixels, and ``objects``, a list of dicts with ``name``, ``box``
        (x0, y0, x1, y1) in absolute pixels with 0 at the image's left or top border, and
        ``difficult`` (bool). VOC counts pixels from 1 and includes the last: the minimum moves by
        one. A box is clipped to the image, and dropped if nothing of it is left.

        What is wrong, as strings: ``dropped`` and ``clipped`` (by two pixels or more) boxes, names
        of the ``lost`` objects, and ``resized``, empty if the size in the XML is the image's.

    Raises:
        FileNotFoundError: the image is missing.
        ValueError: the image cannot be read, lies on its side by EXIF and was annotated so, or
            the XML lacks a box's numbers; the message names the file.
    """
    xml_file, image_file = Path(xml_file), Path(image_file)
    if not image_file.is_file():
        raise FileNotFoundError(f"{xml_file}: its image {image_file} does not exist.")
    width, height = upright_size(str(image_file))
    record: dict[str, Any] = {"width": width, "height": height, "objects": []}
    record |= {"dropped": [], "clipped": [], "lost": []}
    record["resized"] = _check_size(root, xml_file, image_file, width, height)
    for index, node in enumerate(root.iter("object")):
        name = (node.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"{xml_file}: object {index} has no name.")
        check_class_names([name], str(xml_file))
        x0, y0, x1, y1 = _read_corners(node, f"{xml_file}: object {index} ('{name}')")
        box = clip_box((x0 - 1, y0 - 1, x1, y1), width, height) if x1 > x0 and y1 > y0 else None
        described = f"({x0:g}, {y0:g}, {x1:g}, {y1:g}) of '{name}'"
        if box is None:
            record["lost"].append(name)
            record["dropped"].append(described)
            continue
        if min(x0, y0, width - x1, height - y1) <= -2:
            record["clipped"].append(described)
        difficult = (node.findtext("difficult") or "0").strip() == "1"
        record["objects"].append({"name": name, "box": box, "difficult": difficult})
    return record


def _read_corners(node: ElementTree.Element, what: str) -> Box:
    try:
        x0, y0, x1, y1 = (float(node.findtext(f"bndbox/{key}") or "") for key in CORNERS)
        if not all(map(math.isfinite, (x0, y0, x1, y1))):
            raise ValueError("not finite")
    except ValueError as error:
        raise ValueError(f"{what} needs numbers in bndbox/xmin, ymin, xmax, ymax.") from error
    return x0, y0, x1, y1


def _check_size(
    root: ElementTree.Element, xml_file: Path, image_file: Path, width: int, height: int
) -> str:
    """Return how the size in an XML file differs from the image's, "" if it does not."""
    try:
        written = tuple(
            int(float(root.findtext(f"size/{key}") or 0)) for key in ("width", "height")
        )
    except (ValueError, OverflowError):
        return "no number"
    if 0 in written or written == (width, height):  # some programs write zeros
        return ""
    if width != height and written == (height, width):
        with Image.open(image_file) as image:
            if image.size == written:
                raise ValueError(
                    f"{xml_file}: its boxes are of {image_file} as it lies, {written[0]} x "
                    f"{written[1]}, but its EXIF data turn it to {width} x {height} wherever it is "
                    "read: take the orientation out of the image's EXIF data."
                )
    return f"{written[0]} x {written[1]}, but {image_file} is {width} x {height}"


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


def is_ours(json_file: str | Path) -> bool:
    """Return whether a file is one of :func:`coco_dict`."""
    try:
        return json.loads(Path(json_file).read_text())["info"]["description"] == MADE_BY
    except (IsADirectoryError, ValueError, KeyError, TypeError):  # whatever it is, it is not ours
        return False


def check_replaceable(json_file: str | Path) -> None:
    """
    Args:
        json_file: in the folder ``--output``, to be written.

    Raises:
        FileExistsError: there is such a file, and it is none of :func:`coco_dict`.
    """
    if Path(json_file).exists() and not is_ours(json_file):
        raise FileExistsError(
            f"{json_file} exists and was not made by mokd_det (its info.description is not "
            f"'{MADE_BY}'), so it is not overwritten: choose another --output, or move it away."
        )
