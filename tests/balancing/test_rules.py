# Copyright (c) The mokd_det authors.
"""The rules: properties over random gradients, frozen numbers, degenerate cases, and TorchJD."""

import itertools

import pytest
import torch

from mokd_det.balancing import (
    BALANCERS,
    RESCALES,
    Balancer,
    RunningGram,
    RunningLosses,
    balance,
    build_boundary,
    build_rule,
    cosine,
    dominance,
    gram_matrix,
    min_norm_simplex,
    min_norm_two,
    repair_gram,
    share,
    signal_gram,
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


def cosines_of(gradients):
    norms = gradients.norm(dim=1)
    return gradients[1:] @ gradients[0] / norms[1:] / norms[0]


def assert_in_proportion(weights, gradients, parts):
    """Each weighted distillation gradient is as long, beside the others, as ``parts`` says."""
    lengths = weights[1:] * gradients[1:].norm(dim=1)
    assert torch.equal(lengths > 0, parts > 0)
    assert torch.allclose(lengths / lengths.sum().clamp_min(1e-9) * parts.sum(), parts)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("dominance", [0.2, 1.0, 3.0])
def test_constant_dominance_adds_what_agrees_with_the_task(count, dominance):
    for seed in range(200):
        gradients, losses = random_gradients(seed, count)
        weights = weights_of("constant_dominance", gradients, losses, dominance=dominance)
        task, aid = gradients[0], weights[1:] @ gradients[1:]
        trust = ((cosines_of(gradients) - 0.05) / 0.05).clamp(0, 1)
        assert_in_proportion(weights, gradients, trust)
        assert weights[0] == 1
        # As long as it is to be.
        length = dominance * float(trust.max())
        assert aid.norm() == pytest.approx(length * float(task.norm()), rel=1e-9)
        # Several that agree with the task may disagree with each other; none takes from the task.
        assert (task + aid) @ task >= (task @ task) * (1 - 1e-9)


def test_constant_dominance_frozen_numbers():
    # Cosines 0.6 and 0.8 of units that are orthogonal to each other: equal shares, together half
    # as long as the task's.
    gradients = torch.tensor([[0.6, 0.8, 0.0], [10.0, 0.0, 0.0], [0.0, 0.1, 0.0]]).double()
    weights = weights_of("constant_dominance", gradients, torch.ones(3), dominance=0.5)
    assert weights.tolist() == pytest.approx([1.0, 0.125**0.5 / 10, 0.125**0.5 / 0.1])
    assert (weights[1:] @ gradients[1:]).norm() == pytest.approx(0.5)
    # A cosine of 0.075: half of the length. Of 0.05: nothing.
    for cosine_, length in ((0.075, 0.3), (0.05, 0.0)):
        gradients = torch.tensor([[cosine_, (1 - cosine_**2) ** 0.5], [4.0, 0.0]]).double()
        weights = weights_of("constant_dominance", gradients, torch.ones(2), dominance=0.6)
        assert weights.tolist() == pytest.approx([1.0, length / 4], rel=1e-5, abs=1e-7)
    # Orthogonal to each other, with cosines of 0.6 and 0.075: the latter is trusted by half.
    gradients = torch.eye(3)[[2, 0, 1]].double()
    gradients[0] = torch.tensor([0.6, 0.075, (1 - 0.6**2 - 0.075**2) ** 0.5])
    weights = weights_of("constant_dominance", gradients, torch.ones(3), dominance=1.0)
    assert weights[2] / weights[1] == pytest.approx(0.5, rel=1e-5)
    assert (weights[1:] @ gradients[1:]).norm() == pytest.approx(1.0, rel=1e-6)
    # By default three times as long as the task's.
    gradients = torch.tensor([[1.2, 1.6], [4.0, 0.0]]).double()
    weights = weights_of("constant_dominance", gradients, torch.ones(2))
    assert weights.tolist() == pytest.approx([1.0, 1.5])
    # One that conflicts gets nothing, the other all of the length.
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [1.0, 1.0]]).double()
    weights = weights_of("constant_dominance", gradients, torch.ones(3), dominance=1.0)
    assert weights.tolist() == pytest.approx([1.0, 0.0, 0.5**0.5])
    # Nothing but conflict: the task's gradient as it is.
    gradients = torch.tensor([[2.0, 0.0], [-1.0, 1.0]]).double()
    assert weights_of("constant_dominance", gradients, torch.ones(2)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_loss_ratio_adds_logarithms_of_losses_that_agree_with_the_task(count):
    for seed in range(200):
        gradients, losses = random_gradients(seed, count)
        options = {"loss_ratio": {"RATIO": 2.0, "CAP": 1e9}}
        weights = weights_of("loss_ratio", gradients, losses, **options)
        trust = ((cosines_of(gradients) - 0.05) / 0.05).clamp(0, 1)
        logs = gradients / losses[:, None]
        update = losses[0] * (logs[0] + 2 * trust @ logs[1:])
        assert torch.allclose(weights @ gradients, update)
        assert update @ gradients[0] >= gradients[0] @ gradients[0] * (1 - 1e-9)


def test_loss_ratio_frozen_numbers():
    # Cosines 0.6 and 0.075, so trust 1 and 0.5; losses 2 and 10 beside the task's 1.
    gradients = torch.eye(3)[[2, 0, 1]].double()
    gradients[0] = torch.tensor([0.6, 0.075, (1 - 0.6**2 - 0.075**2) ** 0.5])
    losses = torch.tensor([1.0, 2.0, 10.0]).double()
    weights = weights_of("loss_ratio", gradients, losses)
    assert weights.tolist() == pytest.approx([1.0, 4 / 2, 0.5 * 4 / 10], rel=1e-5)
    # Conflict: the task alone.
    gradients = torch.tensor([[2.0, 0.0], [-1.0, 1.0]]).double()
    assert weights_of("loss_ratio", gradients, torch.ones(2)).tolist() == [1.0, 0.0]
    # A loss of next to nothing would have a weight of a million: ten times the task's gradient.
    gradients = torch.tensor([[3.0, 4.0], [0.002, 0.0]]).double()
    weights = weights_of("loss_ratio", gradients, torch.tensor([4.0, 1.6e-5]).double())
    assert weights.tolist() == pytest.approx([1.0, 10 * 5 / 0.002])


def test_running_losses_are_the_geometric_mean_of_ratios_to_the_tasks():
    running = RunningLosses(0.5)
    seen = [[1.0, 2.0, 0.1], [4.0, 2.0, 0.1], [2.0, 8.0, 3.2]]
    found = [running.update(torch.tensor(losses).double()) for losses in seen]
    assert found[0].tolist() == pytest.approx(seen[0])
    # Factors a third and two thirds, then 1/7, 2/7 and 4/7.
    assert found[1].tolist() == pytest.approx(
        [4.0, 4 * (2 * 0.5**2) ** (1 / 3), 4 * (0.1 * 0.025**2) ** (1 / 3)]
    )
    assert found[2].tolist() == pytest.approx(
        [2.0, 2 * (2 * 0.5**2 * 4**4) ** (1 / 7), 2 * (0.1 * 0.025**2 * 1.6**4) ** (1 / 7)]
    )


def test_a_rule_may_see_running_losses_and_what_is_recorded_is_the_batchs():
    balancer = Balancer(build_rule("loss_ratio"), smoothing=0.5, schedule=(1.0, 1.0))
    raw = Balancer(build_rule("loss_ratio"), smoothing=0.0, schedule=(1.0, 1.0))
    gram = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]], dtype=torch.float64)
    for losses in ([1.0, 1.0], [1.0, 8.0]):
        found, plain = (
            b.balance(gram, torch.tensor(losses, dtype=torch.float64)) for b in (balancer, raw)
        )
        assert found.losses.tolist() == losses
    assert found.weights.tolist() == pytest.approx([1.0, 4 / 8 ** (2 / 3)])
    assert plain.weights.tolist() == pytest.approx([1.0, 4 / 8])
    # A loss of zero is not averaged, whether it is the first or not.
    zero = torch.tensor([1.0, 0.0], dtype=torch.float64)
    again = balancer.balance(gram, zero)
    assert torch.equal(again.weights, found.weights) and again.losses.tolist() == [1.0, 0.0]
    late = Balancer(build_rule("loss_ratio"), smoothing=0.5, schedule=(1.0, 1.0))
    late.balance(gram, zero)
    found = late.balance(gram, torch.tensor([1.0, 8.0], dtype=torch.float64))
    assert found.weights.tolist() == pytest.approx([1.0, 4 / 8])


