# Copyright (c) The mokd_det authors.
"""The objective that matches feature maps in a learned subspace."""

from torch import nn

from ..subspace import PROJECTORS, align_resolution, build_feature_loss
from .foreground import SOURCES, foreground_weights

__all__ = ["FeatureObjective", "build_level_map"]

LEVEL_WEIGHTS = ("equal", "positions")


class FeatureObjective(nn.Module):
    """Sum over levels of the loss between both sides' maps in their common subspace."""

    def __init__(
        self,
        student_shapes,
        teacher_shapes,
        level_map,
        projectors,
        loss,
        foreground="",
        foreground_share=0.5,
        foreground_score=0.5,
        level_weights="equal",
    ):
        """
        Args:
            student_shapes, teacher_shapes (dict[str, ShapeSpec]): of both backbones.
            level_map (dict[str, str]): student's feature name -> teacher's.
            projectors (dict[str, nn.Module]): by the student's feature name, see ``PROJECTORS``.
            loss (callable): of two (N, n, H, W), see ``FEATURE_LOSSES``.
            foreground, foreground_share, foreground_score, level_weights: see ``MOKD.FEATURES``.

        Raises:
            ValueError: an option out of its range.
        """
        super().__init__()
        if foreground not in SOURCES:
            raise ValueError(
                f"MOKD.FEATURES.FOREGROUND is '{foreground}': expected one of {SOURCES}."
            )
        for option, value in (("SHARE", foreground_share), ("SCORE", foreground_score)):
            if not 0 <= value <= 1:
                raise ValueError(
                    f"MOKD.FEATURES.FOREGROUND_{option} is {value}: expected a number in [0, 1]."
                )
        if level_weights not in LEVEL_WEIGHTS:
            raise ValueError(
                f"MOKD.FEATURES.LEVEL_WEIGHTS is '{level_weights}': expected one of "
                f"{LEVEL_WEIGHTS}."
            )
        self.projectors = nn.ModuleDict(projectors)
        self.level_map = dict(level_map)
        self.loss = loss
        self.foreground = foreground
        self.share = foreground_share
        self.score = foreground_score
        self.level_weights = level_weights
        self._strides = {
            name: (student_shapes[name].stride, teacher_shapes[other].stride)
            for name, other in self.level_map.items()
        }

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Build from ``cfg.MOKD.FEATURES`` for two detectors with a ``backbone``."""
        options = cfg.MOKD.FEATURES
        projector = PROJECTORS.get(options.PROJECTOR)
        shapes, teacher_shapes = student.backbone.output_shape(), teacher.feature_shapes()
        level_map = build_level_map(shapes, teacher_shapes, options.STUDENT, options.TEACHER)
        projectors = {
            name: projector(
                shapes[name].channels,
                teacher_shapes[other].channels,
                dim=options.DIM,
                teacher_side=options.TEACHER_SIDE,
            )
            for name, other in level_map.items()
        }
        return cls(
            shapes,
            teacher_shapes,
            level_map,
            projectors,
            build_feature_loss(options.LOSS, options.ALIGNMENT),
            options.FOREGROUND,
            options.FOREGROUND_SHARE,
            options.FOREGROUND_SCORE,
            options.LEVEL_WEIGHTS,
        )

    def forward(self, features, view, teacher, batched_inputs):
        """
        Args:
            features (dict[str, Tensor]): the student's.
            view (TeacherView): of the same images.
            teacher (Teacher): that had it.
            batched_inputs (list[dict]): the images with their ground truth.

        Returns:
            dict[str, Tensor]: ``loss_features``, a scalar.
        """
        objects = self._objects(view, teacher, batched_inputs, features)
        losses, positions = [], []
        for name, other in self.level_map.items():
            stride, teacher_stride = self._strides[name]
            maps = align_resolution(features[name], view.features[other], stride, teacher_stride)
            maps = self.projectors[name](*maps)
            if objects is not None:
                size = maps[0].shape[-2:]
                maps = *maps, foreground_weights(objects, size, stride, self.share)
            losses.append(self.loss(*maps))
            positions.append(maps[0].shape[-2:].numel())
        if self.level_weights == "positions":
            scale = len(positions) / sum(positions)
            losses = [loss * (count * scale) for loss, count in zip(losses, positions)]
        return {"loss_features": sum(losses)}

    def _objects(self, view, teacher, batched_inputs, features):
        if self.foreground == "teacher":
            return teacher.objects(view, self.score)
        if self.foreground == "ground_truth":
            device = next(iter(features.values())).device
            return [x["instances"].gt_boxes.tensor.to(device) for x in batched_inputs]
        return None


def build_level_map(student_shapes, teacher_shapes, student_names=(), teacher_names=()):
    """
    Args:
        student_shapes, teacher_shapes (dict[str, ShapeSpec]): of both backbones.
        student_names, teacher_names (sequence[str]): MOKD.FEATURES.STUDENT and .TEACHER. The
            second may be empty if the names are the same on both sides; both empty: all names
            that both sides have, or if there is none, the levels of equal stride.

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
        common = {name: name for name in student_shapes if name in teacher_shapes}
        common = common or _levels_of_equal_stride(student_shapes, teacher_shapes)
        if not common:
            raise ValueError(
                "Student and teacher share neither a feature name nor a stride, so "
                "MOKD.FEATURES.STUDENT and MOKD.FEATURES.TEACHER must say which level matches "
                f"which. {have}"
            )
        return common
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


def _levels_of_equal_stride(student_shapes, teacher_shapes):
    """Only where it is clear which: one level of that stride on each side."""

    def by_stride(shapes):
        strides = [shape.stride for shape in shapes.values()]
        return {s.stride: name for name, s in shapes.items() if strides.count(s.stride) == 1}

    students, teachers = by_stride(student_shapes), by_stride(teacher_shapes)
    return {name: teachers[stride] for stride, name in students.items() if stride in teachers}


def _described(shapes):
    return ", ".join(f"{n} (stride {s.stride}, {s.channels} ch.)" for n, s in shapes.items())
