# Copyright (c) The mokd_det authors.
"""``mokd predict``, in this process, with random weights."""

import json
import shutil

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from PIL import Image

from mokd_det.commands import predict, visualizing
from mokd_det.commands.predicting import draw
from mokd_det.config import load_config
from mokd_det.tasks import task_of

from ..conftest import DIGITS, TREES


@pytest.fixture
def photos(tmp_path):
    """A folder with one in a folder of it, and what is no photo."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    shutil.copy(TREES / "val/0.jpg", folder / "a.jpg")
    Image.open(TREES / "val/1.jpg").save(folder / "more" / "b.bmp")
    (folder / "notes.txt").touch()
    (folder / "._a.jpg").touch()
    return folder


@pytest.fixture
def save(tmp_path):
    """From a config to its file and random weights, as arguments."""

    def run(cfg):
        (tmp_path / "model.yaml").write_text(cfg.dump())
        seed_all_rng(5)
        task = task_of(cfg)
        model = task.stock_module(build_model(task.untrained_config(cfg)))
        torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
        files = ["--config-file", tmp_path / "model.yaml", "--weights", tmp_path / "model.pth"]
        return [*map(str, files), "--output", str(tmp_path / "out")]

    return run


def call(*args):
    predict.run(predict.argument_parser().parse_args([*map(str, args)]))


def read(tmp_path):
    return json.loads((tmp_path / "out" / "predictions.json").read_text())


def test_a_detector(make_cfg, save, photos, tmp_path, capsys):
    cfg = make_cfg("faster_rcnn", ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0])
    args = save(cfg)
    call(*args, "--threshold", 0.51, photos, TREES / "val/2.jpg", "SEED", 3)
    found = read(tmp_path)
    said = capsys.readouterr().out
    assert f"3 photos, {len(found)} boxes that score 0.51 or more (--threshold)" in said
    assert "category_id is as in" in said
    assert {x["category_name"] for x in found} == {"Tree"} and all(
        x["score"] >= 0.51 for x in found
    )
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    files = [photos / "a.jpg", photos / "more" / "b.bmp", TREES / "val/2.jpg"]
    elements = [{"file_name": str(file)} for file in files]
    shown = visualizing.predict(cfg, elements, 0.51)
    for number, (file, objects) in enumerate(zip(files, shown), 1):
        ours = [x for x in found if x["file_name"] == str(file)]
        assert {x["image_id"] for x in ours} <= {number}
        corners = np.array([x["bbox"] for x in ours]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        np.testing.assert_allclose(corners, objects.boxes, atol=1e-3)
    assert found
    for name, file in zip(("a.jpg", "more/b.bmp.png", "2.jpg"), files):
        picture, photo = (np.asarray(Image.open(x)) for x in (tmp_path / "out" / name, file))
        assert picture.shape == photo.shape and (picture.astype(int) - photo).any()


def test_a_class_has_one_colour():
    found = Instances((40, 60))
    found.pred_boxes = Boxes(torch.tensor([[2.0, 2, 12, 12], [20, 20, 30, 30], [40, 2, 50, 12]]))
    found.scores, found.pred_classes = torch.ones(3), torch.tensor([0, 1, 0])
    picture = draw(Image.new("RGB", (60, 40)), found)
    first, other, again = (picture.getpixel(corner) for corner in ((12, 12), (30, 30), (50, 12)))
    assert first == again != other != (0, 0, 0) != first


def test_pictures_of_earlier_calls_are_told(make_cfg, save, photos, tmp_path, capsys):
    args = save(make_cfg("faster_rcnn"))
    call(*args, photos)
    assert "earlier calls" not in capsys.readouterr().out
    call(*args, "--overwrite", photos / "a.jpg")
    assert "has pictures of earlier calls, too: 1" in capsys.readouterr().out


def test_no_box_above_the_threshold(make_cfg, save, photos, tmp_path, capsys):
    args = save(make_cfg("faster_rcnn", ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]))
    call(*args, "--threshold", 1.0, photos / "a.jpg")
    said = capsys.readouterr().out
    assert "No box scores 1 or more; the highest score is " in said and not read(tmp_path)
    assert "\n1 photo, 0 boxes" in said


def test_a_detector_of_torchvision(save, photos, tmp_path, capsys):
    opts = ["MODEL.TORCHVISION_DETECTOR.NUM_CLASSES", 3, "MODEL.DEVICE", "cpu"]
    cfg = load_config("mokd://COCO-Detection/tv_ssdlite320.yaml", opts)
    cfg.MODEL.TORCHVISION_DETECTOR.OPTIONS.score_thresh = 0.0
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("not_here",), ()
    call(*save(cfg), "--threshold", 0, photos / "a.jpg")
    found = read(tmp_path)
    assert "category_id counts the classes from 0" in capsys.readouterr().out
    assert {x["category_id"] for x in found} <= {0, 1, 2} and len(found) > 5
    assert all(str(x["category_id"]) == x["category_name"] for x in found)
    width, height = Image.open(photos / "a.jpg").size
    for x, y, w, h in (result["bbox"] for result in found):
        assert x >= 0 and y >= 0 and x + w <= width + 1e-3 and y + h <= height + 1e-3


def test_a_classifier(make_digits_cfg, save, tmp_path, capsys):
    cfg = make_digits_cfg(["MOKD.ENABLED", False])
    for i, image in enumerate(np.load(DIGITS / "val.npz")["images"][:3]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    call(*save(cfg), *(tmp_path / f"{i}.png" for i in range(3)))
    found = read(tmp_path)
    assert [x["file_name"] for x in found] == [str(tmp_path / f"{i}.png") for i in range(3)]
    first = found[0]["classes"][0]
    said = capsys.readouterr().out
    assert f"{tmp_path / '0.png'}: {first['name']} {first['score']:.2f}, " in said
    for photo in found:
        scores = [x["score"] for x in photo["classes"]]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True) and sum(scores) < 1
        assert all(x["name"] == str(x["class"]) for x in photo["classes"])  # the digits' names
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["predictions.json"]
    with pytest.raises(ValueError, match="--threshold is for detectors, and the config is a class"):
        call(*save(cfg), "--overwrite", "--threshold", 0.1, tmp_path / "0.png")
    before = read(tmp_path)
    with pytest.raises(ValueError, match="predictions.json' is there already: name another --out"):
        call(*save(cfg), tmp_path / "0.png")
    assert read(tmp_path) == before


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "args, message",
    [
        (["no.jpg"], "'no.jpg' does not exist: expected a photo or a folder"),
        (["{photos}/empty"], "empty' has no image in it .*.jpg"),
        (["{photos}/broken.jpg"], "broken.jpg cannot be read: it is empty"),
        (["SEED", "3"], "No PATH is given"),
        (["{photos}/a.jpg", "--threshold", "2"], "--threshold is 2.0: expected a number in"),
        (["{photos}/a.jpg", "--weights", "no.pth"], "--weights 'no.pth' does not exist"),
        (["{photos}/a.jpg", "{photos}/more/a.jpg"], "would have one picture"),
        (["{photos}", "--output", "{photos}/found"], "found' is in '.*photos', so the next call"),
        (["{photos}/a.jpg", "--output", "{photos}"], "has the photo '.*a.jpg': name another"),
        (["{photos}/a.jpg", "--weights", "{photos}/notes.txt"], "notes.txt"),
    ],
)
def test_what_is_wrong_is_one_message(make_cfg, save, photos, args, message):
    (photos / "empty").mkdir()
    (photos / "broken.jpg").touch()
    shutil.copy(photos / "a.jpg", photos / "more" / "a.jpg")
    before = (photos / "a.jpg").read_bytes()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(*save(make_cfg("faster_rcnn")), *(arg.format(photos=photos) for arg in args))
    assert (photos / "a.jpg").read_bytes() == before
