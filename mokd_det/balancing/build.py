# Copyright (c) The mokd_det authors.
"""From options to a boundary."""

import logging

from .balancer import Balancer
from .boundary import FeatureBoundary
from .parameters import ParameterBoundary
from .rules import FixedWeights, build_rule

__all__ = ["PLACES", "GRAMS", "build_boundary"]

PLACES = ("features", "parameters")
GRAMS = ("batch", "signal")

logger = logging.getLogger(__name__)


def build_boundary(
    rule="loss_ratio",
    place="features",
    shared=None,
    rescale="none",
    gram="batch",
    smoothing=None,
    interval=1,
    schedule=None,
    steps=None,
    layers=(),
    objectives=None,
    **options,
):
    """
    Args:
        rule (str): of ``BALANCERS``, or "torchjd.X".
        place (str): "features" or "parameters".
        shared (nn.Module): for "parameters": the part that makes the features.
        rescale, smoothing, interval, schedule, steps: see :class:`Balancer`.
        gram (str): "batch", or "signal": see :func:`signal_gram`.
        layers: see :class:`ParameterBoundary`.
        objectives (int): their number, to find out now that a rule's options do not fit it.
        options: of the rule, see :func:`build_rule`.

    Returns:
        FeatureBoundary or ParameterBoundary

    Raises:
        ValueError: an option out of its range, or options that exclude each other.
    """
    for option, value, choices in (("PLACE", place, PLACES), ("GRAM", gram, GRAMS)):
        if value not in choices:
            raise ValueError(f"MOKD.BALANCING.{option} is '{value}': expected one of {choices}.")
    built = build_rule(rule, **options)
    if objectives is not None and hasattr(built, "check_objectives"):
        built.check_objectives(objectives)
    weights = options.get("weights", ())
    if any(w != 1 for w in weights) and not isinstance(built, FixedWeights):
        logger.warning(
            f"MOKD.BALANCING.WEIGHTS {list(weights)} are not used by MOKD.BALANCING.RULE '{rule}', "
            "which finds its own: set the rule to 'fixed' if you want them."
        )
    balancer = Balancer(built, rescale, smoothing, interval, schedule, steps)
    if place == "parameters":
        return ParameterBoundary(balancer, shared, layers, gram == "signal")
    if layers:
        raise ValueError(
            f"MOKD.BALANCING.LAYERS is {list(layers)}, but features have no layers: leave it "
            "empty, or set MOKD.BALANCING.PLACE to 'parameters'."
        )
    if gram == "signal":
        raise ValueError(
            "MOKD.BALANCING.GRAM 'signal' multiplies gradients of different samples, which share "
            "no features: set MOKD.BALANCING.PLACE to 'parameters'."
        )
    return FeatureBoundary(balancer)
