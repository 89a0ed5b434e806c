# Copyright (c) The mokd_det authors.
"""Students of every family."""

from .families import annotated, family_cfg  # noqa: F401  (fixtures)
