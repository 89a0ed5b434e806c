# Copyright (c) The mokd_det authors.
"""SECURITY.md: a page, and every promise has a test."""

import re
from pathlib import Path

from mokd_det.config.trust import BUILDS_MODELS

from ..conftest import ROOT

PAGE = (ROOT / "SECURITY.md").read_text()


def test_every_promise_has_a_test():
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    rows = re.findall(r"^\| (?!promise|---)(.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) >= 12
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.rsplit(" | ", 1)[1])
        assert named and all(f"def {name}(" in tests for name in named), row


def test_it_is_a_page_and_names_what_is_called():
    assert len(PAGE.split()) < 700
    assert all(f"`{n}`" in PAGE or f"`.{n.split('.')[-1]}`" in PAGE for n in BUILDS_MODELS)
