# Copyright (c) The mokd_det authors.
"""Small real detectors on nine real aerial tiles."""

import contextlib
import logging
import os
from pathlib import Path

import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from mokd_det import tasks  # noqa: F401  (registers meta-architectures and backbones)
from mokd_det.config import load_config, merge_overrides, trust_files

ROOT = Path(__file__).parent.parent
TREES = Path(__file__).parent / "data" / "trees"
DIGITS = Path(__file__).parent / "data" / "digits"

# Sums are split over threads, so a fixed number of them makes float results repeatable.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
trust_files()  # tests write Python configs of their own; tests/untrusted takes it back


def pytest_terminal_summary(terminalreporter):
    """Count the tests marked ``bad_input``, each one input; under xdist as well."""
    tried = [
        report
        for outcome in ("passed", "failed", "error")
        for report in terminalreporter.stats.get(outcome, [])
        if "bad_input" in getattr(report, "keywords", {})
    ]
    names = {report.nodeid for report in tried}
    right = names - {report.nodeid for report in tried if not report.passed}
    if names:
        # What tests and the scripts that they call print; a library's error is one of USER_ERRORS.
        traced = {r.nodeid for r in tried if "Traceback (most re" in r.capstdout + r.capstderr}
        line = f"bad inputs, tried / right outcome: {len(names)} / {len(right)}, "
        line += f"{len(traced) or 'none'} with a traceback"
        terminalreporter.write_sep("=", line)

    executed = [dict(r.user_properties)["executed"] for r in _reports(terminalreporter)]
    if executed:
        line = f"hostile files that executed: {sum(executed)} / {len(executed)}"
        terminalreporter.write_sep("=", line)


def _reports(terminalreporter):
    """Of tests with a hostile file, which say whether it was executed."""
    reports = sum((terminalreporter.stats.get(key, []) for key in ("passed", "failed")), [])
    return [r for r in reports if "executed" in dict(getattr(r, "user_properties", ()))]


