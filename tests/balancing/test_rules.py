# Copyright (c) The mokd_det authors.
"""What holds for every rule: degenerate batches, scales, negative losses; and their registry."""

import pytest
import torch

from mokd_det.balancing import RESCALES, RULES, build_boundary, build_rule

from .helpers import (
    BLIND,
    MEASURED_AT,
    RULE_NAMES,
    SEEING,
    EqualLengths,
    Shared,
    decide,
    net_and_data,
    random_gradients,
    step,
    weights_of,
    with_weights,
)


def test_every_rule_is_tested_here():
    assert list(RULES) == [name for name in RULE_NAMES if not name.startswith("torchjd.")]


def test_an_unknown_rule_is_told_the_known_ones():
    with pytest.raises(ValueError, match="expected one of 'cosine_gate', 'famo', 'fixed', 'loss_r"):
        build_rule("min_nrom")


@pytest.mark.parametrize("name", ["loss_ratio", "min_norm"])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_update_ignores_the_scale_of_the_distillation_loss(name, scale):
    for seed in range(50):
        gradients, losses = random_gradients(seed)
        factor = torch.tensor([1.0, scale], dtype=torch.float64)
        update = weights_of(name, gradients, losses) @ gradients
        scaled = gradients * factor[:, None]
        assert torch.allclose(weights_of(name, scaled, losses * factor) @ scaled, update), seed


@pytest.mark.parametrize("name", RULE_NAMES)
def test_distillation_objectives_are_interchangeable(name):
    options = with_weights(name, [1.0, 0.5, 0.5])
    for seed in range(50):
        gradients, losses = random_gradients(seed, 3)
        order = [0, 2, 1]
        weights = weights_of(name, gradients, losses, **options)
        permuted = weights_of(name, gradients[order], losses[order], **options)
        assert torch.allclose(permuted, weights[order], rtol=1e-6, atol=1e-9), seed


@pytest.mark.parametrize("name", RULE_NAMES)
@pytest.mark.parametrize("vanished", [0, 1])
def test_vanishing_gradient_leaves_the_other_alone(name, vanished):
    gradients = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    gradients[vanished] = 0
    found = decide(build_rule(name), gradients @ gradients.T, torch.ones(2))
    update = found.weights @ gradients
    assert torch.equal(update, gradients[1 - vanished] * (0.5 if name == "famo" else 1))
    assert found.fallback == ("" if name in BLIND else "vanished")


@pytest.mark.parametrize("name", SEEING)
def test_of_three_gradients_the_rule_decides_among_those_that_do_not_vanish(name):
    for seed in range(20):
        gradients, losses = random_gradients(seed, 3)
        alone = weights_of(name, gradients[[0, 2]], losses[[0, 2]])
        gradients[1] = 0
        found = decide(build_rule(name), gradients @ gradients.T, losses)
        assert found.fallback == "vanished"
        assert torch.equal(found.weights, torch.stack([alone[0], alone.new_zeros(()), alone[1]]))
        gradients[0] = 0
        found = decide(build_rule(name), gradients @ gradients.T, losses)
        assert found.weights.tolist() == [0, 0, 1]


@pytest.mark.parametrize("name", RULE_NAMES)
def test_three_parallel_and_opposite_gradients_give_finite_weights(name):
    task = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    other = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    for second, third in ((task, 2 * task), (-task, other), (1e-6 * task, 1e6 * other)):
        gradients = torch.stack([task, second, third])
        weights = weights_of(name, gradients, torch.ones(3))
        assert weights.isfinite().all()
        if name in ("loss_ratio", "min_norm"):
            assert (weights @ gradients) @ task >= -1e-6


@pytest.mark.parametrize("name", RULE_NAMES)
@pytest.mark.parametrize("rescale", sorted(RESCALES))
def test_parallel_and_opposite_gradients_give_finite_weights(name, rescale):
    task = torch.tensor([3.0, 4.0], dtype=torch.float64)
    for factor in (1.0, 2.0, 0.5, 1e-6, 1e6, -1.0, -2.0):
        gradients = torch.stack([task, factor * task])
        weights = weights_of(name, gradients, torch.ones(2), rescale)
        assert weights.isfinite().all(), factor
        # Never a step that raises the task's loss; TorchJD's solver is not that exact.
        if name in ("cosine_gate", "loss_ratio", "min_norm"):
            assert (weights @ gradients) @ task >= -1e-6, factor


