# Copyright (c) The mokd_det authors.
"""The meta-architecture that trains a classifier with the help of a frozen one."""

from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from ..distillation_model import DistillationModel, boundary_of, loss_weights_of
from .classifier import Classifier
from .objectives import ClassifierFeatureObjective, LogitObjective
from .taps import PRE_LOGITS, replace_taps
from .teacher import build_classifier_teacher

__all__ = ["ClassifierDistillationModel"]


@META_ARCH_REGISTRY.register()
class ClassifierDistillationModel(DistillationModel):
    """
    As :class:`DistillationModel`, for classifiers. The shared features are the tapped ones, and the
    head's input if logits are distilled. All that comes before the last of them is shared; each
    objective's gradient is measured where it reaches them directly.
    """

    @classmethod
    def from_config(cls, cfg):
        options = cfg.MOKD
        # The student comes before the teacher, so that a seed gives it the same initial weights
        # as without distillation.
        student = Classifier(cfg)
        teacher = build_classifier_teacher(cfg)
        features = outputs = None
        if options.FEATURES.ENABLED:
            features = ClassifierFeatureObjective.from_config(cfg, student, teacher)
        if options.OUTPUTS.ENABLED:
            outputs = LogitObjective(student, teacher.model, options.OUTPUTS.TEMPERATURE)
        boundary = boundary_of(cfg, SharedPart(student))
        _check_place(student, features, outputs, options.BALANCING)
        return {
            "student": student,
            "teacher": teacher,
            "boundary": boundary,
            "input_format": cfg.INPUT.FORMAT,
            "features": features,
            "outputs": outputs,
            "loss_weights": loss_weights_of(cfg),
        }

    @property
    def taps(self):
        """tuple[str]: where the student's features are shared, in the order in which they run."""
        taps = tuple(self.features.level_map) if self.features is not None else ()
        # The head's input comes last: nothing inside the head is tapped.
        return (*taps, PRE_LOGITS) if self.outputs and PRE_LOGITS not in taps else taps

    def replace_features(self, function):
        return replace_taps(self.student, self.taps, function)


class SharedPart(nn.Module):
    """What task and distillation share of a classifier: all but its head, under stock names."""

    def __init__(self, classifier):
        super().__init__()
        self._classifier = [classifier]  # no part of this module

    def named_parameters(self, *args, **kwargs):
        classifier = self._classifier[0]
        head = {id(p) for p in classifier.head.parameters()}
        named = classifier.network.named_parameters(*args, **kwargs)
        return ((name, p) for name, p in named if id(p) not in head)

    def named_modules(self, *args, **kwargs):
        return self._classifier[0].network.named_modules(*args, **kwargs)


def _check_place(student, features, outputs, options):
    """
    At features, a rule sees conflict only where both gradients arrive. At parameters, the backward
    pass of the losses ends at the features, so no loss may reach what comes before around them.
    """
    if options.PLACE == "parameters" and getattr(student.network, "aux_logits", False):
        raise ValueError(
            "MOKD.BALANCING.PLACE 'parameters' cannot have the heads for training only of "
            f"{type(student.network).__name__}, which leave it before the tapped features: set "
            "MODEL.CLASSIFIER.OPTIONS to {aux_logits: False}, or PLACE to 'features'."
        )
    if options.PLACE != "features" or features is None or outputs is None:
        return
    if PRE_LOGITS not in features.level_map and options.RULE != "fixed":
        raise ValueError(
            f"MOKD.FEATURES.STUDENT is {list(features.level_map)} and MOKD.OUTPUTS.ENABLED True: "
            f"with MOKD.BALANCING.PLACE 'features' the task's gradient is measured at "
            f"'{PRE_LOGITS}' then, and that of the features elsewhere, so that rule "
            f"'{options.RULE}' could not see their conflict. Add '{PRE_LOGITS}' to "
            "MOKD.FEATURES.STUDENT and TEACHER, or set MOKD.BALANCING.PLACE to 'parameters'."
        )
