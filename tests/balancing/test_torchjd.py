# Copyright (c) The mokd_det authors.
"""TorchJD's weightings as rules: the same numbers as TorchJD's own, and their state."""

import sys

import pytest
import torch

from mokd_det.balancing import build_boundary, build_rule

from .helpers import decide, random_gradients

aggregation = pytest.importorskip("torchjd.aggregation")


@pytest.mark.parametrize(
    "name, options",
    [
        ("UPGrad", {}),
        ("MGDA", {}),
        ("IMTLG", {}),
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
    gradients, losses = random_gradients(3)
    gram = gradients @ gradients.T
    rule = build_rule(f"torchjd.{name}", **options)
    random_state = torch.get_rng_state()
    first = decide(rule, gram, losses).weights
    assert torch.equal(torch.get_rng_state(), random_state)  # nobody else's stream moves

    if name == "Constant":
        options = {"weights": torch.tensor(options["weights"], dtype=torch.float64)}
    oracle = getattr(aggregation, f"{name}Weighting")(**options)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.allclose(first, oracle(gram).double(), rtol=1e-6, atol=1e-9)

    # State, where there is one, and the count of calls go round.
    other = build_rule(f"torchjd.{name}", **options)
    other.load_state_dict(rule.state_dict())
    gram = gram.flip(0, 1)
    assert torch.equal(decide(rule, gram, losses).weights, decide(other, gram, losses).weights)


@pytest.mark.parametrize("name", ["GradVac", "PCD"])
def test_torchjds_state_of_before_the_first_step_undoes_it(name):
    """Loss scaling skips the first steps of float16."""
    rule, fresh = build_rule(f"torchjd.{name}"), build_rule(f"torchjd.{name}")
    gradients, losses = random_gradients(3, 3)
    before = rule.state_dict()
    rule.weights(gradients @ gradients.T, losses)
    rule.load_state_dict(before)
    gradients, losses = random_gradients(4, 3)
    gram = gradients @ gradients.T
    assert torch.equal(rule.weights(gram, losses), fresh.weights(gram, losses))


def test_torchjds_options_have_an_entry_for_each_objective():
    options = {"pref_vector": [0.5, 0.3, 0.2]}
    with pytest.raises(ValueError, match="TORCHJD .*of torchjd.UPGrad does not fit 2 objectives"):
        build_boundary("torchjd.UPGrad", options, objectives=2)
    boundary = build_boundary("torchjd.UPGrad", options, objectives=3)
    gradients, losses = random_gradients(3, 3)
    gradients[2] = 0
    weights = decide(boundary.balancer.rule, gradients @ gradients.T, losses).weights
    assert len(weights) == 3 and weights.isfinite().all() and (weights[:2] > 0).all()


def test_torchjd_errors(monkeypatch):
    with pytest.raises(ValueError, match="'torchjd.UpGrad', which does not exist.*torchjd.UPGrad"):
        build_rule("torchjd.UpGrad")
    with pytest.raises(ValueError, match="'torchjd.MoDo', which needs more than a Gram matrix"):
        build_rule("torchjd.MoDo")
    with pytest.raises(ValueError, match="MOKD.BALANCING.TORCHJD {'d': 1} does not fit"):
        build_rule("torchjd.CAGrad", d=1)
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[balancers\]'"):
        build_rule("torchjd.UPGrad")
