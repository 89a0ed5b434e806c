# Copyright (c) The mokd_det authors.
"""What an installation holds, and how it hangs together."""

import ast
import configparser
import graphlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from .conftest import DIGITS, ROOT, TREES


def test_every_package_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "mokd_det").rglob("__init__.py")
    }
    assert listed == found | {"mokd_det.configs"}


def test_imports_between_folders_point_one_way():
    """Those at the top of files. (Types alone and one stand-in of ``compat`` look back.)"""
    imported = {}
    for path in (ROOT / "mokd_det").rglob("*.py"):
        parts = path.relative_to(ROOT / "mokd_det").with_suffix("").parts
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level == len(parts):
                names = [node.module] if node.module else [alias.name for alias in node.names]
                imported.setdefault(parts[0], set()).update(name.split(".")[0] for name in names)
    assert imported["engine"] >= {"tasks", "objectives", "balancing"}
    graphlib.TopologicalSorter(imported).prepare()  # raises CycleError


def test_version_of_the_citation_and_the_changelog():
    import mokd_det

    assert f"version: {mokd_det.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{mokd_det.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("backend", ["", "cpu", "auto"])
def test_set_up_takes_the_build_of_pytorch_that_is_asked_for(tmp_path, backend):
    """By default that of the package registry, with its pins; else without those of CUDA."""
    make = ["make", "--dry-run", "--always-make", "env", f"VENV={tmp_path}"]
    variables = {**os.environ, "TORCH_BACKEND": backend}
    done = subprocess.run(make, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
    (install,) = [line for line in done.stdout.splitlines() if " -r " in line]
    pins = f"{tmp_path}/requirements.txt" if backend else "requirements.txt"
    assert install.endswith(f" -r {pins}")
    assert ("--torch-backend" in install) == bool(backend)
    if backend:
        assert f"--torch-backend {backend} " in install
        (select,) = [line for line in done.stdout.splitlines() if line.startswith("grep ")]
        subprocess.run(select, shell=True, cwd=ROOT, check=True)
        kept = (tmp_path / "requirements.txt").read_text()
        assert "\ntorch==" in kept and "\ntorchvision==" in kept and "\nnumpy==" in kept
        assert not re.search("nvidia|^cuda|^triton", kept, re.MULTILINE)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "uv", "build", "--wheel", "-o", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def mokd(wheel, tmp_path_factory):
    """
    Run the installed command, in a folder: what it prints. The environment is empty but for the
    wheel; what it needs (torch, Detectron2 ...) comes from this one, by a .pth file: to download
    all of it again would take gigabytes.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = str(folder / "bin" / "python")
    command = [sys.executable, "-m", "uv", "pip", "install", "--python", python, "--no-deps"]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # Without the editable mokd_det of that environment: its own .pth files are not read.
    Path(site, "others.pth").write_text(sysconfig.get_path("purelib"))

    def run(where, *args, code=0):
        variables = {"PATH": str(folder / "bin"), "HOME": str(where), "OMP_NUM_THREADS": "1"}
        command = [str(folder / "bin" / "mokd"), *map(str, args)]
        done = subprocess.run(command, cwd=where, env=variables, capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert done.returncode == code, said[-4000:]
        assert "Traceback" not in said
        return said

    return run


@pytest.mark.slow
def test_a_wheel_has_configs_and_types(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for config in (ROOT / "configs").rglob("*.yaml"):
        assert f"mokd_det/configs/{config.relative_to(ROOT / 'configs')}" in names
    assert "mokd_det/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "tools", "studies"))]


@pytest.mark.slow
def test_the_first_hour_with_a_wheel(mokd, tmp_path):
    """In an empty folder with a few photos, on a CPU and without a network."""
    for name in ("train.json", "val.json"):
        shutil.copy(TREES / name, tmp_path)
    for name in ("train", "val"):
        shutil.copytree(TREES / name, tmp_path / name)
    assert f"in {sys.prefix}" not in (said := mokd(tmp_path, "doctor")) and "no problems" in said
    assert "site-packages/mokd_det" in said and str(ROOT) not in said.split("python")[0]
    data = ["--data", "train.json", "train", "--val", "val.json", "val"]
    names = ["--teacher", "ssdlite320_mobilenet_v3_large", "--student", "ssdlite"]
    said = mokd(tmp_path, "init", *names, *data, "--output", "project")
    assert "mokd train --config-file project/student_mokd.yaml" in said

    other = tmp_path / "elsewhere"
    other.mkdir()
    project = tmp_path / "project"
    node = "MODEL.TORCHVISION_DETECTOR"
    short = ["SOLVER.MAX_ITER", 5, "SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", "()"]
    offline = [f"{node}.BACKBONE_WEIGHTS", "", f"{node}.OPTIONS", "{score_thresh: 0.0}"]
    config = ["--config-file", project / "teacher.yaml"]
    mokd(other, "train", *config, *short, *offline, f"{node}.WEIGHTS", "")
    config = ["--config-file", project / "student_mokd.yaml"]
    said = mokd(other, "doctor", *config, *offline)
    assert "teacher      SSD with " in said and "distilled" in said
    mokd(other, "train", *config, *short, *offline)
    weights = project / "runs" / "mokd" / "model_final.pth"
    assert "AP" in json.loads((weights.parent / "results.json").read_text())["bbox"]

    found = [*config, "--weights", weights, "--threshold", 0, "../val", *offline]
    assert "3 photos" in mokd(other, "predict", *found)
    assert json.loads((other / "predictions" / "predictions.json").read_text())
    assert len(list((other / "predictions").glob("*.jpg"))) == 3
    target = ["--format", "torchscript", "--output", "exported"]
    mokd(other, "export", *config, *target, *offline, "MODEL.WEIGHTS", weights)
    assert json.loads((other / "exported" / "export.json").read_text())["parity"]["passed"]
    assert not list(other.glob("output")) and "mokd" in mokd(other, "--version")


@pytest.mark.slow
def test_configs_of_a_wheel_have_names(mokd, tmp_path):
    """From any folder."""
    sets = [["digits", str(DIGITS / "train.npz")]]
    opts = ["SOLVER.UNIT", "iteration", "SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 0]
    opts += ["DATASETS.CLASSIFICATION", sets, "DATASETS.TRAIN", "('digits',)"]
    config = ["--config-file", "Digits/student_scratch.yaml"]
    mokd(tmp_path, "train", *config, *opts, "DATASETS.TEST", "()", "OUTPUT_DIR", "run")
    assert (tmp_path / "run" / "model_final.pth").is_file()
    config = ["--config-file", "configs/Quick-Start/teacher.yaml"]
    said = mokd(tmp_path, "train", *config, "MODEL.DEVICE", "cpu", code=2)
    assert "DATASETS.TRAIN: the annotations of 'neon_trees_train' are missing" in said
    assert "prepare_voc.py of a checkout" in mokd(tmp_path, "check-data", _voc(tmp_path), code=2)


def _voc(folder):
    (folder / "VOC").mkdir()
    (folder / "VOC" / "a.xml").touch()
    return "VOC"
