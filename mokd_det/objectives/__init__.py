# Copyright (c) The mokd_det authors.
"""What is matched between student and teacher, one objective a file."""

from .. import compat  # first: patches Detectron2 where it needs it
from .base import OBJECTIVES, Objective, StudentOutputs
from .feature_losses import FEATURE_LOSSES, align_resolution, onto_grid
from .features import LEVEL_WEIGHTS, FeatureObjective, Level
from .foreground import SOURCES, UNITS
from .logits import LogitObjective
from .output_losses import CLASS_LOSSES
from .outputs import OutputObjective
from .teacher_head import ClassifierHead, DetectorHeads, HeadReader, TeacherHeadObjective
from .projector import PROJECTORS, TEACHER_SIDES, SubspaceProjector, normalise_like, standardise
