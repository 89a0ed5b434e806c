# Copyright (c) The mokd_det authors.
"""The Gram matrix, and what is read off it."""

import pytest
import torch

from mokd_det.balancing import (
    cosine,
    dominance,
    gram_by_part,
    gram_matrix,
    on_support,
    outside_support,
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


def sparse_task(seed=0):
    """A task's gradient at 2 of 64 positions of each map, and a dense one that agrees there."""
    generator = torch.Generator().manual_seed(seed)
    task = torch.zeros(2, 4, 8, 8)
    task[:, :, 2, 3:5] = torch.randn(2, 4, 2, generator=generator)
    dense = torch.where(task == 0, torch.randn(2, 4, 8, 8, generator=generator), task)
    return task, dense


def test_on_the_support_of_a_sparse_task_agreement_is_seen():
    task, dense = sparse_task()
    gradients = [[task], [dense], [-dense], [torch.randn(2, 4, 8, 8)]]
    gram, outside = gram_matrix(gradients).double(), outside_support(gradients).double()
    assert abs(cosine(gram, 1, 0)) < 0.35
    seen = on_support(gram, outside)
    assert cosine(seen, 1, 0) == pytest.approx(1, abs=1e-5)
    assert cosine(seen, 2, 0) == pytest.approx(-1, abs=1e-5)
    # Norms, and what the others have with each other, stay.
    assert torch.equal(seen.diagonal(), gram.diagonal()) and torch.equal(seen[1:, 1:], gram[1:, 1:])
    inside = (torch.stack([g[0] for g in gradients]) * (task != 0)).square().sum((1, 2, 3, 4))
    assert torch.allclose(outside, gram.diagonal() - inside, atol=1e-4)


def test_the_support_counts_each_sample_and_all_its_levels():
    """One sample with a small gradient, one without any, a level that the task does not reach."""
    task, dense = sparse_task()
    task[0] *= 1e-3
    task[1] = 0
    outside = outside_support([[task, None], [dense, torch.ones(2, 3, 4, 4)]])
    inside = dense[0].square().sum((0,))[2, 3:5].sum()
    total = dense.square().sum() + 2 * 3 * 16
    # Without a gradient nothing can be said: all is inside.
    assert outside[1] == pytest.approx((total - inside - dense[1].square().sum() - 48).item())
    assert outside[0] == 0


def test_vectors_and_a_dense_task_have_no_outside():
    vectors = [[torch.randn(3, 5)], [torch.randn(3, 5)]]
    gram = gram_matrix(vectors)
    assert outside_support(vectors).tolist() == [0, 0]
    assert torch.equal(on_support(gram, outside_support(vectors)), gram)
    maps = [[torch.ones(2, 3, 4, 4)], [torch.randn(2, 3, 4, 4)]]
    assert outside_support(maps).tolist() == [0, 0]


def test_the_support_is_independent_of_scales():
    task, dense = sparse_task()
    outside = outside_support([[task], [dense]])
    scaled = outside_support([[2.0**-20 * task], [2.0**10 * dense]])
    assert scaled[1] == 2.0**20 * outside[1]
