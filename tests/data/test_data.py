# Copyright (c) The mokd_det authors.
"""VOC reading, tiles, packages, registration, and the loader that resumes."""

import json
import random
import zipfile

import numpy as np
import packages  # of datasets/, as voc and tiling
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.detection_utils import read_image
from PIL import Image
from tiling import objects_in_window, tile_windows
from voc import check_replaceable, clip_box, coco_dict, read_voc_xml

from mokd_det.config import load_config
from mokd_det.data import (
    build_resumable_train_loader,
    build_train_mapper,
    check_datasets,
    check_teacher_classes,
    datasets_root,
    isolated_rng,
    local_path,
    register_datasets,
)

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{0}</xmin>
<ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"""


def write_voc(folder, boxes, size=(40, 30), name="a"):
    Image.new("RGB", size).save(folder / f"{name}.png")
    objects = "".join(
        OBJECT.format(*box, name=label, difficult=difficult) for label, box, difficult in boxes
    )
    (folder / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    return folder / f"{name}.xml", folder / f"{name}.png"


def test_voc_counts_from_one_and_includes_the_last_pixel(tmp_path):
    files = write_voc(tmp_path, [("cat", (1, 1, 40, 30), 0), ("dog", (3, 4, 5, 6), 1)])
    record = read_voc_xml(*files)
    assert (record["width"], record["height"]) == (40, 30)
    assert record["objects"] == [
        {"name": "cat", "box": (0, 0, 40, 30), "difficult": False},
        {"name": "dog", "box": (2, 3, 5, 6), "difficult": True},
    ]


def test_voc_boxes_are_clipped_and_bad_ones_dropped_with_a_warning(tmp_path, caplog):
    boxes = [
        ("in", (31, 1, 99, 9), 0),
        ("empty", (5, 5, 5, 9), 0),
        ("turned", (9, 5, 5, 9), 0),
        ("outside", (50, 1, 60, 9), 0),
    ]
    files = write_voc(tmp_path, boxes)
    record = read_voc_xml(*files)
    assert [o["name"] for o in record["objects"]] == ["in"]
    assert record["objects"][0]["box"] == (30, 0, 40, 9)
    assert len(caplog.records) == 3
    for text, numbers in (("empty", "(5, 5, 5, 9)"), ("outside", "(50, 1, 60, 9)")):
        message = next(r.getMessage() for r in caplog.records if f"'{text}'" in r.getMessage())
        assert str(files[0]) in message and numbers in message


@pytest.mark.parametrize(
    "xml, message",
    [
        ("<annotation><object>", "is not well-formed XML"),
        ("<annotation><object><name>a</name></object></annotation>", "needs numbers in"),
        (
            "<annotation>" + OBJECT.format(1, 2, "x", 4, name="a", difficult=0) + "</annotation>",
            "needs",
        ),
        (
            "<annotation>" + OBJECT.format(1, 2, 3, 4, name="", difficult=0) + "</annotation>",
            "no name",
        ),
    ],
)
def test_broken_voc_names_the_file(tmp_path, xml, message):
    xml_file, image_file = write_voc(tmp_path, [])
    xml_file.write_text(xml)
    with pytest.raises(ValueError, match=message) as error:
        read_voc_xml(xml_file, image_file)
    assert str(xml_file) in str(error.value)


def test_missing_image_names_both_files(tmp_path):
    xml_file, image_file = write_voc(tmp_path, [])
    image_file.unlink()
    with pytest.raises(FileNotFoundError, match="a.xml: its image .*a.png does not exist"):
        read_voc_xml(xml_file, image_file)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_turned_image(tmp_path, orientation):
    xml_file, _ = write_voc(tmp_path, [("cat", (1, 1, 30, 40), 0)])
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    record = read_voc_xml(xml_file, tmp_path / "a.jpg")
    height, width = read_image(str(tmp_path / "a.jpg")).shape[:2]
    assert (record["width"], record["height"]) == (width, height)
    assert record["objects"][0]["box"] == (0, 0, 30, min(height, 40))


def test_only_our_own_json_is_replaceable(tmp_path):
    file = tmp_path / "train.json"
    check_replaceable(file)
    file.write_text(json.dumps(coco_dict([], ["cat"])))
    check_replaceable(file)
    for text in ("", "[]", "{}", '{"info": null}', '{"info": {"description": "COCO 2017"}}'):
        file.write_text(text)
        with pytest.raises(FileExistsError, match="train.json exists .* choose another --output"):
            check_replaceable(file)
    with pytest.raises(FileExistsError, match="was not made by mokd_det"):
        check_replaceable(tmp_path)


def test_coco_dict():
    image = {"file_name": "a.png", "width": 40, "height": 30}
    objects = [{"name": "dog", "box": (2, 3, 5, 7), "difficult": True}]
    coco = coco_dict([{**image, "objects": objects}], ["cat", "dog"])
    assert coco["images"] == [{"id": 1, **image}]
    annotation = coco["annotations"][0]
    assert annotation["bbox"] == [2, 3, 3, 4] and annotation["area"] == 12
    assert annotation["category_id"] == 2 and annotation["iscrowd"] == 1
    with pytest.raises(ValueError, match="a.png: class 'dog' is not among"):
        coco_dict([{**image, "objects": objects}], ["cat"])


@pytest.mark.parametrize("width, height, size", [(100, 90, 32), (64, 64, 32), (20, 50, 32)])
def test_tiles_without_overlap_cover_every_pixel_once(width, height, size):
    count = np.zeros((height, width), int)
    for x0, y0, x1, y1 in tile_windows(width, height, size, size):
        count[y0:y1, x0:x1] += 1
        assert 0 < x1 - x0 <= size and 0 < y1 - y0 <= size
    assert (count == 1).all()


@pytest.mark.parametrize("width, height", [(100, 90), (64, 64), (32, 33)])
def test_overlapping_tiles_cover_all_in_full_size(width, height):
    count = np.zeros((height, width), int)
    windows = list(tile_windows(width, height, 32, 24))
    for x0, y0, x1, y1 in windows:
        count[y0:y1, x0:x1] += 1
        assert (x1 - x0, y1 - y0) == (32, 32)
    assert (count >= 1).all() and len(set(windows)) == len(windows)


@pytest.mark.parametrize("stride", [0, -1, 33])
def test_bad_stride(stride):
    with pytest.raises(ValueError, match="0 < stride <= size"):
        list(tile_windows(64, 64, 32, stride))


def test_objects_in_window():
    objects = [{"name": "a", "box": (10.0, 10.0, 30.0, 20.0)}]
    inside = objects_in_window(objects, (5, 5, 35, 35), 0.4)
    assert inside == [{"name": "a", "box": (5, 5, 25, 15)}]
    half = objects_in_window(objects, (20, 0, 40, 40), 0.5)
    assert half == [{"name": "a", "box": (0, 10, 10, 20)}]
    assert objects_in_window(objects, (20, 0, 40, 40), 0.6) == []
    assert objects_in_window(objects, (40, 40, 60, 60), 0.0) == []
    assert clip_box((-5, -5, 0, 3), 10, 10) is None


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package client that hands out a small wheel, and the wheel's member with its checksum."""
    downloads = []

    def run(command, **kwargs):
        downloads.append(command[-1])
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/p-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("p/data.txt", "content")
        return packages.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    (tmp_path / "content").write_text("content")
    return downloads, packages.sha256_of(tmp_path / "content")


