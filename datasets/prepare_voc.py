#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Any VOC-style folder to COCO JSON, and the lines that make a config use it.

    python datasets/prepare_voc.py --root /path/to/VOC2007 --name my_set

reads Annotations/**.xml, JPEGImages/ and ImageSets/Main/*.txt (each list there becomes a split, but
for VOC's lists of one class; without that folder there is one split, "all"). Or images and XML
files side by side in one folder; or folders of splits (train/, valid/, test/, as Roboflow exports
them), which all get the same classes. It writes my_set/<split>.json into $DETECTRON2_DATASETS
(./datasets by default). Images stay where they are; my_set/images is a link to their folder. A
further split in the same folder gets the classes of those that are there.

An image is the one with the XML's name; if several have it, or none, the one that <filename> names.
Boxes that are empty or outside their image are dropped, counted and named; a broken XML or a
missing image is an error. Objects marked difficult become COCO's iscrowd: they are not trained on,
and missing them costs nothing.
"""

import argparse
import json
import logging
from pathlib import Path

from mokd_det.command_line import add_debug, errors_as_messages
from mokd_det.data.classification.folders import names_alike
from mokd_det.data.paths import datasets_root
from mokd_det.data.report import Report
from mokd_det.untrusted import check_file_name
from voc import check_replaceable, coco_dict, is_ours, parse_xml, read_annotation
from voc_folders import open_voc

logger = logging.getLogger(__name__)


def prepare(
    root,
    output,
    splits=None,
    classes=None,
    annotations=None,
    images=None,
    image_sets="ImageSets/Main",
):
    """
    Args:
        root (str or Path): the VOC-style folder, see :func:`voc_folders.open_voc`.
        output (str or Path): folder for ``<split>.json`` and ``images``, a link to the images.
        splits (list[str]): lists of ``image_sets``, or folders, to convert. None: all of them,
            without VOC's lists of a single class (``<class>_<split>.txt`` beside ``<split>.txt``).
        classes (list[str]): names in the order of their ids. None: those of the splits that are in
            ``output`` already, else those found, sorted.
        annotations, images, image_sets (str): folders inside ``root``.

    Returns:
        dict: ``classes``, ``image_root`` and, by split, ``images`` and ``boxes``.

    Raises:
        FileNotFoundError: a folder, list, annotation or image is missing.
        FileExistsError: ``output`` has its own ``images`` or ``<split>.json`` already, or other
            splits, whose images lie elsewhere.
        ValueError: no list, broken XML or image, an image listed twice or not to be told from
            another, no usable box (of a class), or a class that is not in ``classes``.
    """
    root, output = Path(root), Path(output)
    image_folder, folders = open_voc(root, splits, annotations, images, image_sets)
    for split in folders:
        check_replaceable(output / f"{split}.json")
    _check_link(output / "images", image_folder)
    records, report = _read(image_folder, folders)
    report.raise_for_errors(str(root))
    classes = _choose_classes(classes, records, output)
    # Everything is converted before anything is written: an error leaves the old files alone.
    converted = {split: coco_dict(images, classes) for split, images in records.items()}
    for warning in report.warnings:
        logger.warning(f"{root}: {warning}")
    output.mkdir(parents=True, exist_ok=True)
    _link(output / "images", image_folder)
    for split, coco in converted.items():
        (output / f"{split}.json").write_text(json.dumps(coco))
    counts = {
        split: {"images": len(coco["images"]), "boxes": len(coco["annotations"])}
        for split, coco in converted.items()
    }
    return {"classes": classes, "image_root": str(image_folder.resolve()), "splits": counts}


def check(root, splits=None, annotations=None, images=None, image_sets="ImageSets/Main"):
    """
    Check a folder as :func:`prepare` does, with the same arguments, and write nothing.

    Returns:
        Report
    """
    try:
        return _read(*open_voc(Path(root), splits, annotations, images, image_sets))[1]
    except (ValueError, FileNotFoundError) as error:
        return Report(errors=[str(error)])


def _read(image_folder, folders):
    """Return the images of each split, and a report on them."""
    report = Report()
    records = {
        split: _read_split(folder, split, image_folder, report) for split, folder in folders.items()
    }
    _check_boxes([record for split in records.values() for record in split], report)
    return records, report


def _read_split(folder, split, image_folder, report):
    """Return the images of a split for :func:`coco_dict`, and report on names that do not fit."""
    records, used, disagree = [], {}, []
    for xml_file in folder.splits[split]:
        element = parse_xml(xml_file)
        file_name = element.findtext("filename") or ""
        image, agrees = folder.find_image(xml_file, file_name)
        if image in used:
            raise ValueError(f"{xml_file} and {used[image]} are both of {image}: remove one.")
        used[image] = xml_file
        if not agrees:
            disagree.append(f"{xml_file} names '{file_name}'")
        record = read_annotation(element, xml_file, image)
        name = image.relative_to(image_folder).as_posix()
        records.append({"file_name": name, "xml_file": xml_file, **record})
    if not records:
        report.error(f"split '{split}' has no annotation file")
    if disagree:
        report.warn(f"{split}: the image of the XML's name is taken, not <filename>'s", disagree)
    left_out = [path for path in folder.images.paths if path not in used]
    if left_out and not folder.has_lists:
        report.warn(f"{split}: images without an XML file are left out", left_out)
    return records


def _check_boxes(records, report):
    for key, message in (
        ("dropped", "boxes are dropped, which are empty, reversed or outside their image"),
        ("clipped", "boxes are cut at the border of their image"),
    ):
        # A file may be in several lists.
        cases = dict.fromkeys(f"{r['xml_file']}: {case}" for r in records for case in r[key])
        if cases:
            report.warn(message, cases)
    resized = dict.fromkeys(f"{r['xml_file']}: {r['resized']}" for r in records if r["resized"])
    if resized:
        report.warn("XML files give another size than their image has: do the boxes fit?", resized)
    boxes = [o["box"] for r in records for o in r["objects"]]
    kept = {o["name"] for r in records for o in r["objects"]}
    if lost := sorted({name for r in records for name in r["lost"]} - kept):
        report.error("classes have empty, reversed or outside boxes only", lost)
    elif records and not boxes:
        report.error("no XML file has an object")
    elif boxes and all(max(box) <= 1 for box in boxes):
        report.error("all boxes are within one pixel: VOC's are in pixels, not parts of the image")
    if alike := names_alike(sorted(kept)):
        report.warn("classes differ in capitals or spaces only", alike)


def _choose_classes(classes, records, output):
    """Return the order of the classes, which is one for all splits in a folder."""
    found = sorted({o["name"] for split in records.values() for r in split for o in r["objects"]})
    for file in sorted(output.glob("*.json")):
        if file.stem in records or not is_ours(file):
            continue
        there = [category["name"] for category in json.loads(file.read_text())["categories"]]
        if (classes and list(classes) != there) or not set(found) <= set(there):
            raise ValueError(
                f"{file} has the classes {', '.join(there)}, and {', '.join(records)} would get "
                f"{', '.join(classes or found)}, so that class ids would mean different things. "
                "Convert all splits by one command, with --classes if some lack a class, or choose "
                "another --output."
            )
        classes = there
    return list(classes or found)


def _check_link(link, folder):
    """Raise FileExistsError if ``link`` is anything but a link to this folder, or to nowhere."""
    if link.exists() and not link.samefile(folder):
        if not link.is_symlink():
            raise FileExistsError(f"{link} exists and is no link: choose another --output.")
        raise FileExistsError(
            f"{link} is a link to {link.resolve()}, where the sets beside it have their images, "
            f"and not to {folder}: choose another --output, with --classes for one order of the "
            "classes. DATASETS.TRAIN takes several sets."
        )


def _link(link, folder):
    if not link.exists():
        link.unlink(missing_ok=True)  # to a folder that has moved
        link.symlink_to(folder.resolve(), target_is_directory=True)


def config_lines(name, output, result):
    """Return the lines of a config that use the converted set, as a string."""
    output = Path(output).resolve()
    if output.parent == datasets_root().resolve():
        output = f"datasets://{output.name}"
    lines = ["DATASETS:", "  COCO:"]
    for split in result["splits"]:
        lines.append(f'    - ["{name}_{split}", "{output}/{split}.json", "{output}/images"]')
    lines.append(f"# classes: {', '.join(result['classes'])}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", required=True, help="the VOC-style folder")
    parser.add_argument("--name", required=True, help="of the data set, for config and folder")
    parser.add_argument("--output", help="folder to write (default: <datasets>/<name>)")
    parser.add_argument("--splits", nargs="+", help="lists or folders to convert (all)")
    parser.add_argument("--classes", nargs="+", help="in the order of their ids")
    parser.add_argument("--annotations", help="folder (Annotations)")
    parser.add_argument("--images", help="folder (JPEGImages)")
    parser.add_argument("--image-sets", default="ImageSets/Main")
    add_debug(parser)
    args = parser.parse_args()
    with errors_as_messages(args.debug):
        convert(args)


def convert(args):
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    output = Path(args.output or datasets_root() / args.name)
    parts = args.annotations, args.images, args.image_sets
    check_file_name(args.name, "--name")
    result = prepare(args.root, output, args.splits, args.classes, *parts)
    (output / "summary.json").write_text(json.dumps(result, indent=2))
    print(json.dumps(result["splits"], indent=2))
    print("\nIn your config:\n" + config_lines(args.name, output, result))


if __name__ == "__main__":
    main()
