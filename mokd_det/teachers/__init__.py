# Copyright (c) The mokd_det authors.
"""Frozen models: they are only ever run, and never part of what trains or is saved."""

from .. import compat  # first: patches Detectron2 where it needs it
from .base import PRECISIONS, Teacher, TeacherOutputs, speed_options
from .classifier import PRE_LOGITS, ClassifierTeacher, ClassifierTeacherOutputs
from .detector import DetectorTeacher, DetectorTeacherOutputs
from .scripted import ScriptedDetector
