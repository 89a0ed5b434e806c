# Copyright (c) The mokd_det authors.
"""The Gram matrix of several objectives' gradients, and what can be read off it."""

import torch

__all__ = [
    "cosine",
    "dominance",
    "gram_by_part",
    "gram_matrix",
    "repair_gram",
    "share",
    "update_cosine",
    "signal_gram",
    "vanishing",
]


def gram_matrix(gradients):
    """
    Inner products of the objectives' gradients, each a list of tensors (one for each part where
    the gradient is taken: levels, layers, parameters), summed over all of them.

    Args:
        gradients (list[list[Tensor or None]]): K lists of the same length; entries at one
            position have one shape. None stands for zero.

    Returns:
        Tensor: (K, K), symmetric, float32 (float64 if the gradients are), whatever precision the
        gradients have: sums of many small squares do not fit half precision.

    Raises:
        ValueError: all are None.
    """
    return gram_by_part(gradients).sum(0)


def gram_by_part(gradients):
    """
    As :func:`gram_matrix`, without the sum.

    Returns:
        Tensor: (P, K, K), one Gram matrix for each part.
    """
    size = len(gradients)
    example = next((g for objective in gradients for g in objective if g is not None), None)
    if example is None:
        raise ValueError(
            "No objective has a gradient where they are measured: with MOKD.BALANCING.LAYERS name "
            "layers that the features depend on."
        )
    dtype = torch.promote_types(example.dtype, torch.float32)
    zero = torch.zeros((), dtype=dtype, device=example.device)
    products = []
    for part in zip(*gradients):
        flat = [None if g is None else g.detach().reshape(-1).to(dtype) for g in part]
        upper = {
            (i, j): zero if flat[i] is None or flat[j] is None else torch.dot(flat[i], flat[j])
            for i in range(size)
            for j in range(i, size)
        }
        products += [upper[min(i, j), max(i, j)] for i in range(size) for j in range(size)]
    return torch.stack(products).view(-1, size, size)


def signal_gram(mean_gram, sum_of_grams, groups):
    """
    Unbiased inner products of the *expected* gradients (ours).

    The gradient of one batch is signal plus noise, and the noise adds to its squared norm (and to
    the products of objectives that share the batch). Products of gradients from two independent
    groups of samples (micro-batches, processes) have no such bias; this is their average over all
    pairs of different groups, ``(n^2 G - sum_m G_m) / (n (n - 1))``.

    Args:
        mean_gram (Tensor): (K, K) Gram matrix G of the gradients' means over the groups.
        sum_of_grams (Tensor): (K, K) sum of the Gram matrices G_m of each group's gradients.
        groups (int): their number n >= 2.

    Returns:
        Tensor: (K, K), symmetric. Unbiased, hence not always positive semi-definite.
    """
    if groups < 2:
        raise ValueError(f"A signal Gram matrix needs at least 2 groups of samples, not {groups}.")
    return (groups**2 * mean_gram - sum_of_grams) / (groups * (groups - 1))


def repair_gram(gram, reference, floor=1e-3):
    """
    The closest that is a Gram matrix: rules need positive norms and cosines in [-1, 1].

    Args:
        gram (Tensor): (K, K), symmetric, maybe indefinite.
        reference (Tensor): (K, K), a Gram matrix of the same gradients with their noise.
        floor (float): least squared norm, as a part of the reference's. Below it, the signal
            cannot be told from zero.

    Returns:
        Tensor: (K, K), positive semi-definite.
    """
    size = torch.maximum(gram.diagonal(), floor * reference.diagonal()).sqrt()
    sizes = torch.outer(size, size)
    cosines = torch.where(sizes > 0, gram / sizes, torch.zeros_like(gram)).clamp(-1, 1)
    cosines.fill_diagonal_(1)
    if len(gram) > 2:  # cosines of each pair may still contradict each other
        values, vectors = torch.linalg.eigh(cosines)
        cosines = vectors @ torch.diag(values.clamp_min(0)) @ vectors.T
        norm = cosines.diagonal().sqrt()
        cosines = cosines / torch.outer(norm, norm)
    return cosines * sizes


def vanishing(gram):
    """Return (K,) booleans: which gradients are zero, or nothing beside the longest."""
    squares = gram.diagonal()
    return squares <= 1e-20 * squares.max()


def cosine(gram, i, j):
    """Cosine between gradients i and j (conflict if negative); 0 if one of them is zero."""
    norms = torch.sqrt(gram[i, i] * gram[j, j])
    return float(gram[i, j] / norms) if norms > 0 else 0.0


def dominance(gram, i, j):
    """Norm of gradient i over that of gradient j; infinite if only j is zero."""
    if gram[j, j] > 0:
        return float(torch.sqrt(gram[i, i] / gram[j, j]))
    return float("inf") if gram[i, i] > 0 else 1.0


def share(gram, weights, i):
    """
    Part of the weighted gradients' norms that objective i has: ``w_i |g_i| / sum_j w_j |g_j|``.
    Unlike the share of the weights it does not depend on the units of the losses.
    """
    norms = weights.abs() * gram.diagonal().clamp_min(0).sqrt()
    return float(norms[i] / norms.sum()) if norms.sum() > 0 else 0.0


def update_cosine(gram, weights, i):
    """
    Args:
        gram (Tensor): (K, K), of the objectives' gradients.
        weights (Tensor): (K,).
        i (int): an objective.

    Returns:
        float: cosine of the update, ``sum_j w_j g_j``, with the gradient of objective i, in
        [-1, 1] but for rounding; 0 if one of them is zero.
    """
    square = float(weights @ gram @ weights) * float(gram[i, i])
    return float(gram[i] @ weights) / square**0.5 if square > 0 else 0.0
