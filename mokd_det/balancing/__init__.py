# Copyright (c) The mokd_det authors.
"""The mathematics of balancing. Needs torch only; knows no detector."""

from . import famo, look_ahead  # noqa: F401  (register their rules)
from .balancer import Balancer
from .boundary import Boundary, FeatureBoundary
from .build import build_boundary
from .gram import (
    cosine,
    dominance,
    gram_by_part,
    gram_matrix,
    repair_gram,
    share,
    signal_gram,
    update_cosine,
)
from .min_norm import min_norm_simplex, min_norm_two
from .parameters import ParameterBoundary
from .rules import BALANCERS, RESCALES, Balance, balance, build_rule
from .running import RunningGram, RunningLosses

__all__ = [
    "BALANCERS",
    "RESCALES",
    "Balance",
    "Balancer",
    "Boundary",
    "FeatureBoundary",
    "ParameterBoundary",
    "RunningGram",
    "RunningLosses",
    "balance",
    "build_boundary",
    "build_rule",
    "cosine",
    "dominance",
    "gram_by_part",
    "gram_matrix",
    "min_norm_simplex",
    "min_norm_two",
    "repair_gram",
    "share",
    "signal_gram",
    "update_cosine",
]
