# Copyright (c) The mokd_det authors.
"""Hostile files at the doors of whole runs and of the command line."""

import os
import subprocess
import sys

import pytest

from mokd_det.engine import build_trainer, prepare_datasets
from mokd_det.tasks import task_of

from ..conftest import CONFIGS, ROOT, TREE_OPTS
from .hostile import payload, write

RESUMABLE = ["DATALOADER.RESUMABLE", True]


def stock_weights(make_cfg, path):
    build_trainer(make_cfg("faster_rcnn", ["MODEL.WEIGHTS", str(path)])).resume_or_load(False)


def own_weights(make_cfg, path):
    cfg = make_cfg("faster_rcnn", [*RESUMABLE, "MODEL.WEIGHTS", str(path)])
    build_trainer(cfg).resume_or_load(False)


def resumed(opts, make_cfg, path):
    cfg = make_cfg("faster_rcnn", opts)
    name = "model_0000001.pth"
    path.rename(os.path.join(cfg.OUTPUT_DIR, name))
    with open(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"), "w") as file:
        file.write(name)
    build_trainer(cfg).resume_or_load(True)


def resumed_stock(make_cfg, path):
    resumed([], make_cfg, path)


def resumed_own(make_cfg, path):
    resumed(RESUMABLE, make_cfg, path)


def teacher(make_cfg, path):
    build_trainer(make_cfg("mokd", ["MOKD.TEACHER.WEIGHTS", str(path)]))


def backbone(make_cfg, path):
    build_trainer(make_cfg("teacher", ["MODEL.TORCHVISION.WEIGHTS", str(path)]))


def evaluated(make_cfg, path):
    cfg = make_cfg("faster_rcnn", ["MODEL.WEIGHTS", str(path)])
    task_of(cfg).load_trained(cfg)


def proposals(make_cfg, path):
    opts = ["MODEL.LOAD_PROPOSALS", True, "DATASETS.PROPOSAL_FILES_TRAIN", (str(path),)]
    build_trainer(make_cfg("faster_rcnn", opts))


def test_proposals(make_cfg, path):
    opts = ["MODEL.LOAD_PROPOSALS", True, "DATASETS.PROPOSAL_FILES_TEST", (str(path),)]
    cfg = make_cfg("faster_rcnn", opts)
    prepare_datasets(cfg, task_of(cfg), is_training=False)


DOORS = [stock_weights, own_weights, resumed_stock, resumed_own, teacher, backbone, evaluated]
DOORS += [proposals, test_proposals]
test_proposals.__test__ = False


@pytest.mark.slow
@pytest.mark.bad_input
@pytest.mark.parametrize("door", DOORS)
def test_runs(door, make_cfg, tmp_path, marker, refused):
    resumes = door in (resumed_stock, resumed_own)
    content = payload("in a zoo file", marker)
    path = write(tmp_path / "evil.pkl", "zip" if resumes else "pickle", content)
    with refused("model_0000001" if resumes else "evil.* holds an object of"):
        door(make_cfg, path)


def command(tool, *args):
    done = subprocess.run(
        [sys.executable, f"{tool}.py", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return done


def opts_of(tmp_path, *opts):
    text = [str(opt) for opt in (*TREE_OPTS, "OUTPUT_DIR", tmp_path / "run", *opts)]
    return [*text, "MODEL.DEVICE", "cpu"]


TOOLS = {
    "train": lambda f, evil: (
        "tools/train_net",
        *("--config-file", CONFIGS["faster_rcnn"], *opts_of(f, "MODEL.WEIGHTS", evil)),
    ),
    "evaluate": lambda f, evil: (
        *("tools/train_net", "--config-file", CONFIGS["faster_rcnn"], "--eval-only"),
        *opts_of(f, "MODEL.WEIGHTS", evil),
    ),
    "export": lambda f, evil: (
        *("tools/export_model", "--config-file", CONFIGS["faster_rcnn"], "--output", f / "out"),
        *opts_of(f, "MODEL.WEIGHTS", evil),
    ),
    "python config": lambda f, evil: (
        *("tools/train_net", "--config-file", CONFIGS["faster_rcnn"]),
        *opts_of(f, "MODEL.META_ARCHITECTURE", "LazyConfigDetector"),
        *("MODEL.LAZY_CONFIG.FILE", f / "evil.py"),
    ),
    "run exported": lambda f, evil: ("tools/run_exported", evil, evil),
}


@pytest.mark.slow
@pytest.mark.bad_input
@pytest.mark.parametrize("name", TOOLS)
def test_commands(name, tmp_path, marker, record_property):
    evil = write(tmp_path / "evil.pkl", "pickle", payload("in a zoo file", marker))
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nmodel = {{}}\n")
    done = command(*TOOLS[name](tmp_path, evil))
    record_property("executed", marker.exists())
    assert done.returncode and not marker.exists()
    assert "evil" in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]


@pytest.mark.slow
def test_a_trusted_python_config_runs(tmp_path, marker):
    (tmp_path / "mine.py").write_text(f"open({str(marker)!r}, 'w')\nmodel = {{}}\n")
    opts = opts_of(tmp_path, "MODEL.META_ARCHITECTURE", "LazyConfigDetector")
    file = ("MODEL.LAZY_CONFIG.FILE", tmp_path / "mine.py")
    command("tools/train_net", "--config-file", CONFIGS["faster_rcnn"], "--trust", *opts, *file)
    assert marker.exists()
