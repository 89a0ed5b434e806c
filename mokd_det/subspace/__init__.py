# Copyright (c) The mokd_det authors.
"""The projection of features into a common subspace. Needs torch only; knows no detector."""

from .losses import FEATURE_LOSSES, align_resolution, build_feature_loss, correlation_distance
from .projector import PROJECTORS, TEACHER_SIDES, SubspaceProjector, standardise

__all__ = [
    "FEATURE_LOSSES",
    "PROJECTORS",
    "TEACHER_SIDES",
    "SubspaceProjector",
    "align_resolution",
    "build_feature_loss",
    "correlation_distance",
    "standardise",
]
