# Copyright (c) The mokd_det authors.
"""
Projection of student and teacher features into one subspace, for training only.

Both sides are projected by semi-orthogonal linear maps and standardised afterwards. The maps keep
angles and lengths, so the student must move rather than the map; standardising rules out the
solution where both sides are zero. Sources: MoKD, Eq. 16 (both sides, a common high-dimensional
space; second hand, the paper is withdrawn), VkD (Miles et al., CVPR 2024; orthogonal projection
and standardisation).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..registry import Registry

PROJECTORS = Registry("PROJECTORS", "MOKD.FEATURES.PROJECTOR")
"""
Modules built as ``cls(student_channels, teacher_channels, **options)`` and called with
(N, C_s, H, W) and (N, C_t, H, W), which return two (N, n, H, W). Options are those of
``MOKD.FEATURES`` that ``cls.options`` names in lower case; without it "dim" and "teacher_side".
"""

SUBSPACE_OPTIONS = ("dim", "teacher_side")

TEACHER_SIDES = ("learned", "frozen", "identity")


def options_of(projector: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a class of ``PROJECTORS`` from the node ``MOKD.FEATURES``."""
    names = getattr(projector, "options", SUBSPACE_OPTIONS)
    return {name: values[name.upper()] for name in names}


def check_projector(dim: int, teacher_side: str) -> None:
    """Raise ValueError for options of ``MOKD.FEATURES`` that are out of range."""
    if teacher_side not in TEACHER_SIDES:
        raise ValueError(
            f"MOKD.FEATURES.TEACHER_SIDE is '{teacher_side}': expected one of {TEACHER_SIDES}."
        )
    if dim < 0:
        raise ValueError(f"MOKD.FEATURES.DIM is {dim}: expected 0 (automatic) or more.")


@PROJECTORS.register("SubspaceProjector")
class SubspaceProjector(nn.Module):
    """A pair of semi-orthogonal 1 x 1 convolutions and per-channel standardisation."""

    teacher_weight: Tensor

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        dim: int = 0,
        teacher_side: str = "learned",
    ):
        """
        Args:
            dim: n, dimension of the subspace. 0: the larger of C_s and C_t.
            teacher_side: "learned", "frozen" (random semi-orthogonal) or "identity" (n is C_t).

        ValueError: a bad ``dim`` or ``teacher_side``.
        """
        super().__init__()
        check_projector(dim, teacher_side)
        if teacher_side == "identity":
            if dim not in (0, teacher_channels):
                raise ValueError(
                    f"MOKD.FEATURES.DIM is {dim}, but with TEACHER_SIDE 'identity' the subspace "
                    f"is the teacher's own of {teacher_channels} channels: set DIM to 0."
                )
            dim = teacher_channels
        self.dim = dim or max(student_channels, teacher_channels)
        self.student = _semi_orthogonal(student_channels, self.dim)
        if teacher_side == "learned":
            self.teacher = _semi_orthogonal(teacher_channels, self.dim)
        elif teacher_side == "frozen":
            weight = nn.init.orthogonal_(torch.empty(self.dim, teacher_channels))
            self.register_buffer("teacher_weight", weight)
        self.teacher_side = teacher_side

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """
        From (N, C_s, H, W) and (N, C_t, H, W), the latter without gradient, to two (N, n, H, W),
        each channel with mean 0 and variance 1 over N, H, W.
        """
        student = _project(student, self.student.weight)
        if self.teacher_side == "learned":
            teacher = _project(teacher, self.teacher.weight)
        elif self.teacher_side == "frozen":
            teacher = _project(teacher, self.teacher_weight)
        return standardise(student), standardise(teacher)


@PROJECTORS.register("FrozenProjector")
class FrozenProjector(SubspaceProjector):
    """Also the student's map stays random, so that only the student moves: for ablations."""

    def __init__(self, student_channels: int, teacher_channels: int, **options: Any):
        super().__init__(student_channels, teacher_channels, **options)
        self.requires_grad_(False)


@PROJECTORS.register("none")
class NoProjector(nn.Module):
    """Both sides as they are. ValueError unless they have equal channels."""

    options = ()

    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__()
        if student_channels != teacher_channels:
            raise ValueError(
                f"MOKD.FEATURES.PROJECTOR is 'none', but a level has {student_channels} channels "
                f"in the student and {teacher_channels} in the teacher: use 'Linear' or "
                "'SubspaceProjector', or name levels of equal channels in MOKD.FEATURES.STUDENT."
            )

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return student, teacher


@PROJECTORS.register("Linear")
class LinearProjector(nn.Module):
    """A 1 x 1 convolution of the student (FitNets, Romero et al., ICLR 2015, arXiv 1412.6550)."""

    options = ()

    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__()
        self.student = nn.Conv2d(student_channels, teacher_channels, 1)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return self.student(student), teacher


