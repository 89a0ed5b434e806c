# Copyright (c) The mokd_det authors.
"""Rules, one a file."""

from .base import RESCALES, RULES, Rule
from .build import TORCHJD_PREFIX, build_rule
from .cosine_gate import CosineGate
from .famo import Famo
from .fixed import FixedWeights
from .loss_ratio import LossRatio
from .min_norm import MinNorm, min_norm_simplex, min_norm_two
from .torchjd import TorchjdRule
