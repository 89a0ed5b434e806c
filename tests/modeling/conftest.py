# Copyright (c) The mokd_det authors.
"""Students of every family on tiles with masks, keypoints and sem_seg."""

import pytest

from ..conftest import TREES
from ..data.annotated import annotate
from .families import FAMILIES


@pytest.fixture(scope="session")
def annotated(tmp_path_factory):
    """Names of the data sets with masks, keypoints and sem_seg, and the overrides to use them."""
    folder = tmp_path_factory.mktemp("annotated")
    sets = []
    for split in ("train", "val"):
        (folder / split).mkdir()
        annotate(TREES / f"{split}.json", folder / split / "coco.json", TREES / split)
        path = str(folder / split / "coco.json")
        sets.append([f"tests_annotated_{split}", path, str(TREES / split)])
    train, val = (name for name, _, _ in sets)
    return ["DATASETS.COCO", sets, "DATASETS.TRAIN", (train,), "DATASETS.TEST", (val,)]


@pytest.fixture
def family_cfg(make_cfg, annotated):
    """From a family and overrides to the config of a small student of it."""

    def make(family, opts=(), folder="run"):
        base = "retinanet" if family.startswith("retinanet") else "faster_rcnn"
        return make_cfg(base, [*annotated, *FAMILIES[family], *opts], folder)

    return make
