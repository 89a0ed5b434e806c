# Copyright (c) The mokd_det authors.
"""Studies of many runs: what is kept of each, and pictures of all."""

from .plots import plot_axis, plot_balance, plot_curves
from .record import read_run

__all__ = ["plot_axis", "plot_balance", "plot_curves", "read_run"]
