# Copyright (c) The mokd_det authors.
"""The mathematics of balancing. Needs torch only; knows no detector."""

from .balancer import Balancer, Decision
from .boundary import Boundary, FeatureBoundary
from .branches import Branch, Parameters
from .build import build_balancer, build_boundary, check_measured
from .gram import (
    cosine,
    dominance,
    gram_by_part,
    gram_matrix,
    on_support,
    outside_support,
    share,
    update_cosine,
)
from .parameters import ParameterBoundary
from .rules import RESCALES, RULES, TORCHJD_PREFIX, Rule, build_rule
from .rules import min_norm_simplex, min_norm_two
from .running import RunningGram, RunningLosses
