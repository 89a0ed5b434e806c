# Copyright (c) The mokd_det authors.
"""What is the same for every rule: rescaling, intervals, schedules, state, and ranks that agree."""

import pytest
import torch

from mokd_det.balancing import RESCALES, Balancer, build_boundary, build_rule

from .helpers import (
    RULE_NAMES,
    EqualLengths,
    agreeing_gradients,
    decide,
    random_gradients,
    weigh,
    weights_of,
)


def smoothed(name):
    """A balancer with running means, if the rule has any use for them."""
    rule = build_rule(name)
    return Balancer(rule, smoothing=0.5 if rule.reads_gradients else None, steps=10)


def test_rescaling():
    gradients, losses = random_gradients(3)
    gram = gradients @ gradients.T
    raw = weights_of("min_norm", gradients, losses)
    assert torch.isclose(RESCALES["convex"](raw, gram).sum(), raw.new_tensor(1.0))
    assert torch.isclose(RESCALES["sum"](raw, gram).sum(), raw.new_tensor(2.0))
    update = RESCALES["task_norm"](raw, gram) @ gradients
    assert torch.isclose(update.norm(), gradients[0].norm())
    for name in RESCALES:
        rescaled = weights_of("min_norm", gradients, losses, name)
        assert torch.equal(rescaled, RESCALES[name](raw, gram))
        assert torch.allclose(rescaled / rescaled.sum(), raw / raw.sum())
    # Equal weights with "sum" are the plain sum of losses.
    assert RESCALES["sum"](torch.full((2,), 0.3), gram).tolist() == [1.0, 1.0]


def test_rescaling_never_turns_the_update_round():
    """The literal min-norm formula may give weights whose sum is negative."""
    gradients = torch.tensor([[1.0, 0.0], [0.5, 0.05]], dtype=torch.float64)
    losses = torch.tensor([1.0, 0.1], dtype=torch.float64)
    raw = weights_of("min_norm", gradients, losses, clip=False)
    assert raw.sum() < 0 < (gradients @ (raw @ gradients)).min()
    for rescale in ("convex", "sum"):
        rule = build_rule("min_norm", clip=False)
        found = decide(rule, gradients @ gradients.T, losses, rescale)
        assert found.fallback == "undefined" and found.weights.tolist() == [1, 1]


@pytest.mark.parametrize(
    "name, smoothing, schedule",
    [("loss_ratio", 0.98, (0.2, 1.8)), ("min_norm", 0.0, (1.0, 1.0))],
)
def test_a_rules_own_smoothing_and_schedule_are_the_defaults(name, smoothing, schedule):
    own = Balancer(build_rule(name), steps=10)
    assert (own.smoothing, own.schedule) == (smoothing, line(*schedule))
    for value in (0.5, 0.0):
        assert Balancer(build_rule(name), smoothing=value, steps=10).smoothing == value
    for value in ((1.0, 1.0), (0.0, 1.0)):
        assert Balancer(build_rule(name), schedule=value, steps=10).schedule == line(*value)


def line(first, last):
    return ((0.0, first), (1.0, last))


