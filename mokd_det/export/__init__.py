# Copyright (c) The mokd_det authors.
"""The plain student, without a trace of its training."""

from .checkpoint import export_checkpoint

__all__ = ["export_checkpoint"]