def test_packaged_files_are_fetched_once_and_checked(tmp_path, package):
    downloads, checksum = package
    target = tmp_path / "out"
    for _ in range(2):
        (file,) = packages.fetch_from_package("p==1.0", {"p/data.txt": checksum}, target)
    assert file.read_text() == "content" and downloads == ["p==1.0"]
    file.write_text("damaged")
    packages.fetch_from_package("p==1.0", {"p/data.txt": checksum}, target)
    assert file.read_text() == "content" and len(downloads) == 2


def test_wrong_checksum_or_member_leaves_nothing(tmp_path, package):
    with pytest.raises(ValueError, match="Checksum of p/data.txt in p==1.0: expected 00"):
        packages.fetch_from_package("p==1.0", {"p/data.txt": "00"}, tmp_path / "out")
    with pytest.raises(ValueError, match="has no p/other.txt"):
        packages.fetch_from_package("p==1.0", {"p/other.txt": "00"}, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_failed_download_is_explained(tmp_path, monkeypatch):
    def fail(command, **kwargs):
        return packages.subprocess.CompletedProcess(command, 1, "", "no such package")

    monkeypatch.setattr(packages.subprocess, "run", fail)
    with pytest.raises(ConnectionError, match="Could not download the package q==2(.|\n)*no such"):
        packages.fetch_from_package("q==2", {"q/x": "00"}, tmp_path)


def test_datasets_prefix_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert datasets_root() == tmp_path
    assert local_path("datasets://a/b.json") == str(tmp_path / "a/b.json")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert local_path("datasets://a/b.json") == "datasets/a/b.json"


def test_sets_from_the_config_alone(make_cfg):
    cfg = make_cfg("faster_rcnn")
    register_datasets(cfg)
    register_datasets(cfg)  # a second run in one process
    check_datasets(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    assert len(DatasetCatalog.get("tests_trees_train")) == 6


def test_a_users_own_imagenet_stays(monkeypatch, tmp_path):
    register_datasets(load_config(""))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_datasets(load_config(""))  # ours follows the environment
    assert MetadataCatalog.get("imagenet_val").image_path == str(tmp_path / "imagenet" / "val")
    try:
        DatasetCatalog.remove("imagenet_val")
        MetadataCatalog.remove("imagenet_val")
        DatasetCatalog.register("imagenet_val", lambda: ["mine"])
        register_datasets(load_config(""))
        assert DatasetCatalog.get("imagenet_val") == ["mine"]
        assert MetadataCatalog.get("imagenet_val").get("image_path") is None
    finally:
        DatasetCatalog.remove("imagenet_val")
        MetadataCatalog.remove("imagenet_val")
        monkeypatch.undo()
        register_datasets(load_config(""))


class TestBadDatasets:
    def entry(self, *entries):
        return load_config("", ["DATASETS.COCO", [list(e) for e in entries]])

    def test_malformed_entry(self):
        with pytest.raises(ValueError, match="expected .name, JSON file, image folder"):
            register_datasets(self.entry(("a", "b")))

    def test_name_of_another_set(self):
        register_datasets(self.entry(("tests_taken", "a.json", "a")))
        with pytest.raises(ValueError, match="'tests_taken' is taken.*a.json"):
            register_datasets(self.entry(("tests_taken", "b.json", "b")))

    def test_not_registered(self):
        register_datasets(self.entry(("tests_known_set", "a.json", "a")))
        with pytest.raises(ValueError, match="DATASETS.TEST names 'tests_knwon_set'.*Did you mean"):
            check_datasets(["tests_knwon_set"], "DATASETS.TEST")

    def test_none_named(self):
        with pytest.raises(ValueError, match="DATASETS.TRAIN is empty"):
            check_datasets([], "DATASETS.TRAIN")

    def test_missing_json_and_images(self, tmp_path):
        json_file, images = tmp_path / "a.json", tmp_path / "images"
        register_datasets(self.entry((f"tests_{tmp_path.name}", str(json_file), str(images))))
        with pytest.raises(FileNotFoundError, match="annotations of .* missing: expected the file"):
            check_datasets([f"tests_{tmp_path.name}"], "DATASETS.TRAIN")
        json_file.write_text("{}")
        with pytest.raises(FileNotFoundError, match="images of .* missing: expected the folder"):
            check_datasets([f"tests_{tmp_path.name}"], "DATASETS.TRAIN")

    def test_coco_says_where_it_is_expected(self, monkeypatch, tmp_path):
        with pytest.raises(FileNotFoundError, match="coco/annotations.*DETECTRON2_DATASETS"):
            check_datasets(["coco_2017_train"], "DATASETS.TRAIN")


def batches(loader, count):
    iterator = iter(loader)
    return [[next(iterator)][0] for _ in range(count)]


def same(first, second):
    return len(first) == len(second) and all(
        a["file_name"] == b["file_name"]
        and torch.equal(a["image"], b["image"])
        and torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        for x, y in zip(first, second)
        for a, b in zip(x, y)
    )


def loader_of(make_cfg, seed=3, opts=()):
    cfg = make_cfg("faster_rcnn", ["INPUT.COLOR_JITTER", 0.3, *opts])
    register_datasets(cfg)
    loader = build_resumable_train_loader(cfg, mapper=build_train_mapper(cfg))
    loader.seed = seed
    return loader


def with_classes(folder, *names):
    """A config whose training set has these classes; ids fall, and Detectron2 goes by the ids."""
    path = folder / f"{'_'.join(names)[:40]}.json"
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories[::-1]}))
    sets = [[path.stem, str(path), str(folder)]]
    return load_config("", ["DATASETS.COCO", sets, "DATASETS.TRAIN", (path.stem,)])