@pytest.mark.parametrize("name", ["fixed", "famo"])
def test_smoothing_is_refused_by_a_rule_that_does_not_look_at_gradients(name):
    message = f"SMOOTHING is 0.5, but rule '{name}' does not look at gradients"
    with pytest.raises(ValueError, match=message):
        build_boundary(name, objectives=2, smoothing=0.5)
    for nothing in (None, 0, 0.0):
        assert Balancer(build_rule(name), smoothing=nothing).smoothing == 0
    # The gate is a weighted sum, too, but of what it sees.
    assert Balancer(build_rule("cosine_gate"), smoothing=0.5).smoothing == 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"smoothing": 1.0}, "MOKD.BALANCING.SMOOTHING is 1.0"),
        ({"smoothing": -0.1}, "MOKD.BALANCING.SMOOTHING is -0.1"),
        ({"smoothing": "0.9x"}, "MOKD.BALANCING.SMOOTHING is 0.9x: expected"),
        ({"interval": 0}, "MOKD.BALANCING.INTERVAL is 0"),
        ({"rescale": "non"}, "MOKD.BALANCING.RESCALE is 'non'"),
        ({"schedule": [1.0]}, "MOKD.BALANCING.SCHEDULE is \\[1.0\\]"),
        ({"schedule": [1.0, -1.0]}, "MOKD.BALANCING.SCHEDULE"),
        ({"schedule": 0.5}, "MOKD.BALANCING.SCHEDULE is 0.5: expected two"),
        ({"schedule": [0.0, 1.0]}, "needs the number of all steps"),
        ({"schedule": [[0, 1], [1, 0]]}, "needs the number of all steps"),
        ({"schedule": [[0, 1]]}, "SCHEDULE is .*rise from 0 to 1, such as"),
        ({"schedule": [[0, 1], [0.9, 1]]}, "rise from 0 to 1"),
        ({"schedule": [[0, 1], [0.5, 1], [0.5, 2], [1, 1]]}, "rise from 0 to 1"),
        ({"schedule": [[0, 1], 0.5, [1, 1]]}, "rise from 0 to 1"),
        ({"schedule": [[0, 1], [1, "x"]]}, "rise from 0 to 1"),
        ({"schedule": [[0, 1], [1, float("nan")]]}, "rise from 0 to 1"),
    ],
)
def test_balancer_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Balancer(EqualLengths(), **options)


def test_interval_reuses_weights_in_between():
    balancer = Balancer(EqualLengths(), interval=3)
    due = []
    for seed in range(7):
        due.append(balancer.due)
        gradients, losses = random_gradients(seed)
        if balancer.due:
            last = weigh(balancer, gradients, losses).weights
        else:
            found = balancer.reuse()
            assert found.gram is None and torch.equal(found.weights, last)
        balancer.end_step()
    assert due == [True, False, True, False, False, True, False]


@pytest.mark.parametrize("gone", [0, 2])
def test_a_gradient_that_vanished_in_a_batch_is_not_left_out_until_the_next_interval(gone):
    balancer = Balancer(EqualLengths(), interval=3)
    gradients, losses = random_gradients(0, 3)
    without = gradients.clone()
    without[gone] = 0
    due = []
    for given in (without, gradients, without, gradients, gradients, gradients):
        due.append(balancer.due)
        if balancer.due:
            found = weigh(balancer, given, losses)
            assert (found.weights > 0).tolist() == [given[i].any() for i in range(3)]
        else:
            assert (balancer.reuse().weights > 0).all()
        balancer.end_step()
    assert due == [True, True, True, False, False, True]


def test_schedule_is_a_straight_line_for_all_but_the_task():
    balancer = Balancer(build_rule("fixed", weights=[2.0, 4.0]), schedule=(0.0, 1.0), steps=5)
    seen = []
    for _ in range(6):  # one more than said: it stays at the end
        seen.append(weigh(balancer, *random_gradients(0)).weights.tolist())
        balancer.end_step()
    assert seen == [[2.0, 4.0 * f] for f in (0, 0.25, 0.5, 0.75, 1.0, 1.0)]


def test_schedule_of_points_warms_up_stays_and_decays():
    points = [[0, 0], [0.2, 1], [0.6, 1], [1, 0.5]]
    balancer = Balancer(build_rule("fixed", weights=[2.0, 4.0]), schedule=points, steps=11)
    seen = []
    for _ in range(12):
        seen.append(weigh(balancer, *random_gradients(0)).weights.tolist())
        balancer.end_step()
    factors = [0, 0.5, 1, 1, 1, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.5]
    assert [w[0] for w in seen] == [2.0] * 12
    assert [w[1] / 4 for w in seen] == pytest.approx(factors)


def test_schedule_goes_on_while_weights_are_reused_and_after_a_resume():
    def make():
        return Balancer(EqualLengths(), interval=3, schedule=(1.0, 0.0), steps=4)

    balancer, (gradients, losses) = make(), random_gradients(0)
    first = weigh(balancer, gradients, losses).weights
    balancer.end_step()
    resumed = make()
    resumed.load_state_dict(balancer.state_dict())
    for other in (balancer, resumed):
        reused = other.reuse().weights
        assert reused[0] == first[0] and torch.allclose(reused[1:], first[1:] * 2 / 3)


