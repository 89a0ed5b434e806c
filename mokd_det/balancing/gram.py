# Copyright (c) The mokd_det authors.
"""The Gram matrix of several objectives' gradients, and what can be read off it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gram_matrix(gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """
    Return (K, K) inner products of the objectives' gradients, summed over the parts where these are
    taken (levels, layers, parameters); in float32 (float64 if the gradients are), because sums of
    many small squares do not fit half precision.

    Args:
        gradients: K lists, each of one tensor for each part; None stands for zero.

    ValueError: all are None.
    """
    return gram_by_part(gradients).sum(0)


def gram_by_part(gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """As :func:`gram_matrix` without the sum: (P, K, K), one Gram matrix for each part."""
    size = len(gradients)
    example = next((g for objective in gradients for g in objective if g is not None), None)
    if example is None:
        raise ValueError(
            "No objective has a gradient where they are measured: with MOKD.BALANCING.LAYERS name "
            "layers that the features depend on."
        )
    dtype = torch.promote_types(example.dtype, torch.float32)
    zero = torch.zeros((), dtype=dtype, device=example.device)

    def dot(first: Tensor | None, second: Tensor | None) -> Tensor:
        return zero if first is None or second is None else torch.dot(first, second)

    products = []
    for part in zip(*gradients):
        flat = [None if g is None else g.detach().reshape(-1).to(dtype) for g in part]
        upper = {(i, j): dot(flat[i], flat[j]) for i in range(size) for j in range(i, size)}
        products += [upper[min(i, j), max(i, j)] for i in range(size) for j in range(size)]
    return torch.stack(products).view(-1, size, size)


def outside_support(gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """
    Return (K,), how much of each squared norm lies outside the support of the first gradient, the
    task's: at positions of maps (N, C, H, W) where it has less than a tenth of its mean square over
    the positions of that sample. Those hold less than a tenth of it together. Other shapes are
    inside.

    A task looks at boxes, a distance between maps at every position: what they disagree about
    elsewhere says nothing.
    """
    maps = [i for i, part in enumerate(zip(*gradients)) if any(_is_map(g) for g in part)]
    squares = [[_by_position(row[i]) for i in maps] for row in gradients]
    example = next((x for row in squares for x in row if x is not None), None)
    if example is None:
        device = next(g.device for row in gradients for g in row if g is not None)
        return torch.zeros(len(gradients), device=device)
    sizes = [next(x for x in column if x is not None).shape[1] for column in zip(*squares)]
    zeros = [example.new_zeros(len(example), size) for size in sizes]
    joined = [
        torch.cat([z if x is None else x for x, z in zip(row, zeros)], dim=1) for row in squares
    ]
    outside = joined[0] < 0.1 * joined[0].mean(dim=1, keepdim=True)
    return torch.stack([(x * outside).sum() for x in joined])


def _is_map(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.ndim == 4


def _by_position(gradient: Tensor | None) -> Tensor | None:
    """(N, H W) squared norms."""
    return None if gradient is None else gradient.detach().float().square().sum(1).flatten(1)


def on_support(gram: Tensor, outside: Tensor) -> Tensor:
    """
    Return (K, K) ``gram`` with the cosines between the task and the others as they are on the
    support of the task's gradient; ``outside``: of :func:`outside_support`.
    """
    squares = gram.diagonal()
    # What an objective has there at all: below a ten-thousandth nothing can be said.
    inside = (1 - outside / squares).clamp(1e-4, 1)
    inside = torch.where(squares > 0, inside, torch.ones_like(inside))
    norms = squares.sqrt()
    row = (gram[0] / inside.sqrt()).clamp(-norms * norms[0], norms * norms[0])
    changed = gram.clone()
    changed[0, 1:], changed[1:, 0] = row[1:], row[1:]
    return changed


def vanishing(gram: Tensor) -> Tensor:
    """Return (K,) booleans: which gradients are zero, or nothing beside the longest."""
    squares = gram.diagonal()
    return squares <= 1e-20 * squares.max()


def cosine(gram: Tensor, i: int, j: int) -> float:
    """Cosine between gradients i and j (conflict if negative); 0 if one of them is zero."""
    norms = torch.sqrt(gram[i, i] * gram[j, j])
    return float(gram[i, j] / norms) if norms > 0 else 0.0


def dominance(gram: Tensor, i: int, j: int) -> float:
    """Norm of gradient i over that of gradient j; infinite if only j is zero."""
    if gram[j, j] > 0:
        return float(torch.sqrt(gram[i, i] / gram[j, j]))
    return float("inf") if gram[i, i] > 0 else 1.0


def share(gram: Tensor, weights: Tensor, i: int) -> float:
    """Objective i's ``w_i |g_i| / sum_j w_j |g_j|``: independent of the units of the losses."""
    norms = weights.abs() * gram.diagonal().clamp_min(0).sqrt()
    return float(norms[i] / norms.sum()) if norms.sum() > 0 else 0.0


def update_cosine(gram: Tensor, weights: Tensor, i: int) -> float:
    """
    Cosine of the update, ``sum_j w_j g_j``, with gradient i: in [-1, 1] but for rounding; 0 if one
    of them is zero.
    """
    square = float(weights @ gram @ weights) * float(gram[i, i])
    return float(gram[i] @ weights) / square**0.5 if square > 0 else 0.0
