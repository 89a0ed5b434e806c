# Copyright (c) The mokd_det authors.
"""The notebook of the demo: it runs from top to bottom, and is committed without outputs."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from .conftest import ROOT

NOTEBOOK = ROOT / "docs/tutorials/demo.ipynb"
# What datasets/prepare_*.py download, and do not download again.
FETCHED = ("aerial_digits/source", "pretrained")


def test_it_is_short_and_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert len(cells) <= 16
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkout of its own for what the notebook writes."""
    for name in ("configs", "datasets"):
        (tmp_path / name).symlink_to(ROOT / name)
    there = Path(os.environ.get("DETECTRON2_DATASETS", ROOT / "datasets"))
    for name in FETCHED:
        if (there / name).is_dir():
            shutil.copytree(there / name, tmp_path / "data" / name)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    monkeypatch.setenv("DEMO_ITERATIONS", "4")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    return tmp_path


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(folder):
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
    data = [o.data for cell in notebook.cells for o in cell.get("outputs", []) if "data" in o]
    tables = [d["text/html"] for d in data if "<table" in d.get("text/html", "")]
    last = re.findall("<tr>.*?</tr>", tables[-1].rpartition("<table")[2])
    names = [re.sub("<.*?>", " ", row).split()[0] for row in last]
    assert names == ["run", "teacher", "scratch", "mokd"]
    assert sum("image/png" in d for d in data) == 2
    for run in names[1:]:
        assert (folder / "output/notebook" / run / "results.json").is_file()
