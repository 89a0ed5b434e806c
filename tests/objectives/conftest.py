# Copyright (c) The mokd_det authors.
"""Fixtures: students of every family, and classifiers."""

from ..modeling.classifiers import build  # noqa: F401  (fixtures)
from ..modeling.families import annotated, family_cfg  # noqa: F401  (fixtures)