def agreeing_gradients(seed, count=3):
    """As ``random_gradients``, with cosines of 0.5 and more with the task's."""
    gradients, losses = random_gradients(seed, count, size=40)
    units = gradients / gradients.norm(dim=1, keepdim=True)
    sizes = gradients.norm(dim=1, keepdim=True).clamp(0.3, 3)
    agreeing = units + units[0]
    return agreeing / agreeing.norm(dim=1, keepdim=True) * sizes, losses


def test_a_running_loss_stays_its_objectives_while_another_has_vanished():
    balancer = Balancer(build_rule("loss_ratio"), smoothing=0.5, schedule=(1.0, 1.0))
    gradients, losses = torch.eye(3, 3).double() + 0.5, torch.tensor([1.0, 2.0, 16.0]).double()
    for _ in range(60):  # until nothing is left of what the means start from
        first = balancer.balance((gradients @ gradients.T)[None], losses)
    gradients[1] = 0
    losses[1:] *= 4
    second = balancer.balance((gradients @ gradients.T)[None], losses)
    assert first.weights.tolist() == pytest.approx([1.0, 4 / 2, 4 / 16])
    assert second.fallback == "vanished"
    assert second.weights.tolist() == pytest.approx([1.0, 0.0, 4 / 32])


def test_running_losses_are_undone_and_resumed():
    def make():
        return Balancer(build_rule("loss_ratio"), smoothing=0.5, steps=10)

    def weights(balancer, seed):
        gradients, losses = agreeing_gradients(seed)
        found = balancer.balance((gradients @ gradients.T)[None], losses).weights
        balancer.end_step()
        return found

    balancer = make()
    weights(balancer, 0)
    state = balancer.state_dict()
    expected = weights(balancer, 1)
    assert (expected > 0).all()
    resumed = make()
    for restored in (balancer, resumed):
        weights(restored, 2)
        restored.load_state_dict(state)
        assert torch.equal(weights(restored, 1), expected)


@pytest.mark.parametrize("name", ["constant_dominance", "loss_ratio"])
def test_own_parameters_learn_at_the_tasks_pace(name):
    rule = build_rule(name)
    # In conflict or not: |g_task| / |g_k|.
    gradients = torch.tensor([[3.0, 4.0], [-1.0, 0.0], [0.0, 20.0]]).double()
    decided = balance(rule, gradients @ gradients.T, torch.ones(3))
    assert decided.weights[1] == 0
    assert decided.own_weights.tolist() == [1.0, 5.0, 0.25]
    # One that vanished has none; with a gradient that is not finite, the plain sum.
    gradients[1] = 0
    decided = balance(rule, gradients @ gradients.T, torch.ones(3))
    assert decided.own_weights.tolist() == [1.0, 0.0, 0.25]
    gradients[1] = float("nan")
    decided = balance(rule, gradients @ gradients.T, torch.ones(3))
    assert decided.own_weights.tolist() == [1.0, 1.0, 1.0]
    # Other rules: the weights.
    decided = balance(build_rule("anchored"), torch.eye(3), torch.ones(3))
    assert decided.own is None and torch.equal(decided.own_weights, decided.weights)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("cap", [0.2, 0.5, 1.0])
def test_aligned_turns_the_tasks_gradient_by_what_is_orthogonal_to_it(count, cap):
    for seed in range(200):
        gradients, losses = random_gradients(seed, count)
        weights = weights_of("aligned", gradients, losses, cap=cap)
        task, update = gradients[0], weights @ gradients
        assert update.norm() == pytest.approx(float(task.norm()), rel=1e-9)
        assert update @ task >= (task @ task) / (1 + cap**2) ** 0.5 * (1 - 1e-9)
        # As long as its progress along the task's gradient is the task's own.
        weights = weights_of("aligned", gradients, losses, "task_progress", cap=cap)
        update = weights @ gradients
        cosines = cosines_of(gradients)
        assert_in_proportion(weights, gradients, cosines.clamp_min(0))
        assert weights[0] >= 0
        assert update @ task == pytest.approx(float(task @ task), rel=1e-9)
        assert update.norm() <= (1 + cap**2) ** 0.5 * task.norm() * (1 + 1e-9)
        # The distillation's part: as long as it is to be.
        aid = weights[1:] @ gradients[1:] / task.norm()
        full = cap * float(cosines.max().clamp(0, 0.1)) / 0.1
        assert aid.norm() == pytest.approx(full, rel=1e-9)
        # Orthogonal to the task's gradient, there is nothing else in the update.
        across = aid - aid @ task / task.norm() ** 2 * task
        assert torch.allclose(update, task + across * task.norm())


def test_aligned_frozen_numbers():
    # Cosines 0.6 and 0.8 of units that are orthogonal to each other: together they have the
    # task's direction, and half of its length.
    gradients = torch.tensor([[0.6, 0.8, 0.0], [10.0, 0.0, 0.0], [0.0, 0.1, 0.0]]).double()
    weights = weights_of("aligned", gradients, torch.ones(3), cap=0.5)
    assert torch.allclose(weights @ gradients, gradients[0])
    assert weights.tolist() == pytest.approx([0.5, 0.03, 4.0])
    # A cosine of 0.05: half of the length.
    gradients = torch.tensor([[0.05, (1 - 0.05**2) ** 0.5], [4.0, 0.0]]).double()
    weights = weights_of("aligned", gradients, torch.ones(2), "task_progress", cap=0.6)
    assert weights.tolist() == pytest.approx([1 - 0.3 * 0.05, 0.3 / 4])
    # A cosine of 0.6: the turn has a tangent of 0.8.
    gradients = torch.tensor([[1.2, 1.6], [4.0, 0.0]]).double()
    weights = weights_of("aligned", gradients, torch.ones(2))
    assert weights.tolist() == pytest.approx([0.4 / 1.64**0.5, 0.5 / 1.64**0.5])
    # One that conflicts gets nothing, the other all of the length.
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [1.0, 1.0]]).double()
    weights = weights_of("aligned", gradients, torch.ones(3), "task_progress")
    assert weights.tolist() == pytest.approx([1 - 0.5**0.5, 0.0, 0.5**0.5])
    # Nothing but agreement: the update is the task's gradient, by the teacher's alone.
    gradients = torch.tensor([[2.0, 0.0], [5.0, 0.0]]).double()
    assert weights_of("aligned", gradients, torch.ones(2)).tolist() == [0.0, 0.4]
    # Nothing but conflict: the task's gradient as it is.
    gradients = torch.tensor([[2.0, 0.0], [-1.0, 1.0]]).double()
    assert weights_of("aligned", gradients, torch.ones(2)).tolist() == [1.0, 0.0]


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