def test_teacher_of_the_same_classes_in_another_order_is_refused(tmp_path):
    student, teacher = with_classes(tmp_path, "a", "b"), with_classes(tmp_path, "b", "a")
    with pytest.raises(ValueError, match=r"are 2: a, b .*'s 2: b, a .*in another order"):
        check_teacher_classes(student, teacher, "outputs")


def test_teacher_of_other_class_names_is_refused(tmp_path):
    student = with_classes(tmp_path, "a", "b")
    with pytest.raises(ValueError, match="outputs compares .* 2: a, b .*'s 2: a, c .*OPTS"):
        check_teacher_classes(student, with_classes(tmp_path, "a", "c"), "outputs")
    unknown = load_config("", ["DATASETS.TRAIN", ("not_registered",)])
    another_number = with_classes(tmp_path, "a", "b", "c")  # the model's to refuse
    for teacher in (student, another_number, unknown, load_config("")):
        check_teacher_classes(student, teacher, "outputs")


def test_classes_that_the_teachers_weights_say(tmp_path):
    student, teacher = with_classes(tmp_path, "a", "b"), with_classes(tmp_path, "a", "b")
    teacher.MODEL.WEIGHTS = str(tmp_path / "teacher.pth")
    torch.save({"model": {}, "run": {"class_names": ["b", "a"]}}, teacher.MODEL.WEIGHTS)
    with pytest.raises(ValueError, match="--with-teacher compares .*'s 2: b, a .*another order"):
        check_teacher_classes(student, teacher, "--with-teacher")
    teacher.DATASETS.TRAIN = ()
    check_teacher_classes(student, teacher, "--with-teacher")


