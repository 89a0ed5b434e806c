# Copyright (c) The mokd_det authors.
"""Runs of the engine are compared by their weights: they evaluate only where a test asks for it."""

import pytest


@pytest.fixture
def make_cfg(make_cfg):
    def make(name, opts=(), folder="run"):
        return make_cfg(name, ["DATASETS.TEST", (), *opts], folder)

    return make
