# Copyright (c) The mokd_det authors.
"""Evaluators by data set, and results that a machine can read."""

from .build import build_evaluator
from .results import count_parameters, write_results

__all__ = ["build_evaluator", "count_parameters", "write_results"]
