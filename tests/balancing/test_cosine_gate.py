# Copyright (c) The mokd_det authors.
"""Rule ``cosine_gate``; what it shares with ``fixed`` is tested there."""

import torch

from mokd_det.balancing import build_rule

from .helpers import decide, weights_of


def test_cosine_gate_closes_on_conflict_only():
    task = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    friend = torch.tensor([0.1, 5.0, 0.0], dtype=torch.float64)
    foe = torch.tensor([-0.1, 0.0, 5.0], dtype=torch.float64)
    options = {"weights": [1.0, 0.3, 0.7]}
    gradients = torch.stack([task, friend, foe])
    assert weights_of("cosine_gate", gradients, torch.ones(3), **options).tolist() == [1, 0.3, 0]
    gradients = torch.stack([task, foe, friend])
    assert weights_of("cosine_gate", gradients, torch.ones(3), **options).tolist() == [1, 0, 0.7]


def test_the_gate_opens_again():
    rule = build_rule("cosine_gate", weights=[1.0, 2.0])
    against = torch.tensor([[1.0, -1.0], [-1.0, 2.0]])
    assert decide(rule, against, torch.ones(2)).weights.tolist() == [1.0, 0.0]
    assert decide(rule, torch.eye(2), torch.ones(2)).weights.tolist() == [1.0, 2.0]
