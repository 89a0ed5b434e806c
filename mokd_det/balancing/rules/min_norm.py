# Copyright (c) The mokd_det authors.
"""The published rule: the point of minimal norm in the convex hull of the gradients."""

import itertools

import torch
from torch import Tensor

from .base import RULES, Rule, log_gram

# The faces of the simplex are enumerated: 2^K - 1 small linear systems.
MAX_OBJECTIVES = 4


@RULES.register("min_norm")
class MinNorm(Rule):
    """
    Min-norm on the gradients of the log-losses, as published (DTO-KD, Theorem 3.1, Eq. 10-15).

    With ``h_i = g_i / L_i``, ``pi`` minimises ``|sum_i pi_i h_i|`` over the simplex, and
    ``weights_i = pi_i / L_i``. No objective gets worse to first order. It follows the *smaller*
    gradient, so a small distillation gradient can dominate.
    """

    def __init__(self, clip: bool = True, log_losses: bool = True):
        """
        Args:
            clip: False for the literal formula without the bounds of the simplex (K = 2).
            log_losses: False for MGDA (Sener and Koltun 2018): the scale of a loss then matters.
        """
        self.clip = clip
        self.log_losses = self.needs_positive_losses = log_losses

    def check_objectives(self, count: int) -> None:
        if not self.clip and count != 2:
            raise ValueError(
                f"MOKD.BALANCING.MIN_NORM.CLIP False is defined for 2 objectives, not {count}."
            )
        if count > MAX_OBJECTIVES:
            raise ValueError(
                f"MOKD.BALANCING.RULE 'min_norm' is exact for 2 to {MAX_OBJECTIVES} objectives, "
                f"not {count}: use 'torchjd.MGDA', or fewer MOKD.OBJECTIVES."
            )

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        self.check_objectives(len(gram))
        if not self.log_losses:
            losses = torch.ones_like(losses)
        logs = log_gram(gram, losses)
        return (min_norm_simplex(logs) if self.clip else min_norm_two(logs, clip=False)) / losses


def min_norm_two(gram: Tensor, clip: bool = True) -> Tensor:
    """
    Closed form for two gradients (DTO-KD, Theorem 3.1; the two-task case of MGDA).

    Args:
        gram: (2, 2).
        clip: False gives the literal formula, whose weights may be negative: the minimum over the
            line, not the segment. Its update vanishes for parallel gradients of different norm.

    Returns:
        (2,) weights that sum to one; equal for equal gradients, where all have the same norm.
    """
    first, second, both = gram[0, 0], gram[1, 1], gram[0, 1]
    distance = first + second - 2 * both  # |g_0 - g_1|^2
    if distance <= 1e-12 * (first + second):
        return torch.full_like(gram[0], 0.5)
    weight = (first - both) / distance  # of gradient 1
    if clip:
        weight = weight.clamp(0, 1)
    return torch.stack([1 - weight, weight])


def min_norm_simplex(gram: Tensor) -> Tensor:
    """
    Exact minimum of ``w @ gram @ w`` over the simplex, by its optimality conditions on each face:
    (K,) non-negative weights that sum to one. ValueError unless 2 <= K <= 4.
    """
    size = len(gram)
    if size == 2:
        return min_norm_two(gram)
    if not 2 <= size <= MAX_OBJECTIVES:
        raise ValueError(f"min-norm is exact for 2 to {MAX_OBJECTIVES} objectives, not {size}.")
    best: tuple[Tensor, Tensor] | None = None  # weights and their squared norm
    for count in range(1, size + 1):
        for face in itertools.combinations(range(size), count):
            if (weights := _min_norm_on_face(gram, list(face))) is None:
                continue
            norm = weights @ gram @ weights
            # Smaller faces come first, so among equal norms the sparsest stays.
            if best is None or norm < best[1] * (1 - 1e-12):
                best = weights, norm
    assert best is not None, "[min_norm_simplex] the Gram matrix is not finite"
    return best[0]


def _min_norm_on_face(gram: Tensor, face: list[int]) -> Tensor | None:
    """Stationary point inside a face of the simplex, or None if it lies outside."""
    sub = gram[face][:, face]
    # Lagrange: sub @ w = c, sum(w) = 1. The pseudo-inverse copes with linearly dependent gradients.
    system = gram.new_zeros(len(face) + 1, len(face) + 1)
    scale = sub.diagonal().max().clamp_min(torch.finfo(gram.dtype).tiny)
    system[:-1, :-1] = sub / scale
    system[:-1, -1] = -1
    system[-1, :-1] = 1
    right = gram.new_zeros(len(face) + 1)
    right[-1] = 1
    solution = torch.linalg.pinv(system) @ right
    inside = solution[:-1]
    if (inside < -1e-9).any() or not torch.isclose(inside.sum(), right[-1], atol=1e-6):
        return None
    weights = gram.new_zeros(len(gram))
    weights[face] = inside.clamp_min(0)
    return weights / weights.sum()
