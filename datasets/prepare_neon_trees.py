#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
NEON tree crowns: four aerial RGB photos (10 cm a pixel) with 951 boxes of class Tree, as tiles in
COCO format. The photos come from the package `deepforest` (MIT licence), which is downloaded but
not installed.

    python datasets/prepare_neon_trees.py

writes neon_trees/{train,val,test}/*.png and neon_trees/{train,val,test}.json into
$DETECTRON2_DATASETS (./datasets by default).
"""

import argparse
import json
import re
from pathlib import Path

from PIL import Image

from mokd_det.command_line import add_debug, errors_as_messages, positive
from mokd_det.data.paths import datasets_root
from mokd_det.files import replace_file
from packages import fetch_from_package
from tiling import objects_in_window, tile_windows
from voc import check_replaceable, coco_dict, read_voc_xml

PACKAGE = "deepforest==2.1.0"
FILES = {
    "deepforest/data/2019_YELL_2_528000_4978000_image_crop2.png": (
        "a9bdb0f4447fdd899d22f567e0e20ba8320c5413b2ad0cd0ac8d9f3b6e0f9767"
    ),
    "deepforest/data/2019_YELL_2_528000_4978000_image_crop2.xml": (
        "bd431af6a5086d721eb731b22f5ea28cd8a8eab06883efc1c665391acbc68e11"
    ),
    "deepforest/data/2019_YELL_2_541000_4977000_image_crop.png": (
        "178e58a23cc2642226a364a30f71bd9258ddc1b012c826f12250914a90c7a131"
    ),
    "deepforest/data/2019_YELL_2_541000_4977000_image_crop.xml": (
        "cefe4b96888bacbf8af1674f000082e549aa707aa6590d545effb23e43f26631"
    ),
    "deepforest/data/OSBS_029.png": (
        "d9477c6a00e4902c7bee487d4c5582c3b8b9a2f77f3908a29628b816b291e6ee"
    ),
    "deepforest/data/OSBS_029.xml": (
        "1f68c4011d7b351c29ca755072e77f3d16e6fd1f995bd05a9dd4eb952b55373c"
    ),
    "deepforest/data/SOAP_061.png": (
        "256508f1a62149bec4a80879077a865caf50e8cace095e6564c76befa480d424"
    ),
    "deepforest/data/SOAP_061.xml": (
        "4833280af75fd9c47965a93e38945282835e9e725cac412bdb9469d63480947c"
    ),
    "deepforest-2.1.0.dist-info/licenses/LICENSE": (
        "5487293ab54d4861d41b5f51622b236f610def978abf6d88091f74559232ab14"
    ),
}
# One scene is in one split only, so no pixel is in two.
SPLITS = {
    "train": ["2019_YELL_2_528000_4978000_image_crop2"],
    "val": ["2019_YELL_2_541000_4977000_image_crop"],
    "test": ["OSBS_029", "SOAP_061"],
}


def prepare(output, size=256, stride=192, min_visible=0.4):
    """
    Args:
        output (str or Path): folder to write.
        size (int): of a tile, in pixels.
        stride (int): between training tiles, in pixels. Evaluation tiles never overlap.
        min_visible (float): share of a box's area that must be in a tile.

    Returns:
        dict[str, dict]: images and boxes per split.

    Raises:
        FileExistsError: a split's folder or JSON file in ``output`` is not of this script.
    """
    if not 0 < min_visible <= 1:
        raise ValueError(f"--min-visible is {min_visible}: expected a number > 0, up to 1.")
    output = Path(output)
    old_tiles = {split: _old_tiles(output, split) for split in SPLITS}
    photos = output / "photos"
    fetch_from_package(PACKAGE, FILES, photos)

    summary = {}
    for split, scenes in SPLITS.items():
        folder = output / split
        for tile in old_tiles[split]:  # those of another size must not stay behind
            tile.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        tiles = []
        for scene in scenes:
            photo = photos / f"{scene}.png"
            annotation = read_voc_xml(photos / f"{scene}.xml", photo)
            for item in annotation["objects"]:
                item["name"] = "Tree"  # a few crowns of SOAP_061 are called Dead
            with Image.open(photo) as image:
                pixels = image.convert("RGB")
            windows = tile_windows(*pixels.size, size, stride if split == "train" else size)
            for window in windows:
                name = f"{scene}_{window[0]}_{window[1]}.png"
                pixels.crop(window).save(folder / name)
                tiles.append(
                    {
                        "file_name": name,
                        "width": window[2] - window[0],
                        "height": window[3] - window[1],
                        "objects": objects_in_window(annotation["objects"], window, min_visible),
                    }
                )
        coco = coco_dict(tiles, ["Tree"])
        content = json.dumps(coco).encode()
        replace_file(str(output / f"{split}.json"), lambda f, content=content: f.write(content))
        summary[split] = {"images": len(coco["images"]), "boxes": len(coco["annotations"])}
    return summary


def _old_tiles(output, split):
    """Return the files of an earlier run; FileExistsError if there is anything else."""
    check_replaceable(output / f"{split}.json")
    scenes = "|".join(map(re.escape, SPLITS[split]))
    folder = output / split
    tiles = sorted(folder.iterdir()) if folder.exists() else []
    for tile in tiles:
        if not re.fullmatch(rf"({scenes})_\d+_\d+\.png", tile.name) or not tile.is_file():
            raise FileExistsError(
                f"{tile} is no tile of this script, which replaces all in {folder}: choose "
                "another --output, or move it away."
            )
    return tiles


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default=str(datasets_root() / "neon_trees"))
    parser.add_argument(
        "--size", type=positive, default=256, help="of a tile in pixels (%(default)s)"
    )
    parser.add_argument(
        "--stride", type=positive, default=192, help="between training tiles, pixels (%(default)s)"
    )
    parser.add_argument(
        "--min-visible", type=float, default=0.4, help="share of a box in a tile (%(default)s)"
    )
    add_debug(parser)
    args = parser.parse_args()
    with errors_as_messages(args.debug):
        summary = prepare(args.output, args.size, args.stride, args.min_visible)
        print(json.dumps({"output": args.output, **summary}, indent=2))


if __name__ == "__main__":
    main()