@pytest.fixture
def catalogs_restored():
    """Another test may have other data sets under the same names."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@contextlib.contextmanager
def loggers_restored():
    """A run writes its log into its folder, and hides its loggers from pytest."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "mokd_det")]
    before = [(logger, logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    try:
        yield
    finally:
        for logger, handlers, propagate, level in before:
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)


@pytest.fixture(autouse=True)
def at_root_with_a_seed(monkeypatch):
    """
    Paths in configs count from the checkout, random numbers are the same in every run, and what a
    test's runs do to the loggers ends with it.
    """
    trust_files()  # any tool that runs in this process without --trust takes it back, too
    # Loggers of earlier tests write to streams that pytest has closed since.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.chdir(ROOT)
    seed_all_rng(0)
    with loggers_restored():
        yield


TREE_OPTS = [
    "DATASETS.COCO",
    [[f"tests_trees_{s}", str(TREES / f"{s}.json"), str(TREES / s)] for s in ("train", "val")],
    "DATASETS.TRAIN",
    ("tests_trees_train",),
    "DATASETS.TEST",
    ("tests_trees_val",),
    "INPUT.MIN_SIZE_TRAIN",
    (192,),
    "INPUT.MAX_SIZE_TRAIN",
    192,
    "INPUT.MIN_SIZE_TEST",
    192,
    "INPUT.MAX_SIZE_TEST",
    192,
    "INPUT.COLOR_JITTER",
    0.0,
    "SOLVER.IMS_PER_BATCH",
    2,
    "SOLVER.MAX_ITER",
    3,
    "SOLVER.STEPS",
    (),
    "SOLVER.WARMUP_ITERS",
    0,
    "SEED",
    7,
    "DATALOADER.RESUMABLE",  # without a teacher: Detectron2's own loader and step
    False,
    "MOKD.OBJECTIVES",  # tests of others ask for them
    ["features"],
    "MOKD.TEACHER.PRECISION",  # what "auto" chooses is the machine's
    "",
]

# For tests: overrides that choose objectives. An option that nobody reads is an error, so without
# features theirs are as by default.
PROPOSALS = ["MOKD.TEACHER.PROPOSALS", 64]
OUTPUTS = ["MOKD.OBJECTIVES", ["features", "outputs"], *PROPOSALS]
OUTPUTS_ONLY = [
    *PROPOSALS,
    *("MOKD.OBJECTIVES", ["outputs"]),
    *("MOKD.FEATURES.STUDENT", [], "MOKD.FEATURES.DIM", 0),
]

CONFIGS = {
    "faster_rcnn": "configs/Quick-Start/student_scratch.yaml",
    "retinanet": "configs/Quick-Start/student_retinanet.yaml",
    "mokd": "configs/Quick-Start/student_mokd.yaml",
    "teacher": "configs/Quick-Start/teacher.yaml",
}


@pytest.fixture(scope="session")
def teacher_weights(tmp_path_factory):
    """The quick start's teacher with random weights, as a checkpoint file."""
    folder = tmp_path_factory.mktemp("teacher")
    cfg = load_config(str(ROOT / CONFIGS["teacher"]), ["MODEL.TORCHVISION.WEIGHTS", ""])
    seed_all_rng(3)
    path = folder / "teacher.pth"
    torch.save({"model": build_model(cfg).state_dict()}, path)
    return str(path)


@pytest.fixture
def make_cfg(tmp_path, teacher_weights):
    """From (name in CONFIGS, overrides, folder name) to a config on the tiles of tests/data."""

    def make(name, opts=(), folder="run"):
        output = tmp_path / folder
        output.mkdir(exist_ok=True)
        levels = ["MOKD.FEATURES.STUDENT", ["p3", "p4"], "MOKD.FEATURES.DIM", 256]
        more = levels if name == "mokd" else []
        cfg = load_config(CONFIGS[name], [*TREE_OPTS, *more, "OUTPUT_DIR", str(output)])
        cfg.MOKD.TEACHER.CONFIG_FILE = CONFIGS["teacher"]
        cfg.MOKD.TEACHER.WEIGHTS = teacher_weights
        cfg.merge_from_list(list(opts))
        return cfg

    return make


DIGIT_OPTS = [
    "DATASETS.CLASSIFICATION",
    [[f"tests_digits_{s}", str(DIGITS / f"{s}.npz")] for s in ("train", "val")],
    "DATASETS.TRAIN",
    ("tests_digits_train",),
    "DATASETS.TEST",
    ("tests_digits_val",),
    "SOLVER.UNIT",
    "iteration",
    "SOLVER.IMS_PER_BATCH",
    8,
    "SOLVER.MAX_ITER",
    3,
    "SOLVER.WARMUP_ITERS",
    0,
    "SEED",
    7,
    "MOKD.TEACHER.PRECISION",
    "",
]


@pytest.fixture(scope="session")
def digits_teacher_weights(tmp_path_factory):
    """The digits' teacher with random weights, as a checkpoint file."""
    path = tmp_path_factory.mktemp("digits") / "teacher.pth"
    seed_all_rng(3)
    torch.save(
        {"model": build_model(load_config(str(ROOT / "configs/Digits/teacher.yaml"))).state_dict()},
        path,
    )
    return str(path)


@pytest.fixture
def make_digits_cfg(tmp_path, digits_teacher_weights):
    """
    From (overrides, folder name) to the config of the digits' student and its teacher, on the
    packed digits of tests/data.
    """

    def make(opts=(), folder="run"):
        output = tmp_path / folder
        output.mkdir(exist_ok=True)
        cfg = load_config(
            "configs/Digits/student_mokd.yaml",
            [
                *DIGIT_OPTS,
                "OUTPUT_DIR",
                str(output),
                "MOKD.TEACHER.WEIGHTS",
                digits_teacher_weights,
            ],
        )
        merge_overrides(cfg, opts)
        return cfg

    return make
