# Copyright (c) The mokd_det authors.
"""Doors for hostile files: what they must never do, and how each has to end."""

import contextlib

import pytest

from mokd_det.config import trust_files


@pytest.fixture(autouse=True)
def nothing_is_trusted():
    trust_files(False)
    yield
    trust_files()


@pytest.fixture
def marker(tmp_path):
    """The file that a hostile file would touch."""
    return tmp_path / "MARKER"


@pytest.fixture
def refused(marker, record_property):
    """A context in which a hostile file is opened: it is refused with one message, and not run."""

    @contextlib.contextmanager
    def opened(match=""):
        with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
            try:
                yield
            finally:
                record_property("executed", marker.exists())
        assert not marker.exists()
        text = str(error.value)
        assert text.isprintable(), text  # and so one line

    return opened
