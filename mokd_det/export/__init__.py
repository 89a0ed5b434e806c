# Copyright (c) The mokd_det authors.
"""The plain student, without a trace of its training."""

from .benchmark import benchmark, check_benchmark, format_benchmark
from .checkpoint import export_checkpoint
from .export import FORMATS, METHODS, check_options, export_model
from .parity import DEFAULT_TOLERANCE, PIXELS

__all__ = [
    "DEFAULT_TOLERANCE",
    "FORMATS",
    "METHODS",
    "PIXELS",
    "benchmark",
    "check_benchmark",
    "check_options",
    "export_checkpoint",
    "export_model",
    "format_benchmark",
]
