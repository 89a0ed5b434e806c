# Copyright (c) The mokd_det authors.
"""The mathematics of balancing. Needs torch only; knows no detector."""

from .boundary import FeatureBoundary
from .gram import cosine, dominance, gram_matrix
from .min_norm import min_norm_simplex, min_norm_two
from .rules import BALANCERS, RESCALES, Balance, balance, build_rule

__all__ = [
    "BALANCERS",
    "RESCALES",
    "Balance",
    "FeatureBoundary",
    "balance",
    "build_rule",
    "cosine",
    "dominance",
    "gram_matrix",
    "min_norm_simplex",
    "min_norm_two",
]
