# Copyright (c) The mokd_det authors.
"""What runs did, from the files in their folders, as pictures and as a page."""

from .balance import plot_balance, read_balance
from .page import write_report
from .predictions import found_once
from .runs import Run, read_runs