GUARDED = [
    "aligned",
    "anchored",
    "constant_dominance",
    "loss_ratio",
    "min_norm",
    "protected_min_norm",
]


@pytest.mark.parametrize("name", GUARDED)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_update_ignores_the_scale_of_the_distillation_loss(name, scale):
    for seed in range(50):
        gradients, losses = random_gradients(seed)
        factor = torch.tensor([1.0, scale], dtype=torch.float64)
        update = weights_of(name, gradients, losses) @ gradients
        scaled = gradients * factor[:, None]
        assert torch.allclose(weights_of(name, scaled, losses * factor) @ scaled, update), seed


# Pure functions of Gram matrix and losses that treat all distillation objectives alike.
PURE = [*GUARDED, "cosine_gate", "famo", "imtl_g"]


@pytest.mark.parametrize("name", PURE)
def test_distillation_objectives_are_interchangeable(name):
    for seed in range(50):
        gradients, losses = random_gradients(seed, 3)
        order = [0, 2, 1]
        options = {"weights": [1.0, 0.5, 0.5]}
        weights = weights_of(name, gradients, losses, **options)
        permuted = weights_of(name, gradients[order], losses[order], **options)
        assert torch.allclose(permuted, weights[order], rtol=1e-6, atol=1e-9), seed


def test_rescaling():
    gradients, losses = random_gradients(3)
    gram = gradients @ gradients.T
    raw = weights_of("min_norm", gradients, losses)
    assert torch.isclose(RESCALES["convex"](raw, gram).sum(), raw.new_tensor(1.0))
    assert torch.isclose(RESCALES["sum"](raw, gram).sum(), raw.new_tensor(2.0))
    update = RESCALES["task_norm"](raw, gram) @ gradients
    assert torch.isclose(update.norm(), gradients[0].norm())
    update = RESCALES["task_progress"](raw, gram) @ gradients
    assert torch.isclose(update @ gradients[0], gradients[0] @ gradients[0])
    for rescaled in (RESCALES[name](raw, gram) for name in RESCALES):
        assert torch.allclose(rescaled / rescaled.sum(), raw / raw.sum())
    # Equal weights with "sum" are the plain sum of losses.
    assert RESCALES["sum"](torch.full((2,), 0.3), gram).tolist() == [1.0, 1.0]


def test_every_rule_is_tested_here():
    assert sorted(BALANCERS) == sorted([*PURE, "fixed", "look_ahead"])


ALL_RULES = sorted([*PURE, "fixed"])  # look_ahead needs gradients: see below
# A vanishing gradient is nothing special for them.
BLIND = ("fixed", "famo", "cosine_gate")


@pytest.mark.parametrize("name", ALL_RULES)
@pytest.mark.parametrize("vanished", [0, 1])
def test_vanishing_gradient_leaves_the_other_alone(name, vanished):
    gradients = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    gradients[vanished] = 0
    result = balance(build_rule(name), gradients @ gradients.T, torch.ones(2))
    update = result.weights @ gradients
    assert torch.equal(update, gradients[1 - vanished] * (0.5 if name == "famo" else 1))
    assert result.fallback == ("" if name in BLIND else "vanished")


@pytest.mark.parametrize("name", sorted(set(ALL_RULES) - set(BLIND)))
def test_of_three_gradients_the_rule_decides_among_those_that_do_not_vanish(name):
    for seed in range(20):
        gradients, losses = random_gradients(seed, 3)
        alone = weights_of(name, gradients[[0, 2]], losses[[0, 2]])
        gradients[1] = 0
        result = balance(build_rule(name), gradients @ gradients.T, losses)
        assert result.fallback == "vanished"
        assert torch.equal(result.weights, torch.stack([alone[0], alone.new_zeros(()), alone[1]]))
        gradients[0] = 0
        result = balance(build_rule(name), gradients @ gradients.T, losses)
        assert result.weights.tolist() == [0, 0, 1]


@pytest.mark.parametrize("name", ALL_RULES)
def test_three_parallel_and_opposite_gradients_give_finite_weights(name):
    task = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    other = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    for second, third in ((task, 2 * task), (-task, other), (1e-6 * task, 1e6 * other)):
        gradients = torch.stack([task, second, third])
        weights = weights_of(name, gradients, torch.ones(3), weights=[1.0, 1.0, 1.0])
        assert weights.isfinite().all()
        if name in GUARDED:
            assert (weights @ gradients) @ task >= -1e-6


@pytest.mark.parametrize("name", ALL_RULES)
@pytest.mark.parametrize("rescale", sorted(RESCALES))
def test_parallel_and_opposite_gradients_give_finite_weights(name, rescale):
    task = torch.tensor([3.0, 4.0], dtype=torch.float64)
    for factor in (1.0, 2.0, 0.5, 1e-6, 1e6, -1.0, -2.0):
        gradients = torch.stack([task, factor * task])
        # At a cap of one the task may stall, and a stalled update has no direction to rescale.
        weights = weights_of(name, gradients, torch.ones(2), rescale, cap=0.5)
        assert weights.isfinite().all(), factor
        if name not in ("fixed", "famo", "imtl_g"):  # never a step that raises the task's loss
            assert (weights @ gradients) @ task >= -1e-6, factor


def test_identical_gradients_share_equally():
    gradients = torch.ones(2, 3, dtype=torch.float64)
    assert weights_of("min_norm", gradients, torch.ones(2)).tolist() == [0.5, 0.5]


