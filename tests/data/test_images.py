# Copyright (c) The mokd_det authors.
"""Image files as people have them: what is read, what is refused, what is skipped."""

import functools
import importlib.util
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.data import build_detection_train_loader
from detectron2.data import detection_utils
from torchvision.transforms.functional import pil_to_tensor

from mokd_det.data import build_resumable_train_loader, build_test_loader, build_train_mapper
from mokd_det.data import check_images, isolated_rng, read_rgb, register_datasets, vanishes
from mokd_det.data.augmentation import build_test_mapper
from mokd_det.data.classification.loader import ImageMapper, read_image, read_tensor
from mokd_det.data.images import ImageError, check_for_detector, check_header
from mokd_det.data.report import Report
from mokd_det.engine import validate

from ..conftest import ROOT
from .images import BAD, EVERY_DECODER, SIZE, encoded, message_of, pixels, write_bad, write_coco


def element(path, **more):
    return {"file_name": str(path), "name": path.name, "label": 0, "annotations": [], **more}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_and_nothing_hangs(tmp_path, make_cfg, name):
    path = write_bad(tmp_path, name)
    mapper = build_train_mapper(make_cfg("faster_rcnn"))
    for read in (read_image, read_tensor, mapper):
        with pytest.raises(ImageError, match=message_of(name)) as error:
            read(element(path))
        assert str(path) in str(error.value) and len(str(error.value)) < 500


@pytest.mark.bad_input
@pytest.mark.parametrize("suffix, mode", EVERY_DECODER)
@pytest.mark.parametrize("orientation", [1, 6])
def test_all_readers_see_the_same_upright_pixels(tmp_path, suffix, mode, orientation):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(encoded(suffix, mode, orientation))
    first = pil_to_tensor(read_image(element(path)))
    assert torch.equal(first, read_tensor(element(path)))
    turned = orientation == 6 and suffix not in ("bmp", "ppm")
    assert first.shape[1:] == (SIZE if turned else SIZE[::-1])
    if turned and suffix == "tif":
        with pytest.raises(ImageError, match="Detectron2 would turn twice. Save it upright"):
            check_for_detector(str(path))
        return
    check_for_detector(str(path), decode=True)
    stock = detection_utils.read_image(str(path), "RGB")
    assert np.array_equal(stock, first.permute(1, 2, 0).numpy())


@pytest.mark.bad_input
@pytest.mark.parametrize("orientation", [0, *range(1, 9), 77])
def test_photos_are_turned_as_a_viewer_shows_them(tmp_path, orientation):
    path = tmp_path / "x.png"
    path.write_bytes(encoded("png", orientation=orientation))
    image = pixels()
    expected = {
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.swapaxes(0, 1),
        6: np.rot90(image, -1),
        7: image[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(image),
    }.get(orientation, image)
    assert np.array_equal(np.asarray(read_rgb(str(path))), expected)


@pytest.mark.bad_input
def test_damaged_exif_data_turn_nothing(tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(exif=b"Exif\x00\x00garbage"))
    assert read_rgb(str(path)).size == SIZE
    assert read_tensor(element(path)).shape == (3, *SIZE[::-1])


def test_upright_jpeg_files_take_the_fast_decoder(tmp_path, monkeypatch):
    decoded = []
    import mokd_det.data.classification.loader as loader

    def decode(data, mode, original=loader.decode_jpeg):
        decoded.append(data)
        return original(data, mode)

    monkeypatch.setattr(loader, "decode_jpeg", decode)
    for index, content in enumerate((encoded(), encoded(orientation=3), encoded("png"))):
        path = tmp_path / f"{index}.jpeg"  # the content counts, not the suffix
        path.write_bytes(content)
        read_tensor(element(path))
    assert len(decoded) == 1


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("is_train", [True, False])
def test_good_files_are_read_as_by_stock_detectron2(tmp_path, make_cfg, mode, is_train):
    path = tmp_path / "x.tif"
    path.write_bytes(encoded("tif", mode))
    cfg = make_cfg("faster_rcnn")
    ours = build_train_mapper(cfg) if is_train else build_test_mapper(cfg)
    results = []
    for mapper in (ours, DatasetMapper(cfg, is_train=is_train)):
        with isolated_rng(3):
            results.append((mapper(element(path))["image"], torch.rand(1), np.random.rand()))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1:] == results[1][1:]