@pytest.mark.parametrize("name", RULE_NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gives_the_plain_sum(name, bad):
    gram = torch.tensor([[1.0, bad], [bad, 1.0]])
    found = decide(build_rule(name), gram, torch.ones(2), "sum")
    assert found.weights.tolist() == [1.0, 1.0] and found.fallback == "non_finite"
    found = decide(build_rule(name), torch.eye(2), torch.tensor([1.0, bad]), "sum")
    assert found.weights.tolist() == [1.0, 1.0] and found.fallback == "non_finite"


@pytest.mark.parametrize("name", RULE_NAMES)
def test_loss_of_zero_has_a_floor(name):
    gradients, _ = random_gradients(0)
    assert weights_of(name, gradients, torch.tensor([1.0, 0.0])).isfinite().all()


@pytest.mark.parametrize("name", RULE_NAMES)
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_huge_and_tiny_gradients(name, scale):
    """Gram entries of 1e-30 and 1e30: weights are finite and the promises hold."""
    gradients, losses = random_gradients(5)
    weights = weights_of(name, gradients * scale, losses)
    assert weights.isfinite().all()
    assert torch.allclose(weights, weights_of(name, gradients, losses), rtol=1e-6)


@pytest.mark.parametrize("name", ["loss_ratio", "min_norm", "famo"])
def test_rules_on_the_losses_values_refuse_one_below_zero(name):
    gradients, losses = random_gradients(0)
    losses[1] = -0.5
    with pytest.raises(ValueError, match=f"'{name}' weighs losses by their values, but .*-0.5"):
        weights_of(name, gradients, losses)
    losses[1] = -1e-9  # rounding
    assert weights_of(name, gradients, losses).isfinite().all()


def test_other_rules_take_a_loss_below_zero():
    gradients, losses = random_gradients(0)
    losses[1] = -0.5
    for name in ("fixed", "cosine_gate"):
        assert weights_of(name, gradients, losses).isfinite().all()
    assert weights_of("min_norm", gradients, losses, log_losses=False).isfinite().all()
    assert decide(EqualLengths(), gradients @ gradients.T, losses).weights.isfinite().all()


@pytest.fixture
def own_rule():
    """A user's rule, in all its length."""

    @RULES.register("longest")
    class Longest(EqualLengths):
        """Each gradient at most ``times`` as long as the task's."""

        def __init__(self, times=1.0):
            self.times = times

        def weights(self, gram, losses):
            return torch.cat([losses.new_ones(1), (self.times * super().weights(gram, losses))[1:]])

    yield Longest
    RULES.remove("longest")


@pytest.mark.parametrize("measure_at", MEASURED_AT)
def test_a_users_own_rule_in_one_file(own_rule, measure_at):
    net, x, target = net_and_data()
    boundary = build_boundary(
        "longest", {"times": 0.5}, objectives=2, measure_at=measure_at, shared=Shared(net)
    )
    assert isinstance(boundary.balancer.rule, own_rule)
    found = step(boundary, net, x, target)
    norms = found.gram.diagonal().sqrt()
    assert found.weights.tolist() == pytest.approx([1.0, 0.5 * float(norms[0] / norms[1])])
    # What a rule need not say.
    assert found.fallback == "" and found.projector_weights is None and found.seen is None
    assert boundary.balancer.state_dict()["rule_name"] == "longest"


def test_an_own_rule_is_gone_after_its_test_and_no_name_is_taken_twice():
    assert "longest" not in RULES
    with pytest.raises(KeyError, match="named 'fixed' already"):
        RULES.register("fixed")(EqualLengths)


@pytest.mark.parametrize("answer, got", [(torch.ones(3), r"\(3,\)|\[3\]"), ([1.0, 1.0], "list")])
def test_an_answer_of_another_shape_is_refused(own_rule, monkeypatch, answer, got):
    monkeypatch.setattr(own_rule, "weights", lambda *_: answer)
    net, x, target = net_and_data()
    boundary = build_boundary("longest", objectives=2, shared=Shared(net))
    with pytest.raises(ValueError, match=f"Rule 'longest' returned .*{got}.*: expected a tensor"):
        step(boundary, net, x, target)


def test_an_option_without_a_default_is_refused():
    class Needy(EqualLengths):
        def __init__(self, power):
            self.power = power

    with pytest.raises(TypeError, match="Rule 'needy' takes 'power', .* give it a default"):
        RULES.register("needy")(Needy)
    assert "needy" not in RULES
