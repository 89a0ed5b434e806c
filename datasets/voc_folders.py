# Copyright (c) The mokd_det authors.
"""Where a VOC-style folder has its annotations, images and splits, and which image is whose."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mokd_det.data.classification.folders import IMAGE_EXTENSIONS, is_hidden
from mokd_det.data.classification.sources import SPLITS
from voc import parse_xml

logger = logging.getLogger(__name__)

# VOC's lists of a class say behind each name whether the image shows it.
OF_A_CLASS = re.compile(r"(.*\S)\s+(?:-1|0|1)")


class Files:
    """The files of some extensions in a folder and its folders, hidden ones aside."""

    def __init__(self, folder: Path, extensions: Sequence[str]):
        self.folder = folder
        paths = (p for p in _walk(folder) if p.name.lower().endswith(tuple(extensions)))
        self.paths = sorted(paths, key=lambda path: (self.name_of(path), path))
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        for path in self.paths:
            self._by_name.setdefault(self.name_of(path), []).append(path)
            self._by_stem.setdefault(path.stem, []).append(path)

    def name_of(self, path: Path) -> str:
        """Return the path inside the folder, without its extension."""
        return path.relative_to(self.folder).with_suffix("").as_posix()

    def find(self, name: str) -> list[Path]:
        """Return the files of a :meth:`name_of`; without one, those in any folder of its stem."""
        return self._by_name.get(name) or self._by_stem.get(name.rpartition("/")[2], [])

    def called(self, file_name: str) -> list[Path]:
        """Return the files of this name, with its extension, in any folder."""
        found = self._by_stem.get(Path(file_name).stem, [])
        return [path for path in found if path.name == file_name]


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (Path(parent, name) for name in names if not is_hidden(name))


class VocFolder:
    """
    Annotations and images, which may lie side by side, with lists of splits or without.

    Attributes:
        images: the :class:`Files` among which the images are.
        splits: the annotation files by split.
        has_lists: of these.
    """

    def __init__(
        self,
        annotations: Path,
        images: Path,
        image_sets: Path | None,
        splits: Sequence[str] | None = None,
        unlisted: str = "all",
    ):
        """
        Args:
            annotations, images: folders. FileNotFoundError: one is missing.
            image_sets: folder of the lists; without it, or None, there is one split.
            splits: lists to read. None: all but those of a class.
            unlisted: name of the split if there are no lists.
        """
        for folder in (annotations, images):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{folder} does not exist: give the folders by --annotations and --images."
                )
        self.images = Files(images, IMAGE_EXTENSIONS)
        self._annotations = Files(annotations, (".xml",))
        self.has_lists = image_sets is not None and image_sets.is_dir()
        if image_sets is not None and self.has_lists:
            lists = _choose_lists(image_sets, splits)
            self.splits = {name: self._read_list(name, file) for name, file in lists.items()}
        elif splits:
            raise FileNotFoundError(
                f"{image_sets} does not exist, so there are no splits {list(splits)}."
            )
        else:
            self.splits = {unlisted: self._annotations.paths}

    def find_image(self, xml_file: Path, file_name: str) -> tuple[Path, bool]:
        """
        Return the image of an annotation file: the one of its name; if several have that (a.jpg,
        a.png), or none, the one that its ``<filename>`` names. And whether ``<filename>`` agrees.

        FileNotFoundError: there is none; ValueError: there are several, or the two name different
        images, unless ``<filename>`` was only copied from the annotation of the other image.
        """
        file_name = _base(file_name)
        own = self.images.find(self._annotations.name_of(xml_file))
        named = self.images.called(file_name) if file_name else []
        both = [path for path in own if path in named]
        if own and named and not both and not any(map(self._has_its_own, named)):
            raise ValueError(
                f"{xml_file} could be of {own[0]}, which has its name, or of {named[0]}, which its "
                "<filename> names: rename the file, or correct <filename>."
            )
        found = both or own or named
        if not found:
            raise FileNotFoundError(
                f"{xml_file}: there is no image of that name in {self.images.folder}"
                + (f", nor '{file_name}', which its <filename> names." if file_name else ".")
            )
        if len(found) > 1:
            raise ValueError(
                f"{xml_file} could be of {' or '.join(map(str, found))}, and its <filename> "
                f"'{file_name}' does not say which: remove or rename the others."
            )
        agrees = not file_name or found[0].stem in (file_name, Path(file_name).stem)
        return found[0], agrees

    def _has_its_own(self, image: Path) -> bool:
        """Return whether an annotation file has this image's name and names it, too."""
        own = self._annotations.find(self.images.name_of(image))
        return any(_base(parse_xml(file).findtext("filename")) == image.name for file in own)

    def _read_list(self, split: str, file: Path) -> list[Path]:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text in UTF-8: {error}. Save it as UTF-8.") from error
        result: list[Path] = []
        for line in filter(None, map(str.strip, lines)):
            names = [line]  # it may have spaces, "photo 1", so the second column is the last resort
            if match := OF_A_CLASS.fullmatch(line):
                names.append(match[1])
            found = next(filter(None, map(self._annotations.find, names)), [])
            if not found:
                xml_file = self._annotations.folder / f"{names[-1]}.xml"
                raise FileNotFoundError(f"{xml_file} does not exist, but split '{split}' lists it.")
            if len(found) > 1:
                raise ValueError(
                    f"{file}: '{line}' could be {found[0]} or {found[1]}: list it with its folder."
                )
            result.append(found[0])
        if len(set(result)) < len(result):
            raise ValueError(f"{file} lists an image twice.")
        return result


