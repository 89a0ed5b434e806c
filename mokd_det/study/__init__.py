# Copyright (c) The mokd_det authors.
"""Studies of many runs: their files, what is kept of each run, tables and pictures of all."""

from .plots import plot_axis, plot_balance, plot_curves
from .record import read_run
from .study import (
    format_table,
    load_study,
    metric_of,
    read_records,
    record_of,
    runs_of,
    summarize,
    values_of,
)

__all__ = [
    "format_table",
    "load_study",
    "metric_of",
    "plot_axis",
    "plot_balance",
    "plot_curves",
    "read_records",
    "read_run",
    "record_of",
    "runs_of",
    "summarize",
    "values_of",
]
