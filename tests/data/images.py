# Copyright (c) The mokd_det authors.
"""Small image files of the kinds that people have, good and bad."""

import io
import json
import os
import zlib

import numpy as np
from PIL import Image

SIZE = (12, 8)  # width, height


def pixels(seed=0, size=SIZE):
    """A smooth (H, W, 3) uint8 picture, different in every corner."""
    coarse = np.random.default_rng(seed).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR))


def encoded(suffix="jpg", mode="RGB", orientation=1, size=SIZE, **options):
    """Return the bytes of an image file."""
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(pixels(size=size)).convert(mode)
    file = io.BytesIO()
    format = Image.registered_extensions()[f".{suffix}"]
    if format in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF"):
        options["exif"] = exif
    image.save(file, format, **options)
    return file.getvalue()


def grey(dtype, suffix="png"):
    """Return the bytes of a grey image whose values are over 255."""
    values = (np.arange(SIZE[0] * SIZE[1]).reshape(SIZE[::-1]) * 300).astype(dtype)
    file = io.BytesIO()
    Image.fromarray(values).save(file, Image.registered_extensions()[f".{suffix}"])
    return file.getvalue()


def bomb():
    """Return a PNG that claims to be 30000 x 30000 pixels large."""
    content = bytearray(encoded("png"))
    content[16:24] = (30000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


# By name: (suffix, content, part of the message).
BAD_FILES = {
    "text": ("jpg", b"no image at all", "no image that Pillow knows .it begins with b'no image"),
    "page": ("jpg", b"<!DOCTYPE html><html>", "begins with b'<!DOCTYPE html>"),
    "empty": ("png", b"", "it is empty"),
    "cut jpg": ("jpg", encoded(size=(64, 48))[:-20], "truncated"),
    "cut png": ("png", encoded("png", size=(64, 48))[:-30], "truncated|[Bb]roken|cannot be read"),
    "half jpg": ("jpg", encoded(size=(64, 48))[:500], "truncated|cannot be read"),
    "cut tif": ("tif", encoded("tif", size=(64, 48))[:900], "cannot be read"),
    "bomb": ("png", bomb(), r"cannot be read.*Cut it into tiles, or raise PIL.Image.MAX_IMAGE"),
    "16-bit png": ("png", grey(np.uint16), r"16-bit .*'I;16'.*Convert the images to 8 bit"),
    "16-bit tif": ("tif", grey(np.uint16, "tif"), r"16-bit .*Convert the images to 8 bit"),
    "32-bit tif": ("tif", grey(np.int32, "tif"), r"32-bit grey .*'I'"),
    "float tif": ("tif", grey(np.float32, "tif"), r"it is float .*'F'"),
}
SPECIAL = {"missing": "no such file", "folder": "it is a folder", "pipe": "it is a named pipe"}


def write_bad(folder, name):
    """Write a bad file or a special one; return its path."""
    suffix = BAD_FILES[name][0] if name in BAD_FILES else "jpg"
    path = folder / f"bad.{suffix}"
    if name in BAD_FILES:
        path.write_bytes(BAD_FILES[name][1])
    elif name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    return path


def message_of(name):
    """A pattern for the message about a bad file."""
    return BAD_FILES[name][2] if name in BAD_FILES else SPECIAL[name]


BAD = [*BAD_FILES, *SPECIAL]
EVERY_DECODER = [
    *(("jpg", mode) for mode in ("RGB", "L", "CMYK")),
    *(("png", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
    *(("tif", mode) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK")),
    *((suffix, "RGB") for suffix in ("webp", "bmp", "ppm")),
]


def write_coco(folder, names, size):
    """Write ``set.json`` with one box on each image of a folder; return a name for the set."""
    images = [
        {"id": i, "file_name": name, "width": size[0], "height": size[1]}
        for i, name in enumerate(names, start=1)
    ]
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [2, 2, 20, 20], "area": 400}
        | {"iscrowd": 0}
        for i in range(1, len(names) + 1)
    ]
    coco = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "tree"}]}
    (folder / "set.json").write_text(json.dumps(coco))
    return f"tests_images_{folder.name}"
