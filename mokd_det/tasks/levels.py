# Copyright (c) The mokd_det authors.
"""Which feature maps of two detectors belong together."""

import functools
from collections.abc import Callable, Mapping, Sequence

from detectron2.layers import ShapeSpec

from ..objectives import Level


def build_level_map(
    student_shapes: Mapping[str, ShapeSpec],
    teacher_shapes: Mapping[str, ShapeSpec],
    student_names: Sequence[str] = (),
    teacher_names: Sequence[str] = (),
    node: str = "MOKD.FEATURES",
    theirs_are: str = "the teacher has",
) -> dict[str, str]:
    """
    Return which level of the teacher each of the student's is matched with.

    Args:
        student_names, teacher_names: STUDENT and TEACHER of the config's ``node``. The second may
            be empty if the names are the same on both sides; both empty: all names that both sides
            have for the same stride; if there is none, the levels of equal stride; if there is
            none, names that both have.

    ValueError: a name that its side does not have, a name twice, lists of different length, or
    nothing in common; the message lists what both sides have.
    """
    ours, theirs = _described(student_shapes), _described(teacher_shapes)
    have = f"The student has {ours}; {theirs_are} {theirs}."
    for side, names in (("STUDENT", student_names), ("TEACHER", teacher_names)):
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{node}.{side} is {list(names)}: expected a list of names. {have}")
    if teacher_names and not student_names:
        raise ValueError(
            f"{node}.TEACHER is {list(teacher_names)} but {node}.STUDENT is empty: "
            f"name the student's level for each. {have}"
        )
    if not student_names:
        named = {name: name for name in student_shapes if name in teacher_shapes}
        alike = {n: n for n in named if student_shapes[n].stride == teacher_shapes[n].stride}
        # torchvision's names are numbers, and mean another stride in another family.
        common = alike or _levels_of_equal_stride(student_shapes, teacher_shapes) or named
        if not common:
            raise ValueError(
                "Student and teacher share neither a feature name nor a stride, so "
                f"{node}.STUDENT and {node}.TEACHER must say which level matches which. {have}"
            )
        return common
    teacher_names = teacher_names or student_names
    if len(student_names) != len(teacher_names):
        raise ValueError(
            f"{node}.STUDENT {list(student_names)} and {node}.TEACHER "
            f"{list(teacher_names)} must have the same length: one level for each. {have}"
        )
    sides = {"STUDENT": (student_names, student_shapes), "TEACHER": (teacher_names, teacher_shapes)}
    for side, (names, shapes) in sides.items():
        if unknown := [name for name in names if name not in shapes]:
            raise ValueError(f"{node}.{side} has {unknown}, which its side does not. {have}")
    if len(set(student_names)) < len(student_names):
        raise ValueError(f"{node}.STUDENT {list(student_names)} names a level twice.")
    return dict(zip(student_names, teacher_names))


def build_head_map(
    student_shapes: Mapping[str, ShapeSpec],
    teacher_shapes: Mapping[str, ShapeSpec],
    student_names: Sequence[str] = (),
    teacher_names: Sequence[str] = (),
) -> dict[str, str]:
    """
    Return which level of the teacher's heads each of the student's stands for.

    Args:
        teacher_shapes: of the levels that the heads read.
        student_names, teacher_names: MOKD.TEACHER_HEAD.STUDENT and .TEACHER. Both empty: levels of
            equal stride, of several that of the same name, else the first.

    ValueError: as :func:`build_level_map`.
    """
    if student_names or teacher_names:
        level_map = build_level_map(
            student_shapes,
            teacher_shapes,
            student_names,
            teacher_names,
            "MOKD.TEACHER_HEAD",
            "the teacher's heads read",
        )
        if len(set(level_map.values())) < len(level_map):
            raise ValueError(
                f"MOKD.TEACHER_HEAD.TEACHER {list(level_map.values())} names a level twice: the "
                "heads read each level once."
            )
        return level_map
    found: dict[str, str] = {}
    for name, shape in teacher_shapes.items():
        equal = [n for n, s in student_shapes.items() if s.stride == shape.stride]
        if free := [n for n in equal if n not in found]:
            found[name if name in free else free[0]] = name
    if not found:
        raise ValueError(
            "Student and teacher's heads share no stride, so MOKD.TEACHER_HEAD.STUDENT and "
            "MOKD.TEACHER_HEAD.TEACHER must say which level stands for which. The student has "
            f"{_described(student_shapes)}; the heads read {_described(teacher_shapes)}."
        )
    return found


def matched_levels(
    level_map: Mapping[str, str],
    shapes: Mapping[str, ShapeSpec],
    teacher_shapes: Mapping[str, ShapeSpec],
    align: Callable,
) -> list[Level]:
    """Return the levels of a map; ``align``: brings a pair of maps with their strides together."""
    return [
        Level(
            name,
            other,
            shapes[name].channels,
            teacher_shapes[other].channels,
            functools.partial(
                align,
                student_stride=shapes[name].stride,
                teacher_stride=teacher_shapes[other].stride,
            ),
            shapes[name].stride,
        )
        for name, other in level_map.items()
    ]


def _levels_of_equal_stride(student_shapes, teacher_shapes):
    """Only where it is clear which: one level of that stride on each side."""

    def by_stride(shapes):
        strides = [shape.stride for shape in shapes.values()]
        return {s.stride: name for name, s in shapes.items() if strides.count(s.stride) == 1}

    students, teachers = by_stride(student_shapes), by_stride(teacher_shapes)
    return {name: teachers[stride] for stride, name in students.items() if stride in teachers}


def _described(shapes):
    return ", ".join(f"{n} (stride {s.stride}, {s.channels} ch.)" for n, s in shapes.items())
