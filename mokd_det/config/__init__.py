# Copyright (c) The mokd_det authors.
"""The options of mokd_det, and how configs are read."""

from .. import compat  # first: patches Detectron2 where it needs it
from .defaults import add_mokd_config, declare_options
from .loading import check_device, find_config, get_cfg, load_config, merge_overrides
from .loading import split_overrides, stock_config
from .paths import config_path
from .trust import check_targets, is_trusted, read_lazy_config, trust_files
