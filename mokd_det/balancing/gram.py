# Copyright (c) The mokd_det authors.
"""The Gram matrix of several objectives' gradients, and what can be read off it."""

import torch

__all__ = ["gram_matrix", "cosine", "dominance"]


def gram_matrix(gradients):
    """
    Inner products of the objectives' gradients, each a list of tensors (one for each place where
    the gradient is taken: levels, layers, parameters), summed over all of them.

    Args:
        gradients (list[list[Tensor or None]]): K lists of the same length; entries at one
            position have one shape. None stands for zero.

    Returns:
        Tensor: (K, K), symmetric, float32 (float64 if the gradients are), whatever precision the
        gradients have: sums of many small squares do not fit half precision.
    """
    size = len(gradients)
    example = next(g for objective in gradients for g in objective if g is not None)
    dtype = torch.promote_types(example.dtype, torch.float32)
    gram = torch.zeros(size, size, dtype=dtype, device=example.device)
    for place in zip(*gradients):
        flat = [None if g is None else g.reshape(-1).to(dtype) for g in place]
        for i in range(size):
            for j in range(i, size):
                if flat[i] is not None and flat[j] is not None:
                    gram[i, j] += torch.dot(flat[i], flat[j])
    return torch.triu(gram) + torch.triu(gram, diagonal=1).T


def cosine(gram, i, j):
    """Cosine between gradients i and j (conflict if negative); 0 if one of them is zero."""
    norms = torch.sqrt(gram[i, i] * gram[j, j])
    return float(gram[i, j] / norms) if norms > 0 else 0.0


def dominance(gram, i, j):
    """Norm of gradient i over that of gradient j; infinite if only j is zero."""
    if gram[j, j] > 0:
        return float(torch.sqrt(gram[i, i] / gram[j, j]))
    return float("inf") if gram[i, i] > 0 else 1.0
