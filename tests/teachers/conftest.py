# Copyright (c) The mokd_det authors.
"""Students of every family."""

from ..modeling.families import annotated, family_cfg  # noqa: F401  (fixtures)
