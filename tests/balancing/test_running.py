# Copyright (c) The mokd_det authors.
"""Running means of Gram matrices and losses."""

import pytest
import torch

from mokd_det.balancing import Balancer, RunningGram, RunningLosses, build_rule, cosine, dominance

from .helpers import EqualLengths, agreeing_gradients, random_gradients, weigh

EVERY_STEP = {"schedule": (1.0, 1.0), "interval": 1}


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
    balancer = Balancer(build_rule("loss_ratio"), smoothing=0.5, **EVERY_STEP)
    raw = Balancer(build_rule("loss_ratio"), smoothing=0.0, **EVERY_STEP)
    gram = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]], dtype=torch.float64)
    for losses in ([1.0, 1.0], [1.0, 8.0]):
        found, plain = (
            b.weigh(gram, torch.tensor(losses, dtype=torch.float64)) for b in (balancer, raw)
        )
        assert found.losses.tolist() == losses
    assert found.weights.tolist() == pytest.approx([1.0, 4 / 8 ** (2 / 3)])
    assert plain.weights.tolist() == pytest.approx([1.0, 4 / 8])
    # A loss of zero is not averaged, whether it is the first or not.
    zero = torch.tensor([1.0, 0.0], dtype=torch.float64)
    again = balancer.weigh(gram, zero)
    assert torch.equal(again.weights, found.weights) and again.losses.tolist() == [1.0, 0.0]
    late = Balancer(build_rule("loss_ratio"), smoothing=0.5, **EVERY_STEP)
    late.weigh(gram, zero)
    found = late.weigh(gram, torch.tensor([1.0, 8.0], dtype=torch.float64))
    assert found.weights.tolist() == pytest.approx([1.0, 4 / 8])


def test_a_running_loss_stays_its_objectives_while_another_has_vanished():
    balancer = Balancer(build_rule("loss_ratio"), smoothing=0.5, **EVERY_STEP)
    gradients, losses = torch.eye(3, 3).double() + 0.5, torch.tensor([1.0, 2.0, 16.0]).double()
    for _ in range(60):  # until nothing is left of what the means start from
        first = weigh(balancer, gradients, losses)
    gradients[1] = 0
    losses[1:] *= 4
    second = weigh(balancer, gradients, losses)
    assert first.weights.tolist() == pytest.approx([1.0, 4 / 2, 4 / 16])
    assert second.fallback == "vanished"
    assert second.weights.tolist() == pytest.approx([1.0, 0.0, 4 / 32])


def test_running_losses_are_undone_and_resumed():
    def make():
        return Balancer(build_rule("loss_ratio"), smoothing=0.5, steps=10, interval=1)

    def weights(balancer, seed):
        found = weigh(balancer, *agreeing_gradients(seed)).weights
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


@pytest.mark.parametrize("count", [2, 3])
def test_smoothing_is_a_running_mean_of_ratios_and_of_cosines_from_zero_on(count):
    balancer = Balancer(EqualLengths(), smoothing=0.8)
    ratios, cosines = [], []
    for seed in range(4):
        gradients, losses = random_gradients(seed, count)
        norms = gradients.norm(dim=1)
        ratios.append(norms / norms[0])
        cosines.append(gradients @ gradients.T / torch.outer(norms, norms))
        found = weigh(balancer, gradients, losses)
        assert torch.allclose(found.gram, gradients @ gradients.T)
    factors = torch.tensor([0.8**k for k in (3, 2, 1, 0)], dtype=torch.float64)
    factors /= factors.sum()
    sizes = norms[0] * torch.exp(factors @ torch.stack(ratios).log())
    # The cosines' part of the start, orthogonal gradients, is still 0.8^4.
    start = 0.8**4 * torch.eye(count, dtype=torch.float64)
    seen = start + (1 - 0.8**4) * sum(f * c for f, c in zip(factors, cosines))
    mean = torch.outer(sizes, sizes) * seen
    assert torch.allclose(found.seen, mean, rtol=1e-9)
    assert torch.equal(found.weights, EqualLengths().weights(found.seen, losses))


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


@pytest.mark.parametrize("power", [-5, 4])
def test_running_means_do_not_round_otherwise_in_other_units(power):
    """Losses in units that differ by a power of two: the same weights times that, exactly."""
    first, second = (
        Balancer(build_rule("loss_ratio"), smoothing=0.5, steps=10, interval=1) for _ in range(2)
    )
    factor = torch.tensor([1.0, 2.0**power, 2.0 ** (-2 * power)], dtype=torch.float64)
    for seed in range(20):
        gradients, losses = agreeing_gradients(seed)
        one = weigh(first, gradients, losses)
        other = weigh(second, gradients * factor[:, None], losses * factor)
        assert torch.equal(other.weights * factor, one.weights) and (one.weights > 0).all()
        assert torch.equal(other.projector_weights * factor, one.projector_weights)
