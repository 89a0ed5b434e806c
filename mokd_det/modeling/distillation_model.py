# Copyright (c) The mokd_det authors.
"""The meta-architecture that trains a stock detector with the help of a frozen one."""

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling import build_model as build_detector
from torch import nn

from ..balancing import build_boundary
from ..subspace import FEATURE_LOSSES, PROJECTORS, align_resolution
from .feature_tap import replace_features
from .teacher import build_teacher

__all__ = ["DistillationModel", "build_level_map"]


@META_ARCH_REGISTRY.register()
class DistillationModel(nn.Module):
    """
    A student detector, a hidden frozen teacher and projectors between their feature maps.

    The student is the stock model of its config, not a subclass or a copy, and stays usable as
    such: ``model.student``. In training, ``forward`` returns the objectives apart from each other;
    in evaluation it is the student's forward.

    Attributes:
        inference (callable): what evaluation runs; the student, unless the trainer exchanges it.
        teacher_features (dict[str, Tensor] or None): of the latest forward pass, for a second one
            on the same batch; only kept if the rule asks for that.
    """

    @configurable
    def __init__(
        self, *, student, teacher, level_map, projectors, feature_loss, boundary, input_format
    ):
        """
        Args:
            student (nn.Module): a detector with ``backbone``, which maps images to
                dict[str, Tensor]; in training it returns dict[str, Tensor] of losses.
            teacher (Teacher): the frozen teacher.
            level_map (dict[str, str]): student's feature name -> teacher's.
            projectors (dict[str, nn.Module]): by the student's feature name, see ``PROJECTORS``.
            feature_loss (callable): of two (N, n, H, W), see ``FEATURE_LOSSES``.
            boundary (Boundary): balances the gradients at the student's features.
            input_format (str): channel order of the images the model gets, "RGB" or "BGR".
        """
        super().__init__()
        self.student = student
        self.projectors = nn.ModuleDict(projectors)
        self.teacher = teacher
        self.level_map = dict(level_map)
        self.feature_loss = feature_loss
        self.boundary = boundary
        self.input_format = input_format
        self.inference = student.__call__
        self.teacher_features = None
        shapes, teacher_shapes = student.backbone.output_shape(), teacher.feature_shapes()
        self._strides = {
            name: (shapes[name].stride, teacher_shapes[other].stride)
            for name, other in self.level_map.items()
        }

    @classmethod
    def from_config(cls, cfg):
        options = cfg.MOKD
        projector = PROJECTORS.get(options.FEATURES.PROJECTOR)
        feature_loss = FEATURE_LOSSES.get(options.FEATURES.LOSS)
        # The student comes before the teacher, so that a seed gives it the same initial weights
        # as without distillation.
        student = build_detector(cfg)
        if not hasattr(student, "backbone"):
            raise ValueError(
                f"MODEL.META_ARCHITECTURE '{cfg.MODEL.META_ARCHITECTURE}' has no 'backbone', "
                "which distilling its features needs."
            )
        boundary = build_boundary(
            shared=student.backbone,
            **{key.lower(): value for key, value in options.BALANCING.items()},
        )
        teacher = build_teacher(cfg)
        shapes, teacher_shapes = student.backbone.output_shape(), teacher.feature_shapes()
        level_map = build_level_map(
            shapes, teacher_shapes, options.FEATURES.STUDENT, options.FEATURES.TEACHER
        )
        projectors = {
            name: projector(
                shapes[name].channels,
                teacher_shapes[other].channels,
                dim=options.FEATURES.DIM,
                teacher_side=options.FEATURES.TEACHER_SIDE,
            ).to(student.device)
            for name, other in level_map.items()
        }
        return {
            "student": student,
            "teacher": teacher,
            "level_map": level_map,
            "projectors": projectors,
            "feature_loss": feature_loss,
            "boundary": boundary,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self):
        return self.student.device

    def forward(self, batched_inputs, teacher_features=None):
        """
        Args:
            batched_inputs (list[dict]): Detectron2's format, as the student takes it.
            teacher_features (dict[str, Tensor]): the teacher's for this batch, if known already.

        Returns:
            In training dict[str, dict[str, Tensor]]: ``{"task": losses of the student,
            "distill": {"loss_features": scalar}}``; their gradients meet at ``self.boundary``.
            In evaluation what the student returns.
        """
        if not self.training:
            return self.inference(batched_inputs)

        if teacher_features is None:
            teacher_features = self.teacher.features(batched_inputs, self.input_format)
        needed_again = self.boundary.balancer.needs_second_forward
        self.teacher_features = teacher_features if needed_again else None
        distill = {}

        def on_features(features):
            names, maps = list(features), list(features.values())
            task, shared = self.boundary.split(maps, 2, names)
            # Before the heads run: autograd then adds the distillation's gradient after theirs,
            # in the order of a plain sum.
            distill["loss_features"] = self._feature_loss(
                dict(zip(names, shared)), teacher_features
            )
            return dict(zip(names, task))

        with replace_features(self.student.backbone, on_features):
            task = self.student(batched_inputs)
        return {"task": task, "distill": distill}

    def _feature_loss(self, features, teacher_features):
        """Sum over levels of the loss between both sides in the subspace."""
        losses = []
        for name, other in self.level_map.items():
            student, teacher = align_resolution(
                features[name], teacher_features[other], *self._strides[name]
            )
            losses.append(self.feature_loss(*self.projectors[name](student, teacher)))
        return sum(losses)


def build_level_map(student_shapes, teacher_shapes, student_names=(), teacher_names=()):
    """
    Args:
        student_shapes, teacher_shapes (dict[str, ShapeSpec]): of both backbones.
        student_names, teacher_names (sequence[str]): MOKD.FEATURES.STUDENT and .TEACHER. The
            second may be empty if the names are the same on both sides; both empty: all names
            that both sides have.

    Returns:
        dict[str, str]: student's name -> teacher's.

    Raises:
        ValueError: a name that its side does not have, a name twice, lists of different length,
            or nothing in common; the message lists what both sides have.
    """
    have = (
        f"The student has {_described(student_shapes)}; the teacher has "
        f"{_described(teacher_shapes)}."
    )
    if teacher_names and not student_names:
        raise ValueError(
            f"MOKD.FEATURES.TEACHER is {list(teacher_names)} but MOKD.FEATURES.STUDENT is empty: "
            f"name the student's level for each. {have}"
        )
    if not student_names:
        student_names = [name for name in student_shapes if name in teacher_shapes]
        if not student_names:
            raise ValueError(
                "Student and teacher share no feature name, so MOKD.FEATURES.STUDENT and "
                f"MOKD.FEATURES.TEACHER must say which level matches which. {have}"
            )
    teacher_names = teacher_names or student_names
    if len(student_names) != len(teacher_names):
        raise ValueError(
            f"MOKD.FEATURES.STUDENT {list(student_names)} and MOKD.FEATURES.TEACHER "
            f"{list(teacher_names)} must have the same length: one level for each. {have}"
        )
    for option, names, shapes in (
        ("MOKD.FEATURES.STUDENT", student_names, student_shapes),
        ("MOKD.FEATURES.TEACHER", teacher_names, teacher_shapes),
    ):
        if unknown := [name for name in names if name not in shapes]:
            raise ValueError(f"{option} has {unknown}, which its side does not. {have}")
    if len(set(student_names)) < len(student_names):
        raise ValueError(f"MOKD.FEATURES.STUDENT {list(student_names)} names a level twice.")
    return dict(zip(student_names, teacher_names))


def _described(shapes):
    return ", ".join(f"{n} (stride {s.stride}, {s.channels} ch.)" for n, s in shapes.items())
