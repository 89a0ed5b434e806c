# Copyright (c) The mokd_det authors.
"""``mokd check-data``: the work."""

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .. import compat  # noqa: F401  (first: patches Detectron2 where it needs it)
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import load_config
from ..data import Report, check_coco, check_images, read_coco, read_rgb, write_json
from ..data.classification import check_source
from ..engine import prepare_datasets
from ..tasks import task_of


def check_config(args: argparse.Namespace) -> tuple[Report, dict[str, Any]]:
    """Return the report on the sets of a config, as training checks them, and their names."""
    _refuse(args, ["masks", "keypoints"], "a config, whose model says what is needed")
    _refuse(args, ["write"], "a config: give a .json file")
    cfg = load_config(args.config_file, args.opts)
    report = Report()
    # What is completed is written for the loaders; a check leaves nothing.
    with tempfile.TemporaryDirectory() as cfg.OUTPUT_DIR, _logged_warnings(report):
        try:
            prepare_datasets(cfg, task_of(cfg))
            names = dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
            for name in names if args.images else ():
                _decode_images(name, report, cfg.DATASETS.BROKEN_IMAGES)
        except (ValueError, FileNotFoundError) as error:
            report.error(str(error))
    return report, {key: list(cfg.DATASETS[key]) for key in ("TRAIN", "TEST")}


def _decode_images(name: str, report: Report, broken: str) -> None:
    if folder := MetadataCatalog.get(name).get("image_path"):
        found = check_source(folder, True, broken)
        report.errors += found.errors
        report.warnings += found.warnings
    else:
        files = [image["file_name"] for image in DatasetCatalog.get(name)]
        check_images(files, report, read_rgb, broken)


def _refuse(args: argparse.Namespace, options: Iterable[str], what: str) -> None:
    """Raise ValueError for options that are given and that nobody reads for ``what``."""
    for option in options:
        if getattr(args, option):
            name = "The folder of images" if option == "image_root" else f"--{option}"
            raise ValueError(f"{name} is not read for {what}: leave it out.")


@contextlib.contextmanager
def _logged_warnings(report: Report) -> Iterator[None]:
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: report.warn(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mokd_det")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def check_path(args: argparse.Namespace) -> tuple[Report, dict[str, Any]]:
    """Return the report on what is at a path, and counts of what it has."""
    path = Path(args.path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    _refuse(args, ["opts"], "a path: they are for --config-file")
    if path.suffix == ".json":
        return _check_coco(args)
    others = ["image_root", "masks", "keypoints", "write"]
    _refuse(args, others, "what is no .json file with annotations in COCO's format")
    if path.is_dir() and any(path.rglob("*.xml")):
        _refuse(args, ["images"], "a Pascal VOC folder")
        return _check_voc(path)
    return check_source(args.path, args.images), {}


def _check_voc(path: Path) -> tuple[Report, dict[str, Any]]:
    converters = Path(__file__).resolve().parents[2] / "datasets"
    if not (converters / "prepare_voc.py").is_file():
        raise ValueError(
            f"{path} is a Pascal VOC folder, which the installed package does not read: convert it "
            "with datasets/prepare_voc.py of a checkout, and check the .json file."
        )
    sys.path.insert(0, str(converters))
    import prepare_voc

    return prepare_voc.check(path), {}


def _check_coco(args: argparse.Namespace) -> tuple[Report, dict[str, Any]]:
    if args.image_root is None:
        raise ValueError(f"Give the folder of the images, too: mokd check-data {args.path} FOLDER")
    data = read_coco(args.path)
    completed, report = check_coco(
        data,
        args.image_root,
        masks=args.masks,
        keypoints=args.keypoints,
        read_images=args.images or None,
    )
    if args.images and not report.errors:
        files = [os.path.join(args.image_root, image["file_name"]) for image in data["images"]]
        check_images(files, report, read_rgb)
    if args.write and not report.errors:
        write_json(completed, os.path.abspath(args.write))
    return report, {key: len(completed.get(key, [])) for key in ("images", "annotations")}


def check(args: argparse.Namespace) -> int:
    """Check as the arguments say, print what was found; return 1 if there are errors, else 0."""
    if bool(args.path) == bool(args.config_file):
        raise ValueError("Give either a path or --config-file.")
    start = time.perf_counter()
    if args.config_file:
        report, counts = check_config(args)
    else:
        report, counts = check_path(args)
    for kind, messages in (("error", report.errors), ("warning", report.warnings)):
        for message in messages:
            print(f"{kind}: {message}")
    seconds = time.perf_counter() - start
    found = f"{len(report.errors)} kinds of errors, {len(report.warnings)} kinds of warnings"
    if not (report.errors or report.warnings):
        found = "no problems"
    print(f"{args.path or args.config_file}: {found}; {counts or ''} {seconds:.1f} s")
    if args.report:
        content = {"errors": report.errors, "warnings": report.warnings, "counts": counts}
        Path(args.report).write_text(json.dumps(content, indent=2))
    return int(bool(report.errors))