def test_errors_of_workers_are_one_sentence(tmp_path):
    path = write_bad(tmp_path, "text")
    loader = torch.utils.data.DataLoader([element(path)], collate_fn=_read_all, num_workers=1)
    with pytest.raises(ImageError, match=f"^The image {path} cannot be read: ") as error:
        next(iter(loader))
    assert "Traceback" not in str(error.value)


def _read_all(elements):
    return [read_image(element) for element in elements]


@pytest.mark.parametrize(
    "size, edges, expected",
    [
        ((4, 2000), (192, 192), True),
        ((2000, 4), (192, 192), True),
        ((4, 2000), (800, 1333), False),
        ((1, 3000), (800, 1333), True),
        ((40, 30), (192, 192), False),
    ],
)
def test_sides_that_vanish(size, edges, expected):
    assert vanishes(*size, *edges) == expected


@pytest.mark.bad_input
@pytest.mark.parametrize("read", [read_image, read_tensor])
def test_a_line_does_not_fill_the_memory_of_a_classifier(tmp_path, read):
    for size in ((1, 600), (600, 1), (2, 900)):
        (tmp_path / "x.png").write_bytes(encoded("png", size=size))
        mapper = ImageMapper(read, lambda image: torch.zeros(3, 4, 4))
        if size == (2, 900):
            assert mapper(element(tmp_path / "x.png"))["image"].shape == (3, 4, 4)
            continue
        with pytest.raises(ImageError, match="x.png .*one side is over 500 times the other. Cut"):
            mapper(element(tmp_path / "x.png"))


@pytest.mark.bad_input
@pytest.mark.parametrize("is_train", [True, False])
def test_an_image_whose_side_vanishes_is_named(tmp_path, make_cfg, is_train):
    path = tmp_path / "thin.png"
    path.write_bytes(encoded("png", size=(2000, 4)))
    cfg = make_cfg("faster_rcnn")
    mapper = build_train_mapper(cfg) if is_train else build_test_mapper(cfg)
    with pytest.raises(ImageError, match="thin.png .*2000 x 4 pixels .*a side of 0.*MAX_SIZE_TR"):
        mapper(element(path, width=2000, height=4))


@pytest.mark.bad_input
def test_other_errors_of_the_mapper_name_the_image_too(tmp_path, make_cfg):
    path = tmp_path / "x.png"
    path.write_bytes(encoded("png"))
    cfg = make_cfg("faster_rcnn", ["DATASETS.BROKEN_IMAGES", "skip"])
    with pytest.raises(ValueError, match="x.png and its annotations cannot be used: .*bbox_mode"):
        build_train_mapper(cfg)(element(path, annotations=[{"bbox": [1, 2, 3, 4]}]))
    with pytest.raises(ValueError, match="x.png and its annotations.*Mismatch.*got .12, 8., expe"):
        build_train_mapper(cfg)(element(path, width=3, height=3))


def test_a_report_of_images(tmp_path):
    files = []
    for index, name in enumerate(["text", "16-bit png", "cut png", "missing"]):
        folder = tmp_path / str(index)
        folder.mkdir()
        files.append(str(write_bad(folder, name)))
    good = tmp_path / "good.png"
    good.write_bytes(encoded("png"))
    for check, count in ((check_header, 3), (read_rgb, 4)):
        report = Report()
        check_images([str(good), *files], report, check)
        assert report.errors[0].startswith(f"images cannot be used ({count}: The image {files[0]}")
    report = Report()
    check_images(files, report, broken="skip")
    assert not report.errors and len(report.warnings) == 1
    report = Report()
    check_images([str(good)], report, read_rgb)
    assert report == Report()


@pytest.fixture
def broken_set(tmp_path, make_cfg):
    """A config of a set of 8 photos, two of which are broken; DATASETS.BROKEN_IMAGES is "skip"."""
    names = [f"{i}.jpg" for i in range(8)]
    for name in names:
        (tmp_path / name).write_bytes(encoded(size=(64, 48)))
    (tmp_path / "2.jpg").write_bytes(encoded(size=(64, 48))[:-20])
    (tmp_path / "5.jpg").write_text("no image")
    name = write_coco(tmp_path, names, (64, 48))
    opts = ["DATASETS.COCO", [[name, str(tmp_path / "set.json"), str(tmp_path)]]]
    opts += ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)]
    cfg = make_cfg("faster_rcnn", [*opts, "DATASETS.BROKEN_IMAGES", "skip"])
    register_datasets(cfg)
    return cfg


def seen(batches):
    return {sample["file_name"].split("/")[-1] for batch in batches for sample in batch}


