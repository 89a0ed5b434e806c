# Copyright (c) The mokd_det authors.
"""Running files in a process without Detectron2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_fresh():
    """From a folder of cases to the results of fresh.py."""

    def run(folder):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(Path(__file__).parent / "fresh.py"), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(done.stdout)

    return run
