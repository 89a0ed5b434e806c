# Copyright (c) The mokd_det authors.
"""The options of mokd_det, and how configs are read."""

from .defaults import add_mokd_config
from .loading import (
    check_applicable,
    check_device,
    find_config,
    get_cfg,
    load_config,
    merge_overrides,
    split_overrides,
    stock_config,
)

__all__ = [
    "add_mokd_config",
    "check_applicable",
    "check_device",
    "find_config",
    "get_cfg",
    "load_config",
    "merge_overrides",
    "split_overrides",
    "stock_config",
]