def test_classes_of_a_set_that_detectron2_knows(tmp_path):
    coco = load_config("", ["DATASETS.TRAIN", ("coco_2017_train",)])
    names = MetadataCatalog.get("coco_2017_train").thing_classes
    with pytest.raises(ValueError, match="80: person, bicycle, .*in another order"):
        check_teacher_classes(with_classes(tmp_path, *names[::-1]), coco, "outputs")


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_goes_on_where_it_stopped(make_cfg, workers):
    whole = batches(loader_of(make_cfg), 7)
    rest = loader_of(make_cfg, opts=["DATALOADER.NUM_WORKERS", workers])
    rest.start = 4
    assert same(batches(rest, 3), whole[4:])
    assert not same(whole[:3], whole[4:])
    assert not same(batches(loader_of(make_cfg, seed=4), 7), whole)


def test_loader_leaves_the_global_random_state_alone(make_cfg):
    torch.manual_seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    loader = loader_of(make_cfg)
    np.random.set_state(("MT19937", states[1], *np.random.get_state()[2:]))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    batches(loader, 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]


def test_loader_sees_the_images_of_detectron2s_loader_in_the_same_order(make_cfg):
    """Order and aspect-ratio groups are Detectron2's; only the augmentations are seeded anew."""
    from detectron2.data.samplers import TrainingSampler

    cfg = make_cfg("faster_rcnn")
    register_datasets(cfg)
    ours = batches(loader_of(make_cfg, seed=11), 8)
    theirs = batches(build_detection_train_loader(cfg, sampler=TrainingSampler(6, seed=11)), 8)
    names = [[[x["file_name"] for x in batch] for batch in which] for which in (ours, theirs)]
    assert names[0] == names[1]
    for batch in ours:
        assert len({x["width"] > x["height"] for x in batch}) == 1


def test_unequal_shares(make_cfg, monkeypatch):
    monkeypatch.setattr("mokd_det.data.loader.comm.get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH is 2, which 3 processes"):
        loader_of(make_cfg)


def test_mapper_that_drops_everything_is_an_error(make_cfg):
    loader = loader_of(make_cfg)
    loader.mapper = lambda element: None
    with pytest.raises(RuntimeError, match="dropped 100 samples"):
        next(iter(loader))


def test_isolated_rng():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with isolated_rng(5):
        first = torch.rand(1), np.random.rand(), random.random()
    with isolated_rng(5):
        assert first == (torch.rand(1), np.random.rand(), random.random())
    assert torch.equal(torch.rand(2), expected)


def test_colour_jitter(make_cfg):
    plain = build_train_mapper(make_cfg("faster_rcnn"))
    jittered = build_train_mapper(make_cfg("faster_rcnn", ["INPUT.COLOR_JITTER", 0.4]))
    assert len(jittered.augmentations.augs) == len(plain.augmentations.augs) + 2
    cfg = make_cfg("faster_rcnn")
    register_datasets(cfg)
    element = DatasetCatalog.get("tests_trees_train")[0]
    np.random.seed(0)
    means = torch.stack([jittered(dict(element))["image"].float().mean((1, 2)) for _ in range(8)])
    assert (means.std(0) > 5).all() and (means.diff(dim=1).std(0) > 5).all()


def test_result_json_has_no_nan(tmp_path):
    from mokd_det.evaluation import write_results

    path = write_results({"bbox": {"AP": 1.5, "APl": float("nan")}}, tmp_path)
    with open(path) as f:
        assert json.load(f) == {"bbox": {"AP": 1.5, "APl": None}}
