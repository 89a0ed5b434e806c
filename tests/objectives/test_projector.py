# Copyright (c) The mokd_det authors.
"""Projection into a common subspace."""

import pytest
import torch
from torch import nn

from mokd_det.config import get_cfg
from mokd_det.objectives import FEATURE_LOSSES, PROJECTORS, SubspaceProjector, standardise
from mokd_det.objectives.projector import MaskedGenerator, normalise_like, options_of


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


def test_none_is_both_sides_as_they_are():
    student, teacher = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    projector = PROJECTORS.get("none")(4, 4)
    s, t = projector(student, teacher)
    assert s is student and t is teacher and not list(projector.parameters())
    with pytest.raises(ValueError, match="'none', but a level has 4 channels .* and 6 in the teac"):
        PROJECTORS.get("none")(4, 6)


def test_linear_by_hand():
    """FitNets: (2, 3) becomes 1 * 2 + 2 * 3 + 0.5, and 4 * 2 - 3 + 0."""
    projector = PROJECTORS.get("Linear")(2, 2)
    with torch.no_grad():
        projector.student.weight.copy_(torch.tensor([[1.0, 2.0], [4.0, -1.0]]).view(2, 2, 1, 1))
        projector.student.bias.copy_(torch.tensor([0.5, 0.0]))
    given = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    teacher = torch.randn(1, 2, 2, 2)
    student, same = projector(given, teacher)
    assert same is teacher
    assert torch.equal(student, torch.tensor([8.5, 5.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2))
    assert PROJECTORS.get("Linear")(4, 6)(torch.randn(2, 4, 3, 3), None)[0].shape == (2, 6, 3, 3)


def filled(generator, first, second):
    """A generator of one channel whose two 3 x 3 convolutions add up, plus these biases."""
    for convolution, bias in zip(generator.generate[::2], (first, second)):
        nn.init.ones_(convolution.weight)
        nn.init.constant_(convolution.bias, bias)
    return generator


@pytest.mark.parametrize("bias, expected", [(-9.0, 4.25), (-11.0, 0.25)])
def test_a_generator_by_hand(bias, expected):
    """
    MGD, Eq. 4, nothing masked. On a map of 2 x 2 each position sees all four cells: 10 - 9 = 1 at
    each, and 4 * 1 + 0.25; or 10 - 11, which the ReLU cuts.
    """
    generator = filled(MaskedGenerator(1, 1, masked=0.0), bias, 0.25)
    teacher = torch.randn(1, 1, 2, 2)
    given = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    student, same = generator(given, teacher)
    assert same is teacher and torch.equal(student, torch.full_like(given, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [0.0, 0.45, 0.65])
def test_the_share_of_positions_is_masked(masked, dtype):
    """Whole positions, other ones in each image and each step, and the rest is not scaled."""
    generator = MaskedGenerator(3, 3, masked=masked)
    generator.generate = nn.Identity()
    given = torch.ones(4, 3, 100, 100, dtype=dtype).requires_grad_()
    left, _ = generator(given, given)
    assert left.dtype == dtype and set(left.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(left, left[:, :1].expand_as(left))
    # Five standard deviations of 40000 draws, and a step of bfloat16.
    assert 1 - left.float().mean().item() == pytest.approx(masked, abs=0.012 + 1 / 256)
    left.sum().backward()
    assert torch.equal(given.grad, left.detach())
    if masked:
        assert not torch.equal(left[0], left[1])
        assert not torch.equal(generator(given, given)[0], left)
    else:
        assert torch.equal(left, given)


def test_masks_are_of_their_run_step_and_level():
    """As the seed of the step says, which is one of each rank; the student's numbers stay."""

    def mask(seed, size=64, gradients=True, generator=None):
        generator = generator or MaskedGenerator(3, 3)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with torch.set_grad_enabled(gradients):
            kept = generator._kept(torch.ones(1, 3, size, 64))
        assert torch.equal(torch.get_rng_state(), before)
        return kept

    assert torch.equal(mask(1), mask(1)) and not torch.equal(mask(1), mask(2))
    assert not torch.equal(mask(1)[:, :, :32], mask(1, size=32))
    generator = MaskedGenerator(3, 3)
    first = mask(1, generator=generator)
    assert torch.equal(mask(1, gradients=False, generator=generator), first)
    assert not torch.equal(mask(1, generator=generator), first)


def test_a_generator_makes_a_wider_teacher_from_what_is_left():
    generator = MaskedGenerator(4, 6)
    assert isinstance(MaskedGenerator(6, 6).student, nn.Identity)
    given = torch.randn(2, 4, 8, 8).requires_grad_()
    teacher = torch.randn(2, 6, 8, 8)
    student, same = generator(given, teacher)
    assert student.shape == teacher.shape and same is teacher
    FEATURE_LOSSES.get("squared_sum")(student, teacher).backward()
    hidden = (given.grad == 0).all(dim=1)
    assert 0.4 < hidden.float().mean() < 0.9 and given.grad.isfinite().all()
    assert all(p.grad.abs().max() > 0 for p in generator.parameters())


def test_normalise_like_by_hand():
    """(0, 0, 2, 2) is -1, -1, 1, 1 in standard units; (1, 3, 5, 7) has mean 4 and variance 5."""
    given = torch.tensor([0.0, 0.0, 2.0, 2.0]).view(1, 1, 2, 2).requires_grad_()
    target = torch.tensor([1.0, 3.0, 5.0, 7.0]).view(2, 1, 1, 2).requires_grad_()
    result = normalise_like(given, target)
    expected = 4 + 5**0.5 * torch.tensor([-1.0, -1.0, 1.0, 1.0]).view(1, 1, 2, 2)
    assert torch.allclose(result, expected, atol=1e-4)
    result.square().sum().backward()
    assert target.grad is None and given.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_normalise_like_of_each_channel(dtype):
    scale, shift = (
        torch.tensor([0.1, 30.0])[:, None, None],
        torch.tensor([5.0, -40.0])[:, None, None],
    )
    target = (torch.randn(3, 2, 9, 7) * scale + shift).to(dtype)
    result = normalise_like(9 * torch.randn(2, 2, 5, 5) - 4, target)
    for channel in range(2):
        wanted = target[:, channel].float()
        assert result[:, channel].mean().item() == pytest.approx(wanted.mean().item(), rel=1e-4)
        deviation = wanted.std(unbiased=False).item()
        assert result[:, channel].std(unbiased=False).item() == pytest.approx(deviation, rel=2e-3)


def test_normalise_like_where_the_mean_is_far_from_zero():
    target = 3000 + torch.randn(4, 1, 20, 20)
    result = normalise_like(torch.randn(4, 1, 7, 7), target)
    deviation = target.std(unbiased=False).item()
    assert result.std(unbiased=False).item() == pytest.approx(deviation, rel=1e-3)


def test_normalise_like_of_a_single_value_is_the_targets_mean():
    given = torch.randn(1, 2, 1, 1).requires_grad_()
    target = torch.randn(3, 2, 4, 4)
    result = normalise_like(given, target)
    assert torch.allclose(result.flatten(), target.mean((0, 2, 3)))
    result.sum().backward()
    assert torch.equal(given.grad, torch.zeros_like(given))


def test_options_are_those_that_a_projector_names():
    options = get_cfg().MOKD.FEATURES
    subspace = {"dim": options.DIM, "teacher_side": options.TEACHER_SIDE}
    assert options_of(SubspaceProjector, options) == subspace
    assert options_of(PROJECTORS.get("FrozenProjector"), options) == subspace
    assert options_of(type("Own", (), {}), options) == subspace
    assert options_of(MaskedGenerator, options) == {"masked": options.MASKED}
    for name in ("none", "Linear"):
        assert options_of(PROJECTORS.get(name), options) == {}


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="MOKD.FEATURES.PROJECTOR is 'x'.*'SubspaceProjector'"):
        PROJECTORS.get("x")
