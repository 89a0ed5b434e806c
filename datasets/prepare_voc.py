#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Any VOC-style folder to COCO JSON, and the lines that make a config use it.

    python datasets/prepare_voc.py --root /path/to/VOC2007 --name my_set

reads Annotations/*.xml, JPEGImages/ and ImageSets/Main/*.txt (each list there becomes a split, but
for VOC's lists of one class; without that folder there is one split, "all") and writes
my_set/<split>.json into $DETECTRON2_DATASETS (./datasets by default). Images stay where they are;
my_set/images is a link to their folder. A box that is empty or outside its image is dropped with a
warning; a broken XML or a missing image is an error. Objects marked difficult become COCO's
iscrowd: they are not trained on, and missing them costs nothing.
"""

import argparse
import json
import logging
from pathlib import Path

from mokd_det.data.paths import datasets_root
from voc import check_replaceable, coco_dict, read_voc_xml

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")


def prepare(
    root,
    output,
    splits=None,
    classes=None,
    annotations="Annotations",
    images="JPEGImages",
    image_sets="ImageSets/Main",
):
    """
    Args:
        root (str or Path): the VOC-style folder.
        output (str or Path): folder for ``<split>.json`` and ``images``, a link to the images.
        splits (list[str]): lists of ``image_sets`` to convert. None: all of them, without VOC's
            lists of a single class (``<class>_<split>.txt`` beside ``<split>.txt``).
        classes (list[str]): names in the order of their ids. None: those found, sorted.
        annotations, images, image_sets (str): folders inside ``root``.

    Returns:
        dict: ``classes``, ``image_root`` and, by split, ``images`` and ``boxes``.

    Raises:
        FileNotFoundError: a folder, list, annotation or image is missing.
        FileExistsError: ``output`` has its own ``images`` or ``<split>.json`` already.
        ValueError: no list, broken XML, an image listed twice, or a class that is not in
            ``classes``.
    """
    root, output = Path(root), Path(output)
    annotation_folder, image_folder = root / annotations, root / images
    for folder in (annotation_folder, image_folder):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist: is {root} a VOC-style folder?")
    files = {f.stem: f for f in image_folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES}

    split_names = _read_splits(root / image_sets, annotation_folder, splits)
    for split in split_names:
        check_replaceable(output / f"{split}.json")
    split_images = {}
    for split, names in split_names.items():
        split_images[split] = []
        for name in names:
            xml = annotation_folder / f"{name}.xml"
            if not xml.is_file():
                raise FileNotFoundError(f"{xml} does not exist, but split '{split}' lists it.")
            if name not in files:
                raise FileNotFoundError(f"{xml}: there is no image {image_folder / name}.*")
            record = read_voc_xml(xml, files[name])
            split_images[split].append({"file_name": files[name].name, **record})
    if classes is None:
        found = {
            o["name"] for records in split_images.values() for r in records for o in r["objects"]
        }
        classes = sorted(found)

    # Everything is converted before anything is written: an error leaves the old files alone.
    converted = {split: coco_dict(records, classes) for split, records in split_images.items()}
    output.mkdir(parents=True, exist_ok=True)
    _link(output / "images", image_folder)
    for split, coco in converted.items():
        (output / f"{split}.json").write_text(json.dumps(coco))
    counts = {
        split: {"images": len(coco["images"]), "boxes": len(coco["annotations"])}
        for split, coco in converted.items()
    }
    return {"classes": classes, "image_root": str(image_folder.resolve()), "splits": counts}


def _link(link, folder):
    target = folder.resolve()  # before anything changes: it may be behind the link itself
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        if link.samefile(folder):  # the images' folder is called that, and has the JSON beside it
            return
        raise FileExistsError(f"{link} exists and is no link: choose another --output.")
    link.symlink_to(target, target_is_directory=True)


def _read_splits(folder, annotation_folder, splits):
    if not folder.is_dir():
        if splits:
            raise FileNotFoundError(f"{folder} does not exist, so there are no splits {splits}.")
        return {"all": sorted(f.stem for f in annotation_folder.glob("*.xml"))}
    lists = {f.stem: f for f in sorted(folder.glob("*.txt"))}
    if splits is None:
        of_a_class = [n for n in lists if any(n.endswith(f"_{split}") for split in lists)]
        splits = [name for name in lists if name not in of_a_class]
        if not splits:
            raise ValueError(
                f"{folder} has no list (.txt) to make a split of, and no --splits names one: give "
                "the folder of the lists by --image-sets."
            )
        if of_a_class:
            logger.info(
                f"{folder}: left out {', '.join(of_a_class)} as lists of one class; --splits "
                "converts the lists that it names."
            )
    result = {}
    for split in splits:
        if split not in lists:
            raise FileNotFoundError(
                f"{folder / split}.txt does not exist; there are {', '.join(lists) or 'no lists'}."
            )
        # VOC's lists of a class have a second column.
        names = [line.split()[0] for line in lists[split].read_text().splitlines() if line.strip()]
        if len(set(names)) < len(names):
            raise ValueError(f"{lists[split]} lists an image twice.")
        result[split] = names
    return result


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
    parser.add_argument("--splits", nargs="+", help="lists to convert (all but those of a class)")
    parser.add_argument("--classes", nargs="+", help="in the order of their ids")
    parser.add_argument("--annotations", default="Annotations")
    parser.add_argument("--images", default="JPEGImages")
    parser.add_argument("--image-sets", default="ImageSets/Main")
    args = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    output = args.output or datasets_root() / args.name
    result = prepare(
        args.root,
        output,
        args.splits,
        args.classes,
        args.annotations,
        args.images,
        args.image_sets,
    )
    (Path(output) / "summary.json").write_text(json.dumps(result, indent=2))
    print(json.dumps(result["splits"], indent=2))
    print("\nIn your config:\n" + config_lines(args.name, output, result))


if __name__ == "__main__":
    main()
