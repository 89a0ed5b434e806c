# Copyright (c) The mokd_det authors.
import pytest
import torch
from torch import nn

from mokd_det.subspace import (
    FEATURE_LOSSES,
    PROJECTORS,
    SubspaceProjector,
    align_resolution,
    build_feature_loss,
    correlation_distance,
    standardise,
)


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


def test_losses_frozen_numbers():
    student = torch.tensor([[[[3.0]], [[0.0]]]])
    teacher = torch.tensor([[[[0.0]], [[0.5]]]])
    assert FEATURE_LOSSES.get("smooth_l1")(student, teacher).item() == (2.5 + 0.125) / 2
    assert FEATURE_LOSSES.get("mse")(student, teacher).item() == (9 + 0.25) / 2
    assert FEATURE_LOSSES.get("cosine")(student, teacher).item() == 1
    assert FEATURE_LOSSES.get("cosine")(student, 2 * student).item() == pytest.approx(0)


@pytest.mark.parametrize("name", ["smooth_l1", "mse", "cosine"])
def test_losses_vanish_for_equal_features(name):
    x = torch.randn(2, 5, 3, 3)
    assert FEATURE_LOSSES.get(name)(x, x.clone()).item() == pytest.approx(0, abs=1e-6)


def test_correlation_distance_sees_relations_only():
    torch.manual_seed(0)
    x = standardise(torch.randn(2, 3, 5, 4))
    shuffled = x.flatten(2)[..., torch.randperm(20)].view_as(x)
    assert correlation_distance(x, shuffled).item() == pytest.approx(0, abs=1e-10)
    # Dimension 1 becomes dimension 0: both sides have correlation one there instead of r.
    y = x.clone()
    y[:, 1] = y[:, 0]
    r = (x[:, 0] * x[:, 1]).mean()
    s = (x[:, 0] * x[:, 2]).mean()
    t = (x[:, 1] * x[:, 2]).mean()
    expected = 2 * ((1 - r) ** 2 + (s - t) ** 2) / 3
    assert correlation_distance(x, y).item() == pytest.approx(expected.item(), rel=1e-3)


def test_alignment_is_added_to_the_loss():
    torch.manual_seed(0)
    x, y = standardise(torch.randn(2, 3, 5, 4)), standardise(torch.randn(2, 3, 5, 4))
    plain, more = build_feature_loss("mse"), build_feature_loss("mse", 0.5)
    assert plain is FEATURE_LOSSES.get("mse")
    assert more(x, y) == plain(x, y) + 0.5 * correlation_distance(x, y) > plain(x, y)
    with pytest.raises(ValueError, match="MOKD.FEATURES.ALIGNMENT is -1"):
        build_feature_loss("mse", -1)


def test_alignment_counts_positions_with_their_weights():
    generator = torch.Generator().manual_seed(0)
    x, y, noise = (torch.randn(2, 5, 4, 3, generator=generator) for _ in range(3))
    loss = build_feature_loss("smooth_l1", 0.5)
    assert loss(x, y, torch.ones(2, 1, 4, 3)).item() == pytest.approx(loss(x, y).item(), rel=1e-6)
    # Of weight zero: whatever is there does not matter, to either term.
    weights = torch.ones(2, 1, 4, 3)
    weights[:, :, 2:] = 0
    weights *= 2
    other = torch.where(weights > 0, x, noise)
    assert torch.equal(loss(other, y, weights), loss(x, y, weights))
    assert loss(other, y) != loss(x, y)


def test_align_equal_strides_crops_the_padding():
    student, teacher = torch.randn(1, 2, 8, 8), torch.randn(1, 3, 10, 7)
    s, t = align_resolution(student, teacher, 8, 8)
    assert torch.equal(s, student[..., :8, :7]) and torch.equal(t, teacher[..., :8, :7])


def image_ramp(height, width, stride):
    """A map whose value is the horizontal centre of each cell in pixels."""
    centres = (torch.arange(width) + 0.5) * stride
    return centres.expand(1, 1, height, width)


@pytest.mark.parametrize("student_stride, teacher_stride", [(16, 8), (8, 16), (16, 4), (8, 32)])
def test_align_strides_keeps_positions(student_stride, teacher_stride):
    student = image_ramp(128 // student_stride, 128 // student_stride, student_stride)
    # The teacher pads 32 pixels more.
    teacher = image_ramp(160 // teacher_stride, 160 // teacher_stride, teacher_stride)
    s, t = align_resolution(student, teacher, student_stride, teacher_stride)
    assert s.shape == t.shape == student.shape
    # Interpolation to a finer grid is flat beyond the outermost centres.
    inner = slice(teacher_stride // student_stride // 2, -(teacher_stride // student_stride // 2))
    inner = inner if teacher_stride > student_stride else slice(None)
    assert torch.allclose(s[..., inner], t[..., inner])


def test_align_without_a_common_cell_is_an_error():
    with pytest.raises(ValueError, match="share no cell of 64 pixels"):
        align_resolution(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1), 16, 64)


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
    with pytest.raises(ValueError, match="MOKD.FEATURES.LOSS is 'l3'.*'cosine', 'mse', 'smooth"):
        FEATURE_LOSSES.get("l3")
    with pytest.raises(ValueError, match="MOKD.FEATURES.PROJECTOR is 'x'.*'SubspaceProjector'"):
        PROJECTORS.get("x")