@pytest.mark.parametrize("name", [*RULE_NAMES, "torchjd.GradVac"])
def test_state_of_a_balancer_undoes_a_step(name):
    if name.startswith("torchjd"):
        pytest.importorskip("torchjd")
    balancer = smoothed(name)

    def weights(seed):
        balancer.end_step()
        found = weigh(balancer, *random_gradients(seed))
        # Only famo learns from it.
        balancer.rule.update(found.losses, found.losses * torch.tensor([0.9, 0.5 + 0.1 * seed]))
        return found.weights

    weights(0)
    state = balancer.state_dict()
    expected = weights(1)
    balancer.load_state_dict(state)
    weights(2)
    balancer.load_state_dict(state)
    assert torch.equal(weights(1), expected)
    assert balancer.step == 2


def test_projector_weights_are_held_undone_and_resumed_like_weights():
    def make():
        return Balancer(build_rule("loss_ratio"), interval=3, steps=10)

    balancer = make()
    first = weigh(balancer, *random_gradients(0, 3)).projector_weights
    balancer.end_step()
    state = balancer.state_dict()
    other = weigh(balancer, *random_gradients(1, 3)).projector_weights
    assert not torch.equal(first, other)
    resumed = make()
    for restored in (balancer, resumed):
        restored.load_state_dict(state)
        assert torch.equal(restored.reuse().projector_weights, first)


@pytest.mark.parametrize("before, after", [(0.0, 0.5), (0.5, 0.0)])
def test_smoothing_may_change_at_a_resume(before, after):
    first, second = (
        Balancer(build_rule("loss_ratio"), smoothing=s, schedule=(1.0, 1.0))
        for s in (before, after)
    )
    weigh(first, *agreeing_gradients(0))
    second.load_state_dict(first.state_dict())
    fresh = Balancer(build_rule("loss_ratio"), smoothing=after, schedule=(1.0, 1.0))
    found, wanted = (weigh(balancer, *agreeing_gradients(1)) for balancer in (second, fresh))
    assert torch.equal(found.weights, wanted.weights)


@pytest.mark.parametrize("name", RULE_NAMES)
def test_a_non_finite_step_leaves_no_trace(name):
    balancer = smoothed(name)
    gradients, losses = random_gradients(0)
    weigh(balancer, gradients, losses)
    before = balancer.state_dict()
    bad = torch.full((1, 2, 2), float("inf"))
    assert balancer.weigh(bad, losses).fallback == "non_finite"
    assert weigh(balancer, gradients, losses * float("nan")).fallback == "non_finite"
    assert same(before, balancer.state_dict())


def same(first, second):
    """Whether two states are equal."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(v, second[k]) for k, v in first.items())
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return first == second


def test_a_state_is_refused_by_another_rule():
    state = Balancer(build_rule("famo")).state_dict()
    with pytest.raises(ValueError, match="RULE was famo in the checkpoint and is min_norm now"):
        Balancer(build_rule("min_norm")).load_state_dict(state)


def test_ranks_take_the_first_ones_decision_whatever_their_own_was():
    gradients, losses = random_gradients(0)
    told = torch.tensor([[1.0, 0.5], [1.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    for scale in (1.0, 0.0):  # with the latter, this rank found that the gradient has vanished
        scaled = gradients * torch.tensor([[1.0], [scale]])
        balancer = Balancer(build_rule("loss_ratio"), schedule=(1.0, 1.0))
        found = weigh(balancer, scaled, losses, agree=lambda _: told.clone())
        assert torch.equal(found.weights, told[0])
        assert torch.equal(found.projector_weights, told[1])
        assert torch.equal(balancer.weights, told[0])
        assert torch.equal(balancer.projector_weights, told[1])
    found = weigh(Balancer(EqualLengths()), gradients, losses, agree=lambda _: told.clone())
    assert torch.equal(found.weights, told[0]) and found.projector_weights is None
    # The first one's fallback is not held, though this rank had none.
    told[2] = 0
    balancer = Balancer(EqualLengths())
    weigh(balancer, gradients, losses, agree=lambda _: told.clone())
    assert balancer.weights is None
