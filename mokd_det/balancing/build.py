# Copyright (c) The mokd_det authors.
"""From options to a boundary."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .balancer import Balancer, Schedule
from .boundary import Boundary, FeatureBoundary
from .parameters import ParameterBoundary
from .rules import build_rule

MEASURED_AT = ("features", "parameters")


def check_measured(measure_at: str, layers: Sequence[str]) -> None:
    """Raise ValueError unless gradients can be measured there."""
    if measure_at not in MEASURED_AT:
        raise ValueError(
            f"MOKD.BALANCING.MEASURE_AT is '{measure_at}': expected one of {MEASURED_AT}."
        )
    if layers and measure_at != "parameters":
        raise ValueError(
            f"MOKD.BALANCING.LAYERS is {list(layers)}, but features have no layers: leave it "
            "empty, or set MOKD.BALANCING.MEASURE_AT to 'parameters'."
        )


def build_balancer(
    rule: str = "loss_ratio",
    options: Mapping[str, Any] | None = None,
    *,
    objectives: int,
    rescale: str = "none",
    smoothing: float | None = None,
    interval: int | None = None,
    schedule: Schedule | None = None,
    steps: int | None = None,
) -> Balancer:
    """
    Build the :class:`Balancer` of a rule (:func:`build_rule`). ``objectives`` is their number, the
    task included, so that a rule that does not fit fails now. ValueError: an option out of its
    range, or one that changes nothing. ImportError: a rule's library is not installed.
    """
    built = build_rule(rule, **(options or {}))
    built.check_objectives(objectives)
    return Balancer(built, rescale, smoothing, interval, schedule, steps)


def build_boundary(
    rule: str = "loss_ratio",
    options: Mapping[str, Any] | None = None,
    *,
    measure_at: str = "features",
    shared: nn.Module | None = None,
    layers: Sequence[str] = (),
    **balancer: Any,
) -> Boundary:
    """
    Build the boundary of ``measure_at`` ("features" or "parameters"); the latter needs ``shared``,
    see :class:`ParameterBoundary`. Other arguments and errors are :func:`build_balancer`'s.
    ValueError: also options that exclude each other.
    """
    check_measured(measure_at, layers)
    built = build_balancer(rule, options, **balancer)
    if measure_at == "parameters":
        return ParameterBoundary(built, shared, layers)
    return FeatureBoundary(built)
