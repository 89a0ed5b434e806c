# Copyright (c) The mokd_det authors.
"""The rules: properties over random gradients, frozen numbers, degenerate cases, and TorchJD."""

import itertools

import pytest
import torch

from mokd_det.balancing import (
    BALANCERS,
    RESCALES,
    balance,
    build_rule,
    cosine,
    dominance,
    gram_matrix,
    min_norm_simplex,
    min_norm_two,
)


def random_gradients(seed, count=2, size=6):
    """(K, size) gradients whose norms spread over four decades, and positive losses (K,)."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(count, size, generator=generator, dtype=torch.float64)
    gradients *= 10 ** (4 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 2)
    losses = 0.1 + torch.rand(count, generator=generator, dtype=torch.float64)
    return gradients, losses


def weights_of(name, gradients, losses, rescale="none", **options):
    rule = build_rule(name, **options)
    return balance(rule, gradients @ gradients.T, losses, rescale).weights


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


@pytest.mark.parametrize("count", [2, 3, 4])
def test_min_norm_agrees_with_torchjd_on_the_log_gradient_gram(count):
    aggregation = pytest.importorskip("torchjd.aggregation")
    oracle = aggregation.MGDAWeighting(epsilon=1e-9, max_iters=20000)
    for seed in range(20):
        gradients, losses = random_gradients(seed, count)
        logs = gradients / losses[:, None]
        gram = logs @ logs.T
        ours = weights_of("min_norm", gradients, losses) * losses
        theirs = oracle(gram)
        ours_norm, theirs_norm = ours @ gram @ ours, theirs @ gram @ theirs
        assert ours_norm <= theirs_norm * (1 + 1e-9), seed
        # Its line search is exact for two gradients; for more it stops near the optimum.
        tolerance = 1e-6 if count == 2 else 2e-2
        assert torch.isclose(ours_norm, theirs_norm, rtol=tolerance), seed
        assert torch.allclose(ours, theirs, atol=tolerance), seed


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
    weights = weights_of("min_norm", gradients, torch.ones(2))
    assert weights[1] > 0.99
    protected = weights_of("protected_min_norm", gradients, torch.ones(2))
    assert protected.tolist() == [1.0, 1.0]


def test_protected_min_norm_frozen_numbers():
    gradients = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    # Shares 16/17 and 1/17; ratio 1/16 of norm 4 gives 1/4 of the task's norm, below the cap.
    weights = weights_of("protected_min_norm", gradients, torch.ones(2), cap=0.5)
    assert torch.allclose(weights, torch.tensor([1.0, 1 / 16], dtype=torch.float64))
    # A cap of 0.1 binds.
    weights = weights_of("protected_min_norm", gradients, torch.ones(2), cap=0.1)
    assert torch.allclose(weights, torch.tensor([1.0, 0.1 / 4], dtype=torch.float64))


@pytest.mark.parametrize("name", ["protected_min_norm", "anchored"])
@pytest.mark.parametrize("count", [2, 3])
def test_protected_rules_keep_the_task_descending_and_bounded(name, count):
    for seed in range(200):
        gradients, losses = random_gradients(seed, count)
        weights = weights_of(name, gradients, losses, cap=0.5)
        assert weights[0] == 1 and (weights >= 0).all()
        task, aid = gradients[0], weights[1:] @ gradients[1:]
        assert aid.norm() <= 0.5 * task.norm() * (1 + 1e-9)
        assert (task + aid) @ task >= 0.5 * (task @ task) * (1 - 1e-9)


def test_anchored_solves_its_problem():
    """The closed form beats every point of a fine grid of the ball around the task gradient."""
    angles = torch.linspace(0, 2 * torch.pi, 721, dtype=torch.float64)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    for seed in range(50):
        gradients, losses = random_gradients(seed, size=2)
        units = gradients / gradients.norm(dim=1, keepdim=True)
        update = weights_of("anchored", gradients, losses, cap=0.7) @ gradients
        worse = (units @ update).min()
        for radius in (0.0, 0.3, 0.7):
            others = gradients[0] + radius * gradients[0].norm() * circle
            assert worse >= (others @ units.T).min(dim=1).values.max() - 1e-9, seed


@pytest.mark.parametrize("name", ["min_norm", "protected_min_norm", "anchored"])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_update_ignores_the_scale_of_the_distillation_loss(name, scale):
    for seed in range(50):
        gradients, losses = random_gradients(seed)
        factor = torch.tensor([1.0, scale], dtype=torch.float64)
        update = weights_of(name, gradients, losses) @ gradients
        scaled = gradients * factor[:, None]
        assert torch.allclose(weights_of(name, scaled, losses * factor) @ scaled, update), seed


@pytest.mark.parametrize("name", sorted(set(BALANCERS) - {"fixed"}))
def test_distillation_objectives_are_interchangeable(name):
    for seed in range(50):
        gradients, losses = random_gradients(seed, 3)
        order = [0, 2, 1]
        weights = weights_of(name, gradients, losses)
        permuted = weights_of(name, gradients[order], losses[order])
        assert torch.allclose(permuted, weights[order], rtol=1e-6, atol=1e-9), seed


def test_rescaling():
    gradients, losses = random_gradients(3)
    gram = gradients @ gradients.T
    raw = weights_of("min_norm", gradients, losses)
    assert torch.isclose(RESCALES["convex"](raw, gram).sum(), raw.new_tensor(1.0))
    assert torch.isclose(RESCALES["sum"](raw, gram).sum(), raw.new_tensor(2.0))
    update = RESCALES["task_norm"](raw, gram) @ gradients
    assert torch.isclose(update.norm(), gradients[0].norm())
    for rescaled in (RESCALES[name](raw, gram) for name in RESCALES):
        assert torch.allclose(rescaled / rescaled.sum(), raw / raw.sum())
    # Equal weights with "sum" are the plain sum of losses.
    assert RESCALES["sum"](torch.full((2,), 0.3), gram).tolist() == [1.0, 1.0]


ALL_RULES = sorted(BALANCERS)


@pytest.mark.parametrize("name", ALL_RULES)
@pytest.mark.parametrize("vanished", [0, 1])
def test_vanishing_gradient_leaves_the_other_alone(name, vanished):
    gradients = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    gradients[vanished] = 0
    result = balance(build_rule(name), gradients @ gradients.T, torch.ones(2))
    update = result.weights @ gradients
    assert torch.equal(update, gradients[1 - vanished])
    assert result.fallback == ("" if name == "fixed" else "vanished")


@pytest.mark.parametrize("name", ALL_RULES)
@pytest.mark.parametrize("rescale", sorted(RESCALES))
def test_parallel_and_opposite_gradients_give_finite_weights(name, rescale):
    task = torch.tensor([3.0, 4.0], dtype=torch.float64)
    for factor in (1.0, 2.0, 0.5, 1e-6, 1e6, -1.0, -2.0):
        gradients = torch.stack([task, factor * task])
        weights = weights_of(name, gradients, torch.ones(2), rescale)
        assert weights.isfinite().all(), factor
        if name != "fixed":  # never a step that raises the task's loss
            assert (weights @ gradients) @ task >= -1e-6, factor


def test_identical_gradients_share_equally():
    gradients = torch.ones(2, 3, dtype=torch.float64)
    assert weights_of("min_norm", gradients, torch.ones(2)).tolist() == [0.5, 0.5]


def test_opposite_gradients_have_no_common_descent():
    """Min-norm is zero there: a stall by definition, and task_norm has nothing to scale."""
    gradients = torch.tensor([[1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    weights = weights_of("min_norm", gradients, torch.ones(2))
    assert torch.allclose(weights @ gradients, torch.zeros(2, dtype=torch.float64))
    result = balance(
        build_rule("min_norm"), gradients @ gradients.T, torch.ones(2), "task_norm"
    )
    assert (result.fallback == "undefined") == (result.weights.tolist() == [1.0, 1.0])


@pytest.mark.parametrize("name", ALL_RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gives_the_plain_sum(name, bad):
    gram = torch.tensor([[1.0, bad], [bad, 1.0]])
    result = balance(build_rule(name), gram, torch.ones(2), "sum")
    assert result.weights.tolist() == [1.0, 1.0] and result.fallback == "non_finite"
    result = balance(build_rule(name), torch.eye(2), torch.tensor([1.0, bad]), "sum")
    assert result.weights.tolist() == [1.0, 1.0] and result.fallback == "non_finite"


def test_loss_of_zero_has_a_floor():
    gradients, _ = random_gradients(0)
    losses = torch.tensor([1.0, 0.0])
    for name in ALL_RULES:
        assert weights_of(name, gradients, losses).isfinite().all()


def test_fixed_weights():
    gradients, losses = random_gradients(0)
    assert weights_of("fixed", gradients, losses, weights=[1.0, 0.3]).tolist() == [1.0, 0.3]


@pytest.mark.parametrize(
    "name, rescale, options, message",
    [
        ("min_nrom", "none", {}, "expected one of 'anchored', 'fixed', 'min_norm'"),
        ("fixed", "non", {}, "MOKD.BALANCING.RESCALE is 'non'"),
        ("fixed", "none", {"weights": [1.0, -1.0]}, "MOKD.BALANCING.WEIGHTS"),
        ("fixed", "none", {"weights": [0.0, 0.0]}, "MOKD.BALANCING.WEIGHTS"),
        ("anchored", "none", {"cap": 0.0}, "MOKD.BALANCING.CAP is 0.0"),
        ("anchored", "none", {"cap": 2.0}, "MOKD.BALANCING.CAP is 2.0"),
        ("protected_min_norm", "none", {"cap": float("nan")}, "MOKD.BALANCING.CAP"),
    ],
)
def test_bad_options_name_themselves(name, rescale, options, message):
    with pytest.raises(ValueError, match=message):
        build_rule(name, **options)


def test_objectives_without_a_weight_and_unclipped_k3_are_errors():
    gram = torch.eye(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="2 entries for 3 objectives"):
        balance(build_rule("fixed"), gram, torch.ones(3))
    with pytest.raises(ValueError, match="MOKD.BALANCING.CLIP False"):
        balance(build_rule("min_norm", clip=False), gram, torch.ones(3))
    with pytest.raises(ValueError, match="2 to 4 objectives"):
        min_norm_simplex(torch.eye(5, dtype=torch.float64))


def test_gram_matrix_sums_over_places_in_float32():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3), (4,), (1, 2, 2)]
    gradients = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(3)]
    flat = torch.stack([torch.cat([g.flatten() for g in places]) for places in gradients])
    assert torch.allclose(gram_matrix(gradients), flat @ flat.T, rtol=1e-5)
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
