# Copyright (c) The mokd_det authors.
"""What an installation holds, and how it hangs together."""

import ast
import configparser
import graphlib
import subprocess
import sys
import zipfile

import pytest

from .conftest import ROOT


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


@pytest.mark.slow
def test_a_wheel_has_configs_and_types(tmp_path):
    """And a config of it is found by its name from any folder."""
    command = [sys.executable, "-m", "uv", "build", "--wheel", "-o", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for config in (ROOT / "configs").rglob("*.yaml"):
        assert f"mokd_det/configs/{config.relative_to(ROOT / 'configs')}" in names
    assert "mokd_det/py.typed" in names
    code = (
        "import mokd_det; from mokd_det.config import load_config\n"
        "cfg = load_config('configs/Quick-Start/student_mokd.yaml')\n"
        "print(mokd_det.__file__, load_config('', cfg.MOKD.TEACHER.OPTS).VERSION)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
