# Copyright (c) The mokd_det authors.
"""A rule by its name and options."""

import inspect
from typing import Any

from .base import RULES, Rule
from .torchjd import TorchjdRule

TORCHJD_PREFIX = "torchjd."


def build_rule(name: str, **options: Any) -> Rule:
    """
    Args:
        name: in ``RULES``, or ``torchjd.X`` for TorchJD's ``XWeighting``.
        options: of the config's node ``MOKD.BALANCING.<NAME>`` (``TORCHJD``), by lower-case name.

    ValueError: unknown name, or a bad option. ImportError: TorchJD is not installed.
    """
    if name.startswith(TORCHJD_PREFIX):
        return TorchjdRule(name[len(TORCHJD_PREFIX) :], **options)
    cls = RULES.get(name)
    known = inspect.signature(cls).parameters
    if unknown := [key for key in options if key not in known]:
        raise ValueError(
            f"Rule '{name}' has no option {', '.join(unknown)}: expected "
            f"{', '.join(known) or 'none'}."
        )
    return cls(**options)
