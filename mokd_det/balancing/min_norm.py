# Copyright (c) The mokd_det authors.
"""The point of minimal norm in the convex hull of K gradients, from their Gram matrix."""

import itertools

import torch

__all__ = ["min_norm_two", "min_norm_simplex", "MAX_OBJECTIVES"]

# The faces of the simplex are enumerated: 2^K - 1 small linear systems.
MAX_OBJECTIVES = 4


def min_norm_two(gram, clip=True):
    """
    Closed form for two gradients (DTO-KD, Theorem 3.1; the two-task case of MGDA).

    Args:
        gram (Tensor): (2, 2) Gram matrix.
        clip (bool): False gives the literal formula, whose weights may be negative: it is the
            minimum over the line, not over the segment, and its update vanishes for parallel
            gradients of different norm.

    Returns:
        Tensor: (2,) weights that sum to one. Equal if the two gradients are the same vector up
        to rounding, where every weighting has the same norm.
    """
    first, second, both = gram[0, 0], gram[1, 1], gram[0, 1]
    distance = first + second - 2 * both  # |g_0 - g_1|^2
    if distance <= 1e-12 * (first + second):
        return torch.full_like(gram[0], 0.5)
    weight = (first - both) / distance  # of gradient 1
    if clip:
        weight = weight.clamp(0, 1)
    return torch.stack([1 - weight, weight])


def min_norm_simplex(gram):
    """
    Exact minimum of ``w @ gram @ w`` over the simplex, by its optimality conditions on each face.

    Args:
        gram (Tensor): (K, K) Gram matrix, positive semi-definite, 2 <= K <= 4.

    Returns:
        Tensor: (K,) non-negative weights that sum to one.

    Raises:
        ValueError: K is out of range.
    """
    size = len(gram)
    if size == 2:
        return min_norm_two(gram)
    if not 2 <= size <= MAX_OBJECTIVES:
        raise ValueError(f"min-norm is exact for 2 to {MAX_OBJECTIVES} objectives, not {size}.")
    best, best_norm = None, None
    for count in range(1, size + 1):
        for face in itertools.combinations(range(size), count):
            weights = _min_norm_on_face(gram, list(face))
            if weights is None:
                continue
            norm = weights @ gram @ weights
            # Smaller faces come first, so among equal norms the sparsest stays.
            if best is None or norm < best_norm * (1 - 1e-12):
                best, best_norm = weights, norm
    return best


def _min_norm_on_face(gram, face):
    """Stationary point inside a face of the simplex, or None if it lies outside."""
    sub = gram[face][:, face]
    # Lagrange: sub @ w = c, sum(w) = 1. The pseudo-inverse copes with linearly dependent gradients.
    system = torch.zeros(len(face) + 1, len(face) + 1, dtype=gram.dtype, device=gram.device)
    scale = sub.diagonal().max().clamp_min(torch.finfo(gram.dtype).tiny)
    system[:-1, :-1] = sub / scale
    system[:-1, -1] = -1
    system[-1, :-1] = 1
    right = torch.zeros(len(face) + 1, dtype=gram.dtype, device=gram.device)
    right[-1] = 1
    solution = torch.linalg.pinv(system) @ right
    inside = solution[:-1]
    if (inside < -1e-9).any() or not torch.isclose(inside.sum(), right[-1], atol=1e-6):
        return None
    weights = torch.zeros(len(gram), dtype=gram.dtype, device=gram.device)
    weights[face] = inside.clamp_min(0)
    return weights / weights.sum()
