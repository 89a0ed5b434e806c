# Copyright (c) The mokd_det authors.
"""
Reading image files: one door for detectors and classifiers. What is wrong with a file is an
:class:`ImageError` that names it, and ``DATASETS.BROKEN_IMAGES`` says what happens then.
"""

import contextlib
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..untrusted import printable
from .report import Report

logger = logging.getLogger(__name__)

BROKEN_IMAGES = ("error", "skip")

REPAIR = "Repair or remove it, or set DATASETS.BROKEN_IMAGES to 'skip'."
TO_8_BIT = (
    "Its values would be clipped to 255, that is to white. Convert the images to 8 bit first, by "
    "the range that your data use."
)
# EXIF orientations of an image that lies on its side.
SIDEWAYS = (5, 6, 7, 8)
SPECIAL_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class ImageError(ValueError):
    """An image that cannot be used; the message names the file, the reason and the remedy."""

    def __init__(self, message: str):
        # torch's DataLoader raises a worker's error again with its traceback as the message.
        if message.startswith("Caught "):
            message = message.rpartition(f"{type(self).__name__}: ")[2].strip()
        super().__init__(message)

    @classmethod
    def of(cls, file_name: str, reason: object, remedy: str = REPAIR) -> "ImageError":
        """Return the error of a file that cannot be read for a reason."""
        return cls(f"The image {printable(f'{file_name} cannot be read: {reason}')}. {remedy}")


class BrokenImages:
    """What happens with images that cannot be read: ``DATASETS.BROKEN_IMAGES``."""

    def __init__(self, action: str):
        """``action`` is "error" or "skip"."""
        self.skips = action == "skip"
        # Of all worker processes together.
        self._skipped = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def skipped(self) -> int:
        """Images that could not be read so far, in this process and its workers."""
        return int(self._skipped)

    def handle(self, error: ImageError) -> None:
        """Raise the error; or count it, and tell of the 1st, 2nd, 4th, 8th ... one."""
        if not self.skips:
            raise error
        self._skipped += 1
        if (count := self.skipped).bit_count() == 1:
            logger.warning(f"Skipped {count} unreadable images so far, the last: {error}")


@contextlib.contextmanager
def opened(file_name: str) -> Iterator[Image.Image]:
    """
    Open an image file, of which PIL has read the header only. ImageError: no image, one that does
    not fit into 8 bits, or whatever goes wrong while the caller decodes it.
    """
    try:
        _refuse_special(file_name)
        with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                what = "float" if image.mode == "F" else "16-bit or 32-bit grey"
                reason = f"it is {what} (Pillow's mode '{image.mode}')"
                raise ImageError.of(file_name, reason, TO_8_BIT)
            yield image
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError.of(file_name, "there is no such file") from error
    except UnidentifiedImageError as error:
        raise ImageError.of(file_name, _begins_with(file_name)) from error
    except Image.DecompressionBombError as error:
        remedy = "Cut it into tiles, or raise PIL.Image.MAX_IMAGE_PIXELS in your own start script."
        raise ImageError.of(file_name, f"{error}".rstrip("."), remedy) from error
    except Exception as error:  # decoders raise everything from struct.error to IndexError
        raise ImageError.of(file_name, f"{error}".rstrip(".") or repr(error)) from error


def read_rgb(file_name: str) -> Image.Image:
    """
    Return the RGB PIL image of a file, turned as EXIF says; transparency is dropped, as Detectron2
    and torchvision do. ImageError: see :func:`opened`.
    """
    with opened(file_name) as image:
        return upright(image).convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Return a PIL image turned as its EXIF data say; itself if there is nothing to turn."""
    return image if orientation_of(image) == 1 else ImageOps.exif_transpose(image)


def orientation_of(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 (upright) to 8, of a PIL image."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as Detectron2: damaged EXIF data turn nothing
        return 1
    return orientation if orientation in range(1, 9) else 1


def check_header(file_name: str) -> None:
    """Raise ImageError for what the header of a file shows."""
    with opened(file_name):
        pass


def check_for_detector(file_name: str, decode: bool = False) -> None:
    """
    Raise ImageError for a file that Detectron2 would read wrongly, or wait for without end; with
    ``decode`` also for one whose header is fine, but not the rest.
    """
    with opened(file_name) as image:
        _refuse_turned_tiff(image, file_name)
        if decode:
            image.convert("RGB")


def upright_size(file_name: str) -> tuple[int, int]:
    """
    Return width and height of an image as Detectron2 reads it, by the header of most kinds of
    files; ImageError: see :func:`check_for_detector`.
    """
    with opened(file_name) as image:
        _refuse_turned_tiff(image, file_name)
        width, height = image.size
        return (height, width) if orientation_of(image) in SIDEWAYS else (width, height)


def _refuse_turned_tiff(image: Image.Image, file_name: str) -> None:
    """Pillow turns TIFF files itself, and Detectron2 then turns them once more."""
    if image.format == "TIFF" and orientation_of(image) != 1:
        reason = "it is a TIFF file that EXIF turns, which Detectron2 would turn twice"
        raise ImageError.of(file_name, reason, "Save it upright.")


def check_images(
    file_names: Iterable[str],
    report: Report,
    check: Callable[[str], Any] = check_for_detector,
    broken: str = "error",
) -> None:
    """
    Add to a report which images cannot be used.

    Args:
        check: raises ImageError: :func:`check_for_detector`, :func:`check_header` or, to decode
            them for some ms each, :func:`read_rgb`.
        broken: ``DATASETS.BROKEN_IMAGES``; with "skip" they are warnings.
    """
    errors = []
    for file_name in file_names:
        try:
            check(file_name)
        except ImageError as error:
            errors.append(error)
    if errors:
        add = report.warn if broken == "skip" else report.error
        add("images cannot be used", errors)


def vanishes(height: int, width: int, short_edge: int, longest_edge: int) -> bool:
    """Return whether Detectron2's ``ResizeShortestEdge`` rounds a side of an image to 0 pixels."""
    # Upstream's own arithmetic.
    return min(T.ResizeShortestEdge.get_output_shape(height, width, short_edge, longest_edge)) < 1


def _refuse_special(file_name: str) -> None:
    """Opening a named pipe would wait for ever."""
    if "://" in file_name:  # a handler of PathManager's, which looks itself
        return
    kind = stat.S_IFMT(os.stat(file_name).st_mode)
    if kind != stat.S_IFREG:
        raise ImageError.of(file_name, f"it is {SPECIAL_FILES.get(kind, 'special')}, no file")


def _begins_with(file_name: str) -> str:
    with PathManager.open(file_name, "rb") as file:
        start = file.read(24)
    return (
        f"it is no image that Pillow knows (it begins with {start!r})" if start else "it is empty"
    )
