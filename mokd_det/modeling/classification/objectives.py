# Copyright (c) The mokd_det authors.
"""What is matched between two classifiers: features in a learned subspace, and logits."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ...subspace import PROJECTORS, build_feature_loss
from .classifier import default_tap
from .taps import PRE_LOGITS, as_map, common_grid, find_taps

__all__ = ["ClassifierFeatureObjective", "LogitObjective"]


class ClassifierFeatureObjective(nn.Module):
    """Sum over taps of the loss between both sides' features in their common subspace."""

    def __init__(self, student_shapes, teacher_shapes, level_map, projectors, loss):
        """
        Args:
            student_shapes, teacher_shapes (dict[str, TapShape]): by tap.
            level_map (dict[str, str]): student's tap -> teacher's.
            projectors (dict[str, nn.Module]): by the student's tap, see ``PROJECTORS``.
            loss (callable): of two (N, n, H, W), see ``FEATURE_LOSSES``.
        """
        super().__init__()
        # Names of modules may not have dots.
        self.projectors = nn.ModuleDict({_key(tap): p for tap, p in projectors.items()})
        self.level_map = dict(level_map)
        self.loss = loss
        self._shapes = student_shapes, teacher_shapes

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """
        Build from ``cfg.MOKD.FEATURES``.

        Args:
            student (Classifier):
            teacher (ClassifierTeacher): learns which of its taps are read.

        Raises:
            ValueError: a tap that does not exist, or lists of different length.
        """
        options = cfg.MOKD.FEATURES
        if options.FOREGROUND:
            raise ValueError(
                f"MOKD.FEATURES.FOREGROUND is '{options.FOREGROUND}', but classifiers have no "
                "boxes: leave it empty."
            )
        if options.LEVEL_WEIGHTS != "equal":
            raise ValueError(
                f"MOKD.FEATURES.LEVEL_WEIGHTS is '{options.LEVEL_WEIGHTS}', but a classifier's "
                "taps are no levels of a pyramid: leave it 'equal'."
            )
        ours = list(options.STUDENT) or [default_tap(student)]
        theirs = list(options.TEACHER)
        if not theirs:
            theirs = [default_tap(teacher.model)] if not options.STUDENT else ours
        if len(ours) != len(theirs) or len(set(ours)) < len(ours):
            raise ValueError(
                f"MOKD.FEATURES.STUDENT {ours} and MOKD.FEATURES.TEACHER {theirs} must be lists of "
                "the same length, and no tap of the student may come twice."
            )
        shapes = find_taps(
            student, ours, cfg.INPUT.CLASSIFICATION.SIZE_TRAIN, "MOKD.FEATURES.STUDENT"
        )
        teacher_shapes = find_taps(
            teacher.model, theirs, teacher.image_size, "MOKD.FEATURES.TEACHER"
        )
        teacher.taps = tuple(teacher_shapes)
        level_map = {tap: dict(zip(ours, theirs))[tap] for tap in shapes}
        projector = PROJECTORS.get(options.PROJECTOR)
        projectors = {
            tap: projector(
                shapes[tap].channels,
                teacher_shapes[other].channels,
                dim=options.DIM,
                teacher_side=options.TEACHER_SIDE,
            )
            for tap, other in level_map.items()
        }
        loss = build_feature_loss(options.LOSS, options.ALIGNMENT)
        return cls(shapes, teacher_shapes, level_map, projectors, loss)

    def forward(self, features, view, teacher, batch):
        """
        Args:
            features (dict[str, Tensor]): the student's, by tap.
            view (ClassifierView): of the same images.
            teacher, batch: as other objectives get them.

        Returns:
            dict[str, Tensor]: ``loss_features``, a scalar.
        """
        shapes, teacher_shapes = self._shapes
        losses = []
        for tap, other in self.level_map.items():
            maps = common_grid(
                as_map(features[tap], shapes[tap]),
                as_map(view.features[other], teacher_shapes[other]),
            )
            losses.append(self.loss(*self.projectors[_key(tap)](*maps)))
        return {"loss_features": sum(losses)}


def _key(tap):
    return tap.replace(".", "_")


class LogitObjective:
    """
    Kullback-Leibler divergence of the student's class probabilities from the teacher's, at a
    temperature and times its square (Hinton et al. 2015). The head runs a second time for it, on
    copies of the features and of its own parameters, so that the boundary can weigh what this
    objective adds to each.

    No ``nn.Module``: all of its parameters are the student's.
    """

    def __init__(self, student, teacher, temperature=1.0):
        """
        Args:
            student, teacher (Classifier):
            temperature (float): divides the logits of both; > 0.

        Raises:
            ValueError: the temperature, or other classes on both sides.
        """
        if not temperature > 0:
            raise ValueError(f"MOKD.OUTPUTS.TEMPERATURE is {temperature}: expected > 0.")
        if student.num_classes != teacher.num_classes:
            raise ValueError(
                f"MOKD.OUTPUTS.ENABLED True: the student has {student.num_classes} classes and the "
                f"teacher {teacher.num_classes}, so their logits cannot be compared. Set "
                "MODEL.CLASSIFIER.NUM_CLASSES to the same number, or distil features only "
                "(MOKD.OUTPUTS.ENABLED False)."
            )
        self._head = _WithoutHooks(student.head)
        self.temperature = temperature
        trained = {n: p for n, p in self._head.named_parameters() if p.requires_grad}
        self._names = list(trained)
        self.parameters = list(trained.values())

    def __call__(self, features, parameters, view, teacher):
        """
        Args:
            features (dict[str, Tensor]): the student's, this objective's copies.
            parameters (list[Tensor]): likewise of ``self.parameters``.
            view (ClassifierView): of the same images.
            teacher: as other objectives get it.

        Returns:
            dict[str, Tensor]: ``loss_logits``, a scalar, averaged over images.
        """
        # Copies of the buffers as well: a second run must not count for BatchNorm's statistics.
        tensors = {name: buffer.clone() for name, buffer in self._head.named_buffers()}
        tensors |= dict(zip(self._names, parameters))
        given = features[PRE_LOGITS]
        # The task's run follows, with the same dropout.
        devices = [given.device] if given.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            logits = functional_call(self._head, tensors, (given,)).flatten(1)
        ours = F.log_softmax(logits.float() / self.temperature, dim=1)
        theirs = F.log_softmax(view.logits.float() / self.temperature, dim=1)
        loss = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return {"loss_logits": loss * self.temperature**2}


class _WithoutHooks(nn.Module):
    """Runs a module without its own hooks: the second run is not to be tapped."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module.forward(x.clone())  # it may work in place