def test_opposite_gradients_have_no_common_descent():
    """Min-norm is zero there: a stall by definition, and task_norm has nothing to scale."""
    gradients = torch.tensor([[1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    weights = weights_of("min_norm", gradients, torch.ones(2))
    assert torch.allclose(weights @ gradients, torch.zeros(2, dtype=torch.float64))
    result = balance(build_rule("min_norm"), gradients @ gradients.T, torch.ones(2), "task_norm")
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
        ("min_nrom", "none", {}, "expected one of 'aligned', 'anchored', 'constant_dominance'"),
        ("fixed", "non", {}, "MOKD.BALANCING.RESCALE is 'non'"),
        ("fixed", "none", {"weights": [1.0, -1.0]}, "MOKD.BALANCING.WEIGHTS"),
        ("fixed", "none", {"weights": [0.0, 0.0]}, "MOKD.BALANCING.WEIGHTS"),
        ("famo", "none", {"famo": {"LR": 0.0}}, "MOKD.BALANCING.FAMO.LR is 0.0"),
        ("famo", "none", {"famo": {"WEIGHT_DECAY": -1.0}}, "MOKD.BALANCING.FAMO.WEIGHT_DECAY"),
        ("look_ahead", "none", {"look_ahead": {"START": "two"}}, "LOOK_AHEAD.START is 'two'"),
        ("look_ahead", "none", {"look_ahead": {"CAP": 0.5}}, "LOOK_AHEAD.CAP is 0.5"),
        ("look_ahead", "none", {"look_ahead": {"LR": 0}}, "LOOK_AHEAD.LR is 0"),
        ("aligned", "none", {"cap": -1.0}, "MOKD.BALANCING.CAP is -1.0"),
        ("aligned", "none", {"agreement": 0.0}, "MOKD.BALANCING.AGREEMENT is 0.0"),
        ("constant_dominance", "none", {"dominance": 0.0}, "MOKD.BALANCING.DOMINANCE is 0.0"),
        ("constant_dominance", "none", {"agreement": 1.5}, "MOKD.BALANCING.AGREEMENT is 1.5"),
        ("loss_ratio", "none", {"loss_ratio": {"RATIO": 0.0}}, "LOSS_RATIO.RATIO is 0.0"),
        ("loss_ratio", "none", {"loss_ratio": {"CAP": -1.0}}, "LOSS_RATIO.CAP is -1.0"),
        ("loss_ratio", "none", {"agreement": 0.0}, "MOKD.BALANCING.AGREEMENT is 0.0"),
        ("aligned", "none", {"cap": 2.0}, "MOKD.BALANCING.CAP is 2.0"),
        ("anchored", "none", {"cap": 0.0}, "MOKD.BALANCING.CAP is 0.0"),
        ("anchored", "none", {"cap": 2.0}, "MOKD.BALANCING.CAP is 2.0"),
        ("protected_min_norm", "none", {"cap": float("nan")}, "MOKD.BALANCING.CAP"),
    ],
)
def test_bad_options_name_themselves(name, rescale, options, message):
    with pytest.raises(ValueError, match=message):
        Balancer(build_rule(name, **options), rescale)


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


def test_min_norm_on_raw_losses_is_mgda():
    aggregation = pytest.importorskip("torchjd.aggregation")
    oracle = aggregation.MGDAWeighting(epsilon=1e-9, max_iters=20000)
    for seed in range(20):
        gradients, losses = random_gradients(seed)
        ours = weights_of("min_norm", gradients, losses, log_losses=False)
        assert torch.allclose(ours, oracle(gradients @ gradients.T), atol=1e-6), seed


@pytest.mark.parametrize("count", [2, 3])
def test_imtl_g_has_equal_projections_and_agrees_with_torchjd(count):
    aggregation = pytest.importorskip("torchjd.aggregation")
    for seed in range(50):
        gradients, losses = random_gradients(seed, count)
        result = balance(build_rule("imtl_g"), gradients @ gradients.T, losses)
        weights = result.weights
        if result.fallback:
            # Weights that sum to one point uphill for all of three gradients: refused.
            uphill = aggregation.IMTLGWeighting()(gradients @ gradients.T) @ gradients
            assert result.fallback == "undefined" and (gradients @ uphill < 0).all()
            assert weights.tolist() == [1, 1, 1]
            continue
        projections = gradients @ (weights @ gradients) / gradients.norm(dim=1)
        assert torch.allclose(projections, projections[:1].expand(count), rtol=1e-6), seed
        assert torch.isclose(weights.sum(), weights.new_ones(())), seed
        oracle = aggregation.IMTLGWeighting()(gradients @ gradients.T)
        assert torch.allclose(weights, oracle, rtol=1e-4, atol=1e-6), seed


def test_rescaling_never_turns_the_update_round():
    """The literal min-norm formula may give weights whose sum is negative."""
    gradients = torch.tensor([[1.0, 0.0], [0.5, 0.05]], dtype=torch.float64)
    losses = torch.tensor([1.0, 0.1], dtype=torch.float64)
    raw = weights_of("min_norm", gradients, losses, clip=False)
    assert raw.sum() < 0 < (gradients @ (raw @ gradients)).min()
    for rescale in ("convex", "sum"):
        rule = build_rule("min_norm", clip=False)
        result = balance(rule, gradients @ gradients.T, losses, rescale)
        assert result.fallback == "undefined" and result.weights.tolist() == [1, 1]


def test_protected_min_norm_of_three_is_minimal_on_its_part_of_the_simplex():
    steps = 40
    grid = torch.tensor(
        [
            [steps - i - j, i, j]
            for i in range(steps + 1)
            for j in range(steps + 1 - i)
            if steps - i - j >= steps / 2
        ],
        dtype=torch.float64,
    )
    for seed in range(50):
        gradients, losses = random_gradients(seed, 3)
        logs = gradients / losses[:, None]
        gram = logs @ logs.T
        weights = weights_of("protected_min_norm", gradients, losses, cap=1e9)
        shares = weights * losses / (weights * losses).sum()
        best = torch.einsum("ni,ij,nj->n", grid / steps, gram, grid / steps).min()
        assert shares @ gram @ shares <= best * (1 + 1e-9), seed
        assert shares[0] >= 0.5 - 1e-9


def test_imtl_g_makes_two_gradients_equally_long():
    gradients = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    weights = weights_of("imtl_g", gradients, torch.ones(2))
    assert torch.allclose(weights, torch.tensor([0.25, 0.75], dtype=torch.float64))


def test_cosine_gate_closes_on_conflict_only():
    task = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    friend = torch.tensor([0.1, 5.0, 0.0], dtype=torch.float64)
    foe = torch.tensor([-0.1, 0.0, 5.0], dtype=torch.float64)
    options = {"weights": [1.0, 0.3, 0.7]}
    gradients = torch.stack([task, friend, foe])
    assert weights_of("cosine_gate", gradients, torch.ones(3), **options).tolist() == [1, 0.3, 0]
    gradients = torch.stack([task, foe, friend])
    assert weights_of("cosine_gate", gradients, torch.ones(3), **options).tolist() == [1, 0, 0.7]


def test_famo_frozen_numbers():
    """By hand: xi = 0; delta = log before - log after; xi falls along p * (delta - p @ delta)."""
    rule = build_rule("famo")
    losses = torch.tensor([2.0, 1.0], dtype=torch.float64)
    first = rule.weights(torch.eye(2), losses)
    assert torch.allclose(first, torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    # The first fell by 10 %, the second by 5 %: the second gets more. Adam's first step is lr.
    rule.update(losses, torch.tensor([1.8, 0.95], dtype=torch.float64))
    assert torch.allclose(rule.xi.detach(), torch.tensor([-0.025, 0.025], dtype=torch.float64))
    # p = softmax(-0.025, 0.025) = (0.4875026, 0.5124974); weights p / L, divided by their sum.
    raw = torch.tensor([0.4875026 / 2, 0.5124974], dtype=torch.float64)
    assert torch.allclose(rule.weights(torch.eye(2), losses), raw / raw.sum(), atol=1e-7)
    # Second step, by Adam's formulas with weight decay 0.01.
    shares = raw * losses
    delta = torch.tensor([2.0 / 1.5, 1.0 / 1.1], dtype=torch.float64).log()
    gradients = [torch.tensor([0.5, 0.5]) * (d - d.mean()) for d in _deltas()]
    second = shares * (delta - shares @ delta) + 0.01 * torch.tensor([-0.025, 0.025])
    mean = (0.9 * 0.1 * gradients[0] + 0.1 * second) / (1 - 0.9**2)
    square = (0.999 * 0.001 * gradients[0] ** 2 + 0.001 * second**2) / (1 - 0.999**2)
    wanted = torch.tensor([-0.025, 0.025]) - 0.025 * mean / square.sqrt()
    rule.update(losses, torch.tensor([1.5, 1.1], dtype=torch.float64))
    assert torch.allclose(rule.xi.detach(), wanted, atol=1e-6)


def _deltas():
    return [torch.tensor([2.0 / 1.8, 1.0 / 0.95], dtype=torch.float64).log()]


def test_famo_ignores_the_scale_of_a_loss_and_its_state_goes_round():
    losses = torch.tensor([2.0, 1.0], dtype=torch.float64)
    factor = torch.tensor([1.0, 1e3], dtype=torch.float64)
    first, second = build_rule("famo"), build_rule("famo")
    for step in range(5):
        after = losses * torch.tensor([0.9, 0.99 - 0.1 * step], dtype=torch.float64)
        update = first.weights(torch.eye(2), losses)
        scaled = second.weights(torch.eye(2), losses * factor) * factor
        assert torch.allclose(update / update.sum(), scaled / scaled.sum())
        first.update(losses, after)
        second.update(losses * factor, after * factor)
    third = build_rule("famo")
    third.load_state_dict(first.state_dict())
    for rule in (first, third):
        rule.update(losses, losses * torch.tensor([0.5, 0.9]))
    assert torch.equal(first.weights(torch.eye(2), losses), third.weights(torch.eye(2), losses))


def look_ahead_weights(rule, gradients, losses=(1.0, 1.0)):
    rule.observe([[g] for g in gradients])
    return balance(rule, gradients @ gradients.T, torch.tensor(losses)).weights


def test_look_ahead_frozen_numbers():
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    second = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    rule = build_rule("look_ahead", look_ahead={"LR": 0.02, "START": "one"})
    assert look_ahead_weights(rule, first).tolist() == [1.0, 1.0]
    # The last distillation gradient is the fresh task gradient's direction (cosine 1), the last
    # task gradient is orthogonal to it (0): merit 1, and mean / rms of one value is its sign.
    expected = torch.tensor([1.0, 1.0202013400267558], dtype=torch.float64)  # e^0.02
    assert torch.allclose(look_ahead_weights(rule, second), expected)
    # Third step: cosines 0 and 1, merit -1. Means: (0.09 - 0.1) / 0.19; squares: 1.
    expected[1] = torch.tensor(0.02 + 0.02 * (-0.01 / 0.19), dtype=torch.float64).exp()
    assert torch.allclose(look_ahead_weights(rule, second), expected)
    # Without the task's own merit the third step's is 0: mean 0.09 / 0.19, square 0.0099 / 0.0199.
    rule = build_rule("look_ahead", look_ahead={"RELATIVE": False, "START": "one"})
    for gradients in (first, second, second):
        weights = look_ahead_weights(rule, gradients)
    step = 0.02 + 0.02 * (0.09 / 0.19) / (0.0099 / 0.0199) ** 0.5
    assert weights[1] == pytest.approx(torch.tensor(step).exp().item(), rel=1e-6)


def test_look_ahead_keeps_to_its_bounds_and_its_state_goes_round():
    rule = build_rule("look_ahead", look_ahead={"LR": 1.0, "CAP": 10.0, "START": "one"})
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for _ in range(8):
        weights = look_ahead_weights(rule, first)  # the task's own last direction is the better
    assert weights[1] == pytest.approx(1e-3)
    second = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    other = build_rule("look_ahead", look_ahead={"LR": 1.0, "CAP": 10.0, "START": "one"})
    other.load_state_dict(rule.state_dict())
    assert torch.equal(look_ahead_weights(rule, second), look_ahead_weights(other, second))
    rule = build_rule("look_ahead", look_ahead={"LR": 1.0, "RELATIVE": False, "START": "one"})
    for _ in range(8):
        weights = look_ahead_weights(rule, second)
    assert weights[1] == pytest.approx(10.0)


@pytest.mark.parametrize("start", ["loss", "norm"])
def test_look_ahead_ignores_the_scale_of_the_distillation_loss(start):
    rules = [build_rule("look_ahead", look_ahead={"START": start}) for _ in range(2)]
    for seed in range(20):
        gradients, losses = random_gradients(seed)
        scaled = gradients * torch.tensor([[1.0], [1e3]])
        plain = look_ahead_weights(rules[0], gradients, losses.tolist())
        other = look_ahead_weights(rules[1], scaled, [losses[0].item(), 1e3 * losses[1].item()])
        assert torch.allclose(plain[1], 1e3 * other[1], rtol=1e-4), seed


@pytest.mark.parametrize(
    "name, options",
    [
        ("UPGrad", {}),
        ("MGDA", {}),
        ("AlignedMTL", {}),
        ("CAGrad", {"c": 0.5}),
        ("DualProj", {}),
        ("PCGrad", {}),
        ("Mean", {}),
        ("Random", {}),
        ("Constant", {"weights": [0.2, 0.8]}),
        ("GradVac", {"beta": 0.5}),
        ("PCD", {}),
    ],
)
def test_torchjd_weighting_by_name(name, options):
    aggregation = pytest.importorskip("torchjd.aggregation")
    gradients, losses = random_gradients(3)
    gram = gradients @ gradients.T
    rule = build_rule(f"torchjd.{name}", torchjd=options)
    random_state = torch.get_rng_state()
    first = balance(rule, gram, losses).weights
    assert torch.equal(torch.get_rng_state(), random_state)  # nobody else's stream moves

    if name == "Constant":
        options = {"weights": torch.tensor(options["weights"], dtype=torch.float64)}
    oracle = getattr(aggregation, f"{name}Weighting")(**options)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.allclose(first, oracle(gram).double(), rtol=1e-6, atol=1e-9)

    # State, where there is one, and the count of calls go round.
    other = build_rule(f"torchjd.{name}", torchjd=options)
    other.load_state_dict(rule.state_dict())
    gram = gram.flip(0, 1)
    assert torch.equal(balance(rule, gram, losses).weights, balance(other, gram, losses).weights)


@pytest.mark.parametrize("name", ["GradVac", "PCD"])
def test_torchjds_state_of_before_the_first_step_undoes_it(name):
    """Loss scaling skips the first steps of float16."""
    pytest.importorskip("torchjd")
    rule, fresh = build_rule(f"torchjd.{name}"), build_rule(f"torchjd.{name}")
    gradients, losses = random_gradients(3, 3)
    before = rule.state_dict()
    rule.weights(gradients @ gradients.T, losses)
    rule.load_state_dict(before)
    gradients, losses = random_gradients(4, 3)
    gram = gradients @ gradients.T
    assert torch.equal(rule.weights(gram, losses), fresh.weights(gram, losses))


def test_torchjds_options_have_an_entry_for_each_objective():
    pytest.importorskip("torchjd")
    options = {"torchjd": {"pref_vector": [0.5, 0.3, 0.2]}}
    with pytest.raises(ValueError, match="TORCHJD .*of torchjd.UPGrad does not fit 2 objectives"):
        build_boundary("torchjd.UPGrad", objectives=2, **options)
    boundary = build_boundary("torchjd.UPGrad", objectives=3, **options)
    gradients, losses = random_gradients(3, 3)
    gradients[2] = 0
    weights = balance(boundary.balancer.rule, gradients @ gradients.T, losses).weights
    assert len(weights) == 3 and weights.isfinite().all() and (weights[:2] > 0).all()


def test_torchjd_errors(monkeypatch):
    pytest.importorskip("torchjd")
    with pytest.raises(ValueError, match="'torchjd.UpGrad', which does not exist.*torchjd.UPGrad"):
        build_rule("torchjd.UpGrad")
    with pytest.raises(ValueError, match="'torchjd.MoDo', which needs more than a Gram matrix"):
        build_rule("torchjd.MoDo")
    with pytest.raises(ValueError, match="MOKD.BALANCING.TORCHJD {'d': 1} does not fit"):
        build_rule("torchjd.CAGrad", torchjd={"d": 1})
    monkeypatch.setitem(__import__("sys").modules, "torchjd", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[balancers\]'"):
        build_rule("torchjd.UPGrad")


def test_huge_and_tiny_gradients():
    """Gram entries of 1e-30 and 1e30: weights are finite and the promises hold."""
    for scale in (1e-15, 1e15):
        gradients, losses = random_gradients(5)
        for name in ALL_RULES:
            weights = weights_of(name, gradients * scale, losses)
            assert weights.isfinite().all(), name
            assert torch.allclose(weights, weights_of(name, gradients, losses), rtol=1e-6), name


def test_signal_gram_is_unbiased_where_the_batch_is_not():
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[1.0, 0.0, 0.5], [-0.2, 0.3, 0.0]], dtype=torch.float64)
    true = means @ means.T
    groups, trials = 4, 4000
    noise = torch.randn(trials, groups, 1, 3, generator=generator, dtype=torch.float64)
    noise = 2 * noise.expand(-1, -1, 2, -1)  # the objectives share a batch, hence its noise
    samples = means + noise
    mean = samples.mean(1)
    batch = mean @ mean.transpose(1, 2)
    own = (samples @ samples.transpose(2, 3)).sum(1)
    signal = torch.stack([signal_gram(b, o, groups) for b, o in zip(batch, own)])
    error = signal.std(0) / trials**0.5
    assert ((signal.mean(0) - true).abs() < 4 * error).all()
    # What it is good for: the batch sees agreement where there is conflict.
    assert true[0, 1] < 0 < batch.mean(0)[0, 1]


def test_signal_gram_is_the_mean_over_pairs_of_groups():
    samples = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).double()
    pairs = [samples[a] @ samples[b].T for a in range(3) for b in range(3) if a != b]
    mean = samples.mean(0)
    own = sum(s @ s.T for s in samples)
    assert torch.allclose(signal_gram(mean @ mean.T, own, 3), torch.stack(pairs).mean(0))
    with pytest.raises(ValueError, match="at least 2 groups"):
        signal_gram(mean @ mean.T, own, 1)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_repaired_gram_is_a_gram_matrix(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        noisy = torch.randn(count, count, generator=generator, dtype=torch.float64)
        noisy = noisy + noisy.T
        reference = torch.eye(count, dtype=torch.float64)
        repaired = repair_gram(noisy, reference)
        assert torch.linalg.eigvalsh(repaired).min() >= -1e-9
        assert (repaired.diagonal() >= 1e-3 * (1 - 1e-9)).all()
        kept = noisy.diagonal() > 1e-3
        assert torch.allclose(repaired.diagonal()[kept], noisy.diagonal()[kept])
    gradients, _ = random_gradients(0, count)
    gram = gradients @ gradients.T
    assert torch.allclose(repair_gram(gram, gram), gram)


def balancer_weights(balancer, gradients, losses):
    balancer.end_step()
    return balancer.balance((gradients @ gradients.T)[None], losses).weights


def smoothing_factors(smoothing, steps):
    factors = torch.tensor([smoothing**k for k in range(steps)], dtype=torch.float64).flip(0)
    return factors / factors.sum()


@pytest.mark.parametrize("count", [2, 3])
def test_smoothing_is_a_running_mean_of_ratios_and_of_cosines_from_zero_on(count):
    balancer = Balancer(build_rule("anchored"), smoothing=0.8)
    ratios, cosines = [], []
    for seed in range(4):
        gradients, losses = random_gradients(seed, count)
        norms = gradients.norm(dim=1)
        ratios.append(norms / norms[0])
        cosines.append(gradients @ gradients.T / torch.outer(norms, norms))
        result = balancer.balance((gradients @ gradients.T)[None], losses)
        assert torch.allclose(result.gram, gradients @ gradients.T)
    factors = smoothing_factors(0.8, 4)
    sizes = norms[0] * torch.exp(factors @ torch.stack(ratios).log())
    # The cosines' part of the start, orthogonal gradients, is still 0.8^4.
    start = 0.8**4 * torch.eye(count, dtype=torch.float64)
    seen = start + (1 - 0.8**4) * sum(f * c for f, c in zip(factors, cosines))
    mean = torch.outer(sizes, sizes) * seen
    assert torch.allclose(result.seen, mean, rtol=1e-9)
    assert torch.equal(result.weights, build_rule("anchored").weights(result.seen, losses))


def test_smoothing_of_a_signal_is_the_plain_running_mean():
    """Unbiased products may be negative on the diagonal, and only their plain mean is unbiased."""
    balancer = Balancer(build_rule("anchored"), smoothing=0.8)
    grams, signals = [], []
    for seed in range(4):
        gradients, losses = random_gradients(seed)
        grams.append(gradients @ gradients.T)
        signals.append(grams[-1] - 0.1 * torch.eye(2, dtype=torch.float64))
        result = balancer.balance(grams[-1][None], losses, signals[-1])
    factors = smoothing_factors(0.8, 4)
    gram, signal = (sum(f * g for f, g in zip(factors, past)) for past in (grams, signals))
    assert torch.allclose(result.seen, repair_gram(signal, gram))


def test_a_running_gram_hardly_moves_by_one_batch():
    """A task gradient a hundred times as long as usual is one of fifty steps, not all there is."""
    running = RunningGram(0.98)
    usual = torch.tensor([[1.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
    for count in range(1, 101):
        before = running.update(usual)
        assert torch.allclose(before.diagonal(), usual.diagonal())
        assert cosine(before, 0, 1) == pytest.approx(0.3 * (1 - 0.98**count))
    factor = torch.tensor([100.0, 1.0], dtype=torch.float64)
    running.update(usual * torch.outer(factor, factor))
    after = running.update(usual)
    part = 0.02 * 0.98 / (1 - 0.98**102)
    assert dominance(after, 1, 0) == pytest.approx(100**-part)  # 0.90; a plain mean has 0.07
    assert cosine(after, 0, 1) == pytest.approx(0.3 * (1 - 0.98**102))


def test_agreement_by_chance_in_the_first_batches_is_none_to_a_running_gram():
    """The first batch of a teacher that knows other things may have any cosine."""
    running = RunningGram(0.98)
    chance = torch.tensor([[1.0, 0.2], [0.2, 1.0]], dtype=torch.float64)
    assert cosine(running.update(chance), 0, 1) == pytest.approx(0.02 * 0.2)
    against = torch.tensor([[1.0, -0.2], [-0.2, 1.0]], dtype=torch.float64)
    assert cosine(running.update(against), 0, 1) == pytest.approx(-0.02 * 0.02 * 0.2)


def test_a_batch_without_one_gradient_shows_the_mean_of_the_others():
    """Not what this batch says of them: agreement by chance would count in full in it."""
    running = RunningGram(0.9)
    orthogonal = torch.eye(3, dtype=torch.float64) * torch.tensor([1.0, 4.0, 9.0])
    batch = orthogonal.clone()
    batch[0, 1] = batch[1, 0] = 1.0  # a cosine of a half
    batch[2] = batch[:, 2] = 0
    wanted = torch.diag(torch.tensor([1.0, 4.0, 0.0], dtype=torch.float64))
    assert torch.equal(running.update(batch), wanted)  # and so before anything is known
    for _ in range(20):
        running.update(orthogonal)
    assert torch.allclose(running.update(batch), wanted) and running.count == 20


def test_a_running_gram_leaves_a_vanishing_gradient_as_it_is():
    running = RunningGram(0.5)
    gram = torch.tensor([[4.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    gone = torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(running.update(gone), gone)
    running.update(gram)
    assert torch.equal(running.update(gone), gone)
    after = running.update(gram)
    assert torch.allclose(after.diagonal(), gram.diagonal()) and running.count == 2
    assert cosine(after, 0, 1) == pytest.approx(0.5 * (1 - 0.5**2))


@pytest.mark.parametrize("name", ["constant_dominance", "loss_ratio"])
@pytest.mark.parametrize("power", [-5, 4])
def test_running_means_do_not_round_otherwise_in_other_units(power, name):
    """Losses in units that differ by a power of two: the same weights times that, exactly."""
    first, second = (Balancer(build_rule(name), smoothing=0.5, steps=10) for _ in range(2))
    factor = torch.tensor([1.0, 2.0**power, 2.0 ** (-2 * power)], dtype=torch.float64)
    for seed in range(20):
        gradients, losses = agreeing_gradients(seed)
        one = first.balance((gradients @ gradients.T)[None], losses)
        scaled = gradients * factor[:, None]
        other = second.balance((scaled @ scaled.T)[None], losses * factor)
        assert torch.equal(other.weights * factor, one.weights) and (one.weights > 0).all()
        assert torch.equal(other.own_weights * factor, one.own_weights)


@pytest.mark.parametrize(
    "name, smoothing, schedule",
    [
        ("constant_dominance", 0.98, (0.2, 1.8)),
        ("loss_ratio", 0.98, (0.2, 1.8)),
        ("aligned", 0.0, (1.0, 1.0)),
    ],
)
def test_a_rules_own_smoothing_and_schedule_are_the_defaults(name, smoothing, schedule):
    own = Balancer(build_rule(name), steps=10)
    assert (own.smoothing, own.schedule) == (smoothing, schedule)
    for value in (0.5, 0.0):
        assert Balancer(build_rule(name), smoothing=value, steps=10).smoothing == value
    for value in ((1.0, 1.0), (0.0, 1.0)):
        assert Balancer(build_rule(name), schedule=value, steps=10).schedule == value


def test_dominance_rises_from_a_fifth_to_nine_fifths():
    balancer = Balancer(build_rule("constant_dominance"), smoothing=0.0, steps=5)
    gradients = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    dominances = []
    for _ in range(5):
        weights = balancer.balance((gradients @ gradients.T)[None], torch.ones(2)).weights
        dominances.append(weights[1].item() * gradients[1].norm().item())
        balancer.end_step()
    assert dominances == pytest.approx([0.6, 1.8, 3.0, 4.2, 5.4])
    with pytest.raises(ValueError, match=r"schedule \[0.2, 1.8\] needs the number of all steps"):
        Balancer(build_rule("constant_dominance"))


def test_interval_reuses_weights_in_between():
    balancer = Balancer(build_rule("anchored"), interval=3)
    due = []
    for seed in range(7):
        due.append(balancer.due)
        gradients, losses = random_gradients(seed)
        if balancer.due:
            last = balancer.balance((gradients @ gradients.T)[None], losses).weights
        else:
            result = balancer.reuse(losses)
            assert result.gram is None and torch.equal(result.weights, last)
        balancer.end_step()
    assert due == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("gone", [0, 2])
def test_a_gradient_that_vanished_in_a_batch_is_not_left_out_until_the_next_interval(gone):
    balancer = Balancer(build_rule("anchored"), interval=3)
    gradients, losses = random_gradients(0, 3)
    without = gradients.clone()
    without[gone] = 0
    due = []
    for given in (without, gradients, gradients, without, gradients):
        due.append(balancer.due)
        if balancer.due:
            found = balancer.balance((given @ given.T)[None], losses)
            assert (found.weights > 0).tolist() == [given[i].any() for i in range(3)]
        else:
            assert (balancer.reuse(losses).weights > 0).all()
        balancer.end_step()
    assert due == [True, True, False, True, False]


def test_schedule_is_a_straight_line_for_all_but_the_task():
    balancer = Balancer(build_rule("fixed", weights=[2.0, 4.0]), schedule=(0.0, 1.0), steps=5)
    gradients, losses = random_gradients(0)
    seen = []
    for _ in range(6):  # one more than said: it stays at the end
        result = balancer.balance((gradients @ gradients.T)[None], losses)
        seen.append(result.weights.tolist())
        balancer.end_step()
    assert seen == [[2.0, 4.0 * f] for f in (0, 0.25, 0.5, 0.75, 1.0, 1.0)]


def test_schedule_goes_on_while_weights_are_reused_and_after_a_resume():
    def make():
        rule = build_rule("anchored")
        return Balancer(rule, interval=3, schedule=(1.0, 0.0), steps=4)

    balancer, (gradients, losses) = make(), random_gradients(0)
    first = balancer.balance((gradients @ gradients.T)[None], losses).weights
    balancer.end_step()
    resumed = make()
    resumed.load_state_dict(balancer.state_dict())
    for other in (balancer, resumed):
        reused = other.reuse(losses).weights
        assert reused[0] == first[0] and torch.allclose(reused[1:], first[1:] * 2 / 3)


@pytest.mark.parametrize("name", [*ALL_RULES, "torchjd.GradVac"])
def test_state_of_a_balancer_undoes_a_step(name):
    if name.startswith("torchjd"):
        pytest.importorskip("torchjd")
    balancer = Balancer(build_rule(name), smoothing=0.5, steps=10)
    gradients, losses = random_gradients(0)
    balancer_weights(balancer, gradients, losses)
    state = balancer.state_dict()
    expected = balancer_weights(balancer, *random_gradients(1))
    balancer.load_state_dict(state)
    balancer_weights(balancer, *random_gradients(2))
    balancer.load_state_dict(state)
    assert torch.equal(balancer_weights(balancer, *random_gradients(1)), expected)
    assert balancer.step == 2


def balance_of(balancer, seed, count=3, **options):
    gradients, losses = random_gradients(seed, count)
    return balancer.balance((gradients @ gradients.T)[None], losses, **options)


def test_own_weights_are_held_undone_and_resumed_like_weights():
    def make():
        return Balancer(build_rule("constant_dominance"), interval=3, steps=10)

    balancer = make()
    first = balance_of(balancer, 0)
    balancer.end_step()
    state = balancer.state_dict()
    other = balance_of(balancer, 1)
    assert not torch.equal(first.own, other.own)
    resumed = make()
    for restored in (balancer, resumed):
        restored.load_state_dict(state)
        assert torch.equal(restored.reuse(torch.ones(3)).own_weights, first.own)
    # A checkpoint of before there were such weights: the others, until they are computed next.
    del state["own"]
    resumed.load_state_dict(state)
    again = resumed.reuse(torch.ones(3))
    assert torch.equal(again.own_weights, again.weights)


def test_own_weights_are_neither_scheduled_nor_rescaled():
    rule = build_rule("constant_dominance")
    plain = balance_of(Balancer(rule, steps=5), 0)
    off = balance_of(Balancer(rule, "convex", schedule=(0.0, 1.0), steps=5), 0)
    assert off.weights[1:].tolist() == [0.0, 0.0]
    assert torch.equal(off.own, plain.own)


def test_own_weights_of_a_signal_are_the_batchs():
    """The signal may be next to nothing, and the factor would be as large."""
    gradients, losses = random_gradients(0, 3)
    gram = gradients @ gradients.T
    balancer = Balancer(build_rule("constant_dominance"), steps=10)
    found = balance_of(balancer, 0, signal=1e-6 * torch.eye(3))
    norms = gram.diagonal().sqrt()
    assert torch.allclose(found.own, norms[0] / norms)
    gradients[1] = 0  # in this batch
    parts = (gradients @ gradients.T)[None]
    found = balancer.balance(parts, losses, signal=1e-6 * torch.eye(3))
    assert found.own.isfinite().all() and found.own[1] == 0 and found.own[2] > 0


def test_ranks_take_the_first_ones_decision_whatever_their_own_was():
    gradients, losses = random_gradients(0, 2)
    told = torch.tensor([[1.0, 0.5], [1.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    for scale in (1.0, 0.0):  # with the latter, this rank found that the gradient has vanished
        scaled = gradients * torch.tensor([[1.0], [scale]])
        balancer = Balancer(build_rule("constant_dominance"), schedule=(1.0, 1.0))
        found = balancer.balance((scaled @ scaled.T)[None], losses, agree=lambda _: told.clone())
        assert torch.equal(found.weights, told[0]) and torch.equal(found.own, told[1])
        assert torch.equal(balancer.weights, told[0])
    found = balance_of(Balancer(build_rule("anchored")), 0, 2, agree=lambda _: told.clone())
    assert torch.equal(found.weights, told[0]) and found.own is None


@pytest.mark.parametrize("name", ["protected_min_norm", "constant_dominance", "loss_ratio"])
def test_a_non_finite_step_leaves_no_trace(name):
    balancer = Balancer(build_rule(name), smoothing=0.5, steps=10)
    gradients, losses = random_gradients(0)
    balancer.balance((gradients @ gradients.T)[None], losses)
    before = balancer.state_dict()
    bad = torch.full((1, 2, 2), float("inf"))
    assert balancer.balance(bad, losses).fallback == "non_finite"
    after = balancer.state_dict()
    assert all(after[key] is before[key] or after[key] == before[key] for key in before)


@pytest.mark.parametrize("name", ["loss_ratio", "min_norm", "protected_min_norm", "famo"])
def test_rules_on_the_losses_values_refuse_one_below_zero(name):
    gradients, losses = random_gradients(0)
    losses[1] = -0.5
    with pytest.raises(ValueError, match="weighs losses by their values, but .*-0.5"):
        weights_of(name, gradients, losses)
    losses[1] = -1e-9  # rounding
    assert weights_of(name, gradients, losses).isfinite().all()
    losses[1] = -0.5
    assert weights_of("anchored", gradients, losses).isfinite().all()


def test_weights_that_the_rule_does_not_use_are_told(caplog):
    build_boundary("loss_ratio", weights=[1.0, 1.0], steps=10)
    build_boundary("fixed", weights=[1.0, 3.0])
    assert not caplog.records
    build_boundary("loss_ratio", weights=[1.0, 3.0], steps=10)
    assert "WEIGHTS [1.0, 3.0] are not used by MOKD.BALANCING.RULE 'loss_ratio'" in caplog.text


def test_share_does_not_depend_on_units():
    gradients, _ = random_gradients(0)
    gram = gradients @ gradients.T
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    factor = torch.tensor([1.0, 1e3], dtype=torch.float64)
    scaled = gram * torch.outer(factor, factor)
    assert share(gram, weights, 0) == pytest.approx(share(scaled, weights / factor, 0))
    lengths = weights * gradients.norm(dim=1)
    assert share(gram, weights, 0) == pytest.approx(float(lengths[0] / lengths.sum()))


def test_a_state_is_refused_by_another_rule():
    state = Balancer(build_rule("famo")).state_dict()
    with pytest.raises(ValueError, match="RULE was Famo in the checkpoint and is Anchored now"):
        Balancer(build_rule("anchored")).load_state_dict(state)


def test_options_of_famo_are_the_configs_after_loading():
    losses = torch.tensor([2.0, 1.0], dtype=torch.float64)
    first = build_rule("famo")
    first.weights(torch.eye(2), losses)
    first.update(losses, losses / 2)
    second = build_rule("famo", famo={"LR": 0.5})
    second.load_state_dict(first.state_dict())
    assert second.optimizer.param_groups[0]["lr"] == 0.5


def test_signal_without_any_gradient_has_no_cosine():
    zero = torch.zeros(2, 2, dtype=torch.float64)
    assert repair_gram(zero, zero).tolist() == [[0, 0], [0, 0]]


def test_balancer_options_are_checked():
    for options, message in (
        ({"smoothing": 1.0}, "MOKD.BALANCING.SMOOTHING is 1.0"),
        ({"interval": 0}, "MOKD.BALANCING.INTERVAL is 0"),
        ({"rescale": "x"}, "MOKD.BALANCING.RESCALE is 'x'"),
        ({"schedule": [1.0]}, "MOKD.BALANCING.SCHEDULE is \\[1.0\\]"),
        ({"schedule": [1.0, -1.0]}, "MOKD.BALANCING.SCHEDULE"),
        ({"schedule": 0.5}, "MOKD.BALANCING.SCHEDULE is 0.5: expected two"),
        ({"smoothing": "0.9x"}, "MOKD.BALANCING.SMOOTHING is 0.9x: expected"),
        ({"schedule": [0.0, 1.0]}, "needs the number of all steps"),
    ):
        with pytest.raises(ValueError, match=message):
            Balancer(build_rule("fixed"), **options)
    with pytest.raises(ValueError, match="INTERVAL is 2, but rule 'LookAhead' compares"):
        Balancer(build_rule("look_ahead"), interval=2)
