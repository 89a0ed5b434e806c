# Copyright (c) The mokd_det authors.
"""Fixtures: students of every family, and classifiers."""

from .classifiers import build  # noqa: F401  (fixtures)
from .families import annotated, family_cfg  # noqa: F401  (fixtures)