BUILD = {
    "ours": lambda cfg, mapper: build_resumable_train_loader(cfg, mapper),
    "stock": lambda cfg, mapper: build_detection_train_loader(cfg, mapper=mapper),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", BUILD)
def test_training_skips_broken_images_and_counts_them(broken_set, caplog, kind, workers):
    broken_set.DATALOADER.NUM_WORKERS = workers
    mapper = build_train_mapper(broken_set)
    loader = iter(BUILD[kind](broken_set, mapper))
    batches = [next(loader) for _ in range(20)]
    assert all(len(batch) == 2 for batch in batches)
    assert seen(batches) == {f"{i}.jpg" for i in range(8)} - {"2.jpg", "5.jpg"}
    assert mapper.broken.skipped >= 4
    if not workers:
        told = [r.getMessage() for r in caplog.records if "Skipped" in r.getMessage()]
        assert told[0].startswith("Skipped 1 unreadable images so far, the last: The image ")
        assert told[2].startswith("Skipped 4 ")


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", BUILD)
def test_training_stops_at_a_broken_image_and_names_it(broken_set, kind):
    broken_set.DATASETS.BROKEN_IMAGES = "error"
    loader = iter(BUILD[kind](broken_set, build_train_mapper(broken_set)))
    with pytest.raises(ImageError, match=r"/(2|5).jpg cannot be read.*BROKEN_IMAGES to 'skip'"):
        for _ in range(20):
            next(loader)


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", BUILD)
def test_a_set_of_broken_images_ends(broken_set, tmp_path, kind):
    for path in tmp_path.glob("*.jpg"):
        path.write_text("no image")
    loader = iter(BUILD[kind](broken_set, build_train_mapper(broken_set)))
    with pytest.raises(RuntimeError, match="dropped (100 samples|every image)"):
        next(loader)


@pytest.mark.bad_input
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_broken_images_out_once_and_tells(broken_set, caplog, workers):
    broken_set.DATALOADER.NUM_WORKERS = workers
    loader = build_test_loader(broken_set, broken_set.DATASETS.TEST[0])
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        caplog.clear()
        batches = list(loader)
        names = [sample["file_name"] for batch in batches for sample in batch]
        assert len(names) == len(set(names)) == 6 and all(len(batch) == 1 for batch in batches)
        assert "2 images of 'tests_images_" in caplog.text
        assert "their objects count as missed" in caplog.text
    assert len(loader) == 8


def test_evaluation_without_skipping_is_detectron2s(broken_set, tmp_path):
    broken_set.DATASETS.BROKEN_IMAGES = "error"
    name = broken_set.DATASETS.TEST[0]
    with pytest.raises(ImageError, match="2.jpg cannot be read"):
        list(build_test_loader(broken_set, name))
    for index in (2, 5):
        (tmp_path / f"{index}.jpg").write_bytes(encoded(size=(64, 48)))
    loaders = build_test_loader(broken_set, name), build_detection_test_loader(broken_set, name)
    assert type(loaders[0]) is type(loaders[1])
    for ours, stock in zip(*loaders, strict=True):
        assert torch.equal(ours[0].pop("image"), stock[0].pop("image")) and ours == stock


@pytest.mark.parametrize("make", ["make_cfg", "make_digits_cfg"])
def test_another_action_is_refused_before_anything_is_read(request, make):
    args = ["faster_rcnn"] if make == "make_cfg" else []
    cfg = request.getfixturevalue(make)(*args, ["DATASETS.BROKEN_IMAGES", "ignore"])
    with pytest.raises(ValueError, match="BROKEN_IMAGES is 'ignore': expected one of 'error'"):
        validate(cfg)


@functools.cache
def run_exported():
    spec = importlib.util.spec_from_file_location("run_exported", ROOT / "tools/run_exported.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.bad_input
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exported_classifiers_see_the_pixels_of_training(tmp_path, suffix, orientation):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(encoded(suffix, orientation=orientation))
    exported = np.asarray(run_exported().read(path))
    assert np.array_equal(exported, np.asarray(read_image(element(path))))
    assert torch.equal(pil_to_tensor(read_image(element(path))), read_tensor(element(path)))


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["16-bit png", "16-bit tif", "32-bit tif", "float tif"])
def test_exported_models_refuse_deep_images_too(tmp_path, name):
    path = write_bad(tmp_path, name)
    with pytest.raises(ValueError, match="convert it to 8 bit first"):
        run_exported().read(path)
