# Copyright (c) The mokd_det authors.
"""The studies' scripts are imported by their names, as they import each other."""

import sys

from ..conftest import ROOT

sys.path.insert(0, str(ROOT / "studies"))
