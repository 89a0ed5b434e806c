# Copyright (c) The mokd_det authors.
"""Projection into a common subspace."""

import pytest
import torch
from torch import nn

from mokd_det.objectives import FEATURE_LOSSES, PROJECTORS, SubspaceProjector, standardise


def is_semi_orthogonal(weight):
    product = weight.T @ weight if weight.shape[0] >= weight.shape[1] else weight @ weight.T
    return torch.allclose(product, torch.eye(len(product)), atol=1e-5)


@pytest.mark.parametrize("student, teacher, dim", [(4, 6, 0), (6, 4, 9), (8, 8, 5), (4, 6, 5)])
@pytest.mark.parametrize("side", ["learned", "frozen"])
def test_both_maps_are_and_stay_semi_orthogonal(student, teacher, dim, side):
    torch.manual_seed(0)
    projector = SubspaceProjector(student, teacher, dim=dim, teacher_side=side)
    # With momentum and weight decay: the decay must not reach the map (it does in torch's own
    # parametrisation for tall matrices, which becomes zero).
    optimizer = torch.optim.SGD(projector.parameters(), 0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(5):
        outputs = projector(torch.randn(2, student, 3, 3), torch.randn(2, teacher, 3, 3))
        assert all(o.shape == (2, dim or max(student, teacher), 3, 3) for o in outputs)
        optimizer.zero_grad()
        FEATURE_LOSSES.get("smooth_l1")(*outputs).backward()
        optimizer.step()
    assert is_semi_orthogonal(projector.student.weight)
    assert is_semi_orthogonal(
        projector.teacher.weight if side == "learned" else projector.teacher_weight
    )


def test_teacher_sides_train_what_they_say():
    sides = {s: SubspaceProjector(4, 6, teacher_side=s) for s in ("learned", "frozen", "identity")}
    trained = {s: {n.split(".")[0] for n, _ in p.named_parameters()} for s, p in sides.items()}
    assert trained == {
        "learned": {"student", "teacher"},
        "frozen": {"student"},
        "identity": {"student"},
    }
    # The frozen map must come back on resume, so it is in the state.
    assert "teacher_weight" in sides["frozen"].state_dict()
    student, teacher = sides["identity"](torch.randn(2, 4, 3, 3), torch.randn(2, 6, 3, 3))
    assert student.shape == teacher.shape == (2, 6, 3, 3)


def test_projection_is_learned_towards_a_rotated_teacher():
    """A student that holds the teacher's features in another basis is recognised as such."""
    torch.manual_seed(0)
    rotation = nn.init.orthogonal_(torch.empty(6, 6))
    projector = SubspaceProjector(6, 6, dim=12, teacher_side="frozen")
    optimizer = torch.optim.Adam(projector.parameters(), 0.05)
    scales = torch.linspace(0.5, 2, 6)[:, None, None]
    values = []
    for _ in range(150):
        teacher = torch.randn(4, 6, 5, 5) * scales
        student = torch.einsum("ij,njhw->nihw", rotation, teacher)
        loss = FEATURE_LOSSES.get("smooth_l1")(*projector(student, teacher))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.1 * values[0]


def test_outputs_are_standardised_so_zero_is_no_solution():
    torch.manual_seed(0)
    student, teacher = 9 * torch.randn(2, 4, 8, 8) + 5, torch.randn(2, 6, 8, 8)
    outputs = SubspaceProjector(4, 6, dim=12)(student, teacher)
    for output in outputs:
        assert torch.allclose(output.mean((0, 2, 3)), torch.zeros(12), atol=1e-5)
        # The epsilon costs a little where a channel of the subspace has little variance.
        assert torch.allclose(output.std((0, 2, 3), unbiased=False), torch.ones(12), atol=1e-2)


def test_standardising_a_single_value_gives_zero():
    x = torch.randn(1, 3, 1, 1, requires_grad=True)
    result = standardise(x)
    result.sum().backward()
    assert torch.equal(result.detach(), torch.zeros_like(x))
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"teacher_side": "froze"}, "MOKD.FEATURES.TEACHER_SIDE is 'froze'"),
        ({"dim": -1}, "MOKD.FEATURES.DIM is -1"),
        ({"dim": 5, "teacher_side": "identity"}, "set DIM to 0"),
    ],
)
def test_bad_options_name_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        SubspaceProjector(4, 6, **options)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="MOKD.FEATURES.PROJECTOR is 'x'.*'SubspaceProjector'"):
        PROJECTORS.get("x")