@PROJECTORS.register("MaskedGenerator")
class MaskedGenerator(nn.Module):
    """
    Random positions of the student are masked, and two convolutions generate the teacher's map from
    what is left (MGD, Yang et al., ECCV 2022, arXiv 2205.01529, Eq. 2 to 4); a 1 x 1 convolution
    comes first where channels differ.
    """

    options = ("masked",)

    def __init__(self, student_channels: int, teacher_channels: int, *, masked: float = 0.65):
        """``masked``: the share of positions, in [0, 1)."""
        super().__init__()
        self.masked, self.calls = masked, 0
        self.student: nn.Module = nn.Identity()
        if student_channels != teacher_channels:
            self.student = nn.Conv2d(student_channels, teacher_channels, 1)
        self.generate = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student = self.student(student)
        return self.generate(student * self._kept(student)), teacher

    def _kept(self, student: Tensor) -> Tensor:
        """(N, 1, H, W), which positions are kept."""
        # Numbers of its own: the student's (which proposals are sampled) stay those from scratch.
        # Torch's seed is one of each run, rank and step. Calls tell micro-batches apart; a pass
        # without gradients is a second one on the same batch. Maps of levels differ in size.
        self.calls += torch.is_grad_enabled()
        seed = hash((torch.initial_seed(), self.calls, *student.shape[1:])) % 2**63
        generator = torch.Generator().manual_seed(seed)
        shape = (len(student), 1, *student.shape[2:])
        return (torch.rand(shape, generator=generator) >= self.masked).to(student.device)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.calls)

    def set_extra_state(self, state: Tensor) -> None:
        self.calls = int(state)


class SemiOrthogonal(nn.Module):
    """
    Parametrisation that orthonormalises the rows or columns of a matrix, whichever are fewer, by
    the Cholesky factor of its Gram matrix.

    Not ``torch.nn.utils.parametrizations.orthogonal``: for tall matrices that one keeps signs in
    a diagonal which it reads as integers, so the first step with weight decay (0.9999 becomes 0)
    silently turns the map into zero. Here the scale of the matrix is irrelevant.
    """

    def forward(self, matrix: Tensor) -> Tensor:
        """A matrix of full rank with orthonormal columns if rows >= columns, else rows."""
        if matrix.shape[0] < matrix.shape[1]:
            return self.forward(matrix.T).T
        with torch.autocast(matrix.device.type, enabled=False):
            # Without the check for success, for which the CPU would wait for a GPU: a matrix that
            # lost its rank gives NaN, and that stops the run.
            factor = torch.linalg.cholesky_ex(matrix.T @ matrix, upper=True).L
            return torch.linalg.solve_triangular(factor, matrix, upper=True, left=False)

    def right_inverse(self, matrix: Tensor) -> Tensor:
        return matrix


def _semi_orthogonal(channels: int, dim: int) -> nn.Linear:
    linear = nn.Linear(channels, dim, bias=False)
    nn.init.orthogonal_(linear.weight)
    parametrize.register_parametrization(linear, "weight", SemiOrthogonal())
    return linear


def _project(features: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(features, weight[:, :, None, None])


def standardise(features: Tensor, eps: float = 1e-5) -> Tensor:
    """
    Give each channel of (N, C, H, W) mean 0 and variance 1 over N, H, W of the batch of all
    processes. Zero, without gradient, where it has a single value (a 1 x 1 map of one image).
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _standardise_together(features, eps)
    if features.numel() == features.shape[1]:
        return features * 0
    return F.batch_norm(features, None, None, training=True, momentum=0.0, eps=eps)


def normalise_like(features: Tensor, target: Tensor, eps: float = 1e-5) -> Tensor:
    """
    Give each channel of (N, C, H, W) the mean and the variance that it has in ``target``, of any H
    and W, over N, H, W of the batch of all processes. ``target`` gets no gradient.
    """
    target = target.detach().float()
    count = target.numel() // target.shape[1]
    variance, mean = torch.var_mean(target, dim=(0, 2, 3), correction=0)
    # The difference of two big numbers: in double precision.
    mean, variance = mean.double(), variance.double()
    square = variance + mean**2
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        packed = torch.cat([mean, square, mean.new_ones(1)]) * count
        dist.all_reduce(packed)
        mean, square = (packed[:-1] / packed[-1]).chunk(2)
    deviation = ((square - mean**2).clamp_min(0) + eps).sqrt()
    mean, deviation = (x.float().view(1, -1, 1, 1) for x in (mean, deviation))
    return torch.addcmul(mean, standardise(features, eps).float(), deviation)


def _standardise_together(features: Tensor, eps: float) -> Tensor:
    """With the joined batch's means: one all-reduce of 8 (2 C + 1) bytes, and one backward."""
    features = features.float()
    count = features.numel() // features.shape[1]
    variance, mean = torch.var_mean(features, dim=(0, 2, 3), correction=0)
    # The difference of two big numbers: in double precision.
    mean, variance = mean.double(), variance.double()
    sums = _SumOverRanks.apply(torch.cat([mean, variance + mean**2, mean.new_ones(1)]) * count)
    mean, square = (sums[:-1] / sums[-1].detach()).chunk(2)
    scale = (square - mean**2 + eps).rsqrt()
    shift = -mean * scale
    scale, shift = (x.float().view(1, -1, 1, 1) for x in (scale, shift))
    return torch.addcmul(shift, features, scale)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce; so is its gradient, since every rank's loss depends on every rank's input."""

    @staticmethod
    def forward(ctx, values):
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient
