# Copyright (c) The mokd_det authors.
"""The Gram matrix, and what is read off it."""

import pytest
import torch

from mokd_det.balancing import (
    cosine,
    dominance,
    gram_by_part,
    gram_matrix,
    share,
    update_cosine,
)

from .helpers import random_gradients


def test_gram_matrix_sums_over_parts_in_float32():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3), (4,), (1, 2, 2)]
    gradients = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(3)]
    flat = torch.stack([torch.cat([g.flatten() for g in parts]) for parts in gradients])
    assert torch.allclose(gram_matrix(gradients), flat @ flat.T, rtol=1e-5)
    first = torch.stack([parts[0].flatten() for parts in gradients])
    assert torch.allclose(gram_by_part(gradients)[0], first @ first.T, rtol=1e-5)
    # 300 squares of 16 each do not fit half precision's 65504 times themselves; the result does.
    half = [[torch.full((300,), 16.0, dtype=torch.float16)]] * 2
    assert gram_matrix(half).dtype == torch.float32
    assert gram_matrix(half)[0, 1] == 300 * 256


def test_gram_matrix_takes_none_for_zero():
    gram = gram_matrix([[torch.ones(2), torch.ones(3)], [None, torch.ones(3)]])
    assert gram.tolist() == [[5.0, 3.0], [3.0, 3.0]]


def test_cosine_and_dominance():
    gram = torch.tensor([[4.0, -1.0], [-1.0, 1.0]])
    assert cosine(gram, 1, 0) == -0.5 and dominance(gram, 1, 0) == 0.5
    zero = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    assert cosine(zero, 1, 0) == 0 and dominance(zero, 1, 0) == 0
    assert dominance(zero, 0, 1) == float("inf")


def test_share_does_not_depend_on_units():
    gradients, _ = random_gradients(0)
    gram = gradients @ gradients.T
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    factor = torch.tensor([1.0, 1e3], dtype=torch.float64)
    scaled = gram * torch.outer(factor, factor)
    assert share(gram, weights, 0) == pytest.approx(share(scaled, weights / factor, 0))
    lengths = weights * gradients.norm(dim=1)
    assert share(gram, weights, 0) == pytest.approx(float(lengths[0] / lengths.sum()))


def test_update_cosine_is_that_of_the_weighted_sum():
    gradients, _ = random_gradients(0, 3)
    gram, weights = gradients @ gradients.T, torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    update = weights @ gradients
    for i in range(3):
        wanted = torch.cosine_similarity(update, gradients[i], dim=0)
        assert update_cosine(gram, weights, i) == pytest.approx(float(wanted))
    assert update_cosine(gram, torch.zeros(3, dtype=torch.float64), 0) == 0
