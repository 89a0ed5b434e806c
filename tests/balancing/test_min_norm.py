# Copyright (c) The mokd_det authors.
"""Rule ``min_norm``: its optimality, frozen numbers, and TorchJD's MGDA."""

import itertools

import pytest
import torch

from mokd_det.balancing import build_boundary, build_rule, min_norm_simplex, min_norm_two

from .helpers import decide, random_gradients, weights_of


@pytest.mark.parametrize("count", [2, 3, 4])
def test_min_norm_lets_every_objective_descend(count):
    """MGDA's property: the update's inner product with every gradient is at least its own norm."""
    for seed in range(200):
        gradients, losses = random_gradients(seed, count)
        logs = gradients / losses[:, None]
        weights = weights_of("min_norm", gradients, losses)
        shares = weights * losses
        assert (shares >= 0).all() and torch.isclose(shares.sum(), shares.new_ones(()))
        update = weights @ gradients
        products = logs @ update
        assert (products >= update @ update - 1e-9 * (logs @ logs.T).max()).all(), seed


@pytest.mark.parametrize("count", [2, 3, 4])
def test_min_norm_is_minimal_on_a_grid(count):
    steps = 12
    grid = torch.tensor(
        [g for g in itertools.product(range(steps + 1), repeat=count) if sum(g) == steps],
        dtype=torch.float64,
    )
    for seed in range(50):
        gradients, _ = random_gradients(seed, count, size=3)  # linearly dependent for K = 4
        gram = gradients @ gradients.T
        weights = min_norm_simplex(gram)
        best = torch.einsum("ni,ij,nj->n", grid / steps, gram, grid / steps).min()
        assert weights @ gram @ weights <= best + 1e-12 * gram.max(), seed


# Its line search is exact for two gradients; for more it comes near the optimum slowly, and these
# many iterations are enough for the tolerance.
@pytest.mark.parametrize(
    "count, iterations, tolerance", [(2, 100, 1e-6), (3, 1000, 2e-2), (4, 3000, 2e-2)]
)
def test_min_norm_agrees_with_torchjd_on_the_log_gradient_gram(count, iterations, tolerance):
    aggregation = pytest.importorskip("torchjd.aggregation")
    oracle = aggregation.MGDAWeighting(epsilon=1e-9, max_iters=iterations)
    for seed in range(20):
        gradients, losses = random_gradients(seed, count)
        logs = gradients / losses[:, None]
        gram = logs @ logs.T
        ours = weights_of("min_norm", gradients, losses) * losses
        theirs = oracle(gram)
        ours_norm, theirs_norm = ours @ gram @ ours, theirs @ gram @ theirs
        assert ours_norm <= theirs_norm * (1 + 1e-9), seed
        assert torch.isclose(ours_norm, theirs_norm, rtol=tolerance), seed
        assert torch.allclose(ours, theirs, atol=tolerance), seed


def test_min_norm_on_raw_losses_is_mgda():
    aggregation = pytest.importorskip("torchjd.aggregation")
    oracle = aggregation.MGDAWeighting(epsilon=1e-9, max_iters=100)
    for seed in range(20):
        gradients, losses = random_gradients(seed)
        ours = weights_of("min_norm", gradients, losses, log_losses=False)
        assert torch.allclose(ours, oracle(gradients @ gradients.T), atol=1e-6), seed


def test_min_norm_closed_form_frozen_numbers():
    gram = torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    # pi_d = (h_tt - h_td) / (h_tt + h_dd - 2 h_td) = 3 / 4
    assert min_norm_two(gram).tolist() == [0.25, 0.75]
    # h_td > h_dd: the formula leaves the simplex, and clipping takes the smaller gradient alone.
    gram = torch.tensor([[4.0, 2.5], [2.5, 2.0]], dtype=torch.float64)
    assert min_norm_two(gram, clip=False).tolist() == [-0.5 / 1.0, 1.5 / 1.0]
    assert min_norm_two(gram).tolist() == [0.0, 1.0]


def test_min_norm_follows_the_smaller_gradient():
    """The disease: orthogonal gradients with a norm ratio of 0.1 leave the task one percent."""
    gradients = torch.tensor([[1.0, 0.0], [0.0, 0.1]], dtype=torch.float64)
    assert weights_of("min_norm", gradients, torch.ones(2))[1] > 0.99


def test_identical_gradients_share_equally():
    gradients = torch.ones(2, 3, dtype=torch.float64)
    assert weights_of("min_norm", gradients, torch.ones(2)).tolist() == [0.5, 0.5]


def test_opposite_gradients_have_no_common_descent():
    """Min-norm is zero there: a stall by definition, and task_norm has nothing to scale."""
    gradients = torch.tensor([[1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    weights = weights_of("min_norm", gradients, torch.ones(2))
    assert torch.allclose(weights @ gradients, torch.zeros(2, dtype=torch.float64))
    found = decide(build_rule("min_norm"), gradients @ gradients.T, torch.ones(2), "task_norm")
    assert (found.fallback == "undefined") == (found.weights.tolist() == [1.0, 1.0])


def test_numbers_of_objectives_without_an_answer_are_errors():
    with pytest.raises(ValueError, match="MOKD.BALANCING.MIN_NORM.CLIP False"):
        decide(build_rule("min_norm", clip=False), torch.eye(3), torch.ones(3))
    with pytest.raises(ValueError, match="MOKD.BALANCING.MIN_NORM.CLIP False"):
        build_boundary("min_norm", {"clip": False}, objectives=3)
    with pytest.raises(ValueError, match="2 to 4 objectives, not 5: use 'torchjd.MGDA'"):
        build_boundary("min_norm", objectives=5)
    with pytest.raises(ValueError, match="2 to 4 objectives"):
        min_norm_simplex(torch.eye(5, dtype=torch.float64))
