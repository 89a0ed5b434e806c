# Copyright (c) The mokd_det authors.
"""Files of others: read without running what is in them."""

from .names import check_class_names, check_file_name, is_class_name, markdown_row
from .names import printable
from .pickles import read_pickle, read_torch
from .torchscript import check_torchscript
from .weights import kind_of, read_checkpoint