def open_voc(
    root: Path,
    splits: Sequence[str] | None = None,
    annotations: str | None = None,
    images: str | None = None,
    image_sets: str = "ImageSets/Main",
) -> tuple[Path, dict[str, VocFolder]]:
    """
    Return the folder that all images are in, and what to read each split from. ``root`` has the
    folders ``annotations`` and ``images``; or images and XML files side by side; or folders of
    splits, each of these kinds.

    FileNotFoundError: none of these, or a split that is not there; ValueError: see the lists.
    """
    if annotations or images or (root / "Annotations").is_dir():
        parts = root / (annotations or "Annotations"), root / (images or "JPEGImages")
        folder = VocFolder(*parts, root / image_sets, splits)
    elif root.is_dir() and any(_is_xml(path) for path in root.iterdir()):
        folder = VocFolder(root, root, root / image_sets, splits)
    else:
        return root, _open_splits(root, splits)
    return folder.images.folder, dict.fromkeys(folder.splits, folder)


def _open_splits(root: Path, splits: Sequence[str] | None) -> dict[str, VocFolder]:
    """A folder for each split, as Roboflow exports them."""
    folders = [p for p in sorted(root.glob("*")) if p.is_dir() and not is_hidden(p.name)]
    found = {}
    for path in folders:
        if not any(map(_is_xml, _walk(path))):
            if path.name.lower() in SPLITS:
                logger.warning(f"{path} has no XML files and is left out.")
            continue
        own = (path / "Annotations").is_dir()
        parts = (path / "Annotations", path / "JPEGImages") if own else (path, path)
        found[path.name] = VocFolder(*parts, None, unlisted=path.name)
    if not any(name.lower() in SPLITS for name in found):
        raise FileNotFoundError(
            f"{root} is no VOC-style folder: expected Annotations/ and JPEGImages/ (other names by "
            "--annotations and --images), images and XML files side by side, or folders of splits "
            "as train/ and valid/."
        )
    for split in splits or ():
        if split not in found:
            raise FileNotFoundError(f"{root / split} does not exist; there are {', '.join(found)}.")
    return {name: found[name] for name in splits or found}


def _is_xml(path: Path) -> bool:
    return path.suffix.lower() == ".xml" and not is_hidden(path.name)


def _base(file_name: str | None) -> str:
    """Return the last part of a path of any system."""
    return re.split(r"[/\\]", (file_name or "").strip())[-1]


def _choose_lists(folder: Path, splits: Sequence[str] | None) -> dict[str, Path]:
    files = (f for f in sorted(folder.iterdir()) if f.suffix == ".txt" and not is_hidden(f.name))
    lists = {f.stem: f for f in files}
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
    for split in splits:
        if split not in lists:
            raise FileNotFoundError(
                f"{folder / split}.txt does not exist; there are {', '.join(lists) or 'no lists'}."
            )
    return {split: lists[split] for split in splits}
