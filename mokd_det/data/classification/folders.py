# Copyright (c) The mokd_det authors.
"""Looking through a folder of class folders: what is a class, an image, or neither."""

import dataclasses
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS as TORCHVISIONS

# As torchvision's, and what has come since where Pillow reads it.
IMAGE_EXTENSIONS = tuple(
    extension
    for extension in (*TORCHVISIONS, ".jfif", ".jpe", ".avif")
    if extension in Image.registered_extensions()
)
# Of operating systems and network drives, in lower case; besides all that begins with a dot, as
# .DS_Store, .ipynb_checkpoints and macOS's "._photo.jpg".
SYSTEM_NAMES = (
    "__macosx",
    "__pycache__",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "desktop.ini",
    "ehthumbs.db",
    "lost+found",
    "system volume information",
    "thumbs.db",
)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is the system's, and so neither an image nor a class."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def class_folders(path: str) -> list[str]:
    """Return the names of a folder's folders but the hidden ones, sorted: the classes."""
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not is_hidden(e.name))


def names_alike(classes: Sequence[str]) -> list[str]:
    """Return the classes of each spelling, as "cat and Cat", that capitals or spaces part only."""
    by_spelling: dict[str, list[str]] = {}
    for name in classes:
        spelling = unicodedata.normalize("NFKC", name).strip().casefold()
        by_spelling.setdefault(spelling, []).append(name)
    return [" and ".join(names) for names in by_spelling.values() if len(names) > 1]


def images_beside(path: str) -> list[str]:
    """Return the names of the images in a folder itself, beside the folders of classes."""
    with os.scandir(path) as entries:
        files = [e.name for e in entries if not is_hidden(e.name) and not e.is_dir()]
    return sorted(name for name in files if name.lower().endswith(IMAGE_EXTENSIONS))


@dataclasses.dataclass
class LeftOut:
    """Files that are left out, hidden ones aside."""

    others: list[str] = dataclasses.field(default_factory=list)  # without an image's extension
    special: list[str] = dataclasses.field(default_factory=list)  # named pipes, links to nowhere
    loops: list[str] = dataclasses.field(default_factory=list)  # links to a folder above them

    def extensions(self) -> str:
        """Return the extensions of ``others`` with their numbers, the most frequent first."""
        counts = Counter(os.path.splitext(name)[1].lower() or "none" for name in self.others)
        return ", ".join(f"{count} {extension}" for extension, count in counts.most_common(8))


def list_images(folder: str, left_out: LeftOut) -> list[str]:
    """
    Return the images in a folder and its folders, at any depth and in the order of torchvision's
    ``ImageFolder``; links to folders are followed. What is no image is added to ``left_out``.
    """
    images: list[str] = []
    _look_through(folder, (), images, left_out)
    return sorted(images, key=os.path.split)


def _look_through(
    folder: str, parents: tuple[tuple[int, int], ...], images: list[str], left_out: LeftOut
) -> None:
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity in parents:
        left_out.loops.append(folder)
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                _look_through(entry.path, (*parents, identity), images, left_out)
            elif not entry.name.lower().endswith(IMAGE_EXTENSIONS):
                left_out.others.append(entry.path)
            else:
                (images if entry.is_file() else left_out.special).append(entry.path)
