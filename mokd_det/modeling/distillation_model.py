# Copyright (c) The mokd_det authors.
"""The meta-architecture that trains a stock detector with the help of a frozen one."""

import math

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling import build_model as build_detector
from torch import nn
from torch.func import functional_call

from ..balancing import build_boundary
from .feature_objective import FeatureObjective
from .feature_tap import replace_features
from .output_objective import OutputObjective
from .teacher import build_teacher

__all__ = ["DistillationModel", "boundary_of", "loss_weights_of"]


@META_ARCH_REGISTRY.register()
class DistillationModel(nn.Module):
    """
    A student detector, a hidden frozen teacher, and what is matched between them.

    The student is the stock model of its config, not a subclass or a copy, and stays usable as
    such: ``model.student``. In training, ``forward`` returns the objectives apart from each other;
    in evaluation it is the student's forward.

    Any model can be the student that has ``backbone``, a module which its forward pass calls once
    and which returns dict[str, Tensor], with ``output_shape()`` as Detectron2's backbones; and
    whose forward pass in training returns dict[str, Tensor] of losses. A teacher needs such a
    backbone and ``preprocess_image(batched_inputs)``, which returns an ImageList.

    Attributes:
        inference (callable): what evaluation runs; the student, unless the trainer exchanges it.
        teacher_view (TeacherView or None): of the latest forward pass, for a second one on the
            same batch; only kept if the rule asks for that.
    """

    @configurable
    def __init__(
        self,
        *,
        student,
        teacher,
        boundary,
        input_format,
        features=None,
        outputs=None,
        loss_weights=None,
    ):
        """
        Args:
            student (nn.Module): see above.
            teacher (Teacher): the frozen teacher.
            boundary (Boundary): balances the gradients at the student's features.
            input_format (str): channel order of the images the model gets, "RGB" or "BGR".
            features (FeatureObjective or None):
            outputs (OutputObjective or None):
            loss_weights (dict[str, float]): factors of the losses of "features" and "outputs",
                default 1.

        Raises:
            ValueError: no objective besides the task, or a factor that is not positive.
        """
        super().__init__()
        if features is None and outputs is None:
            raise ValueError(
                "MOKD.ENABLED is True, but MOKD.FEATURES.ENABLED and MOKD.OUTPUTS.ENABLED are "
                "False: enable one of them."
            )
        self.student = student
        self.teacher = teacher
        self.boundary = boundary
        self.input_format = input_format
        self.features = features
        self.outputs = outputs
        given = {"features": features, "outputs": outputs}
        self.objectives = ["task", *(name for name, value in given.items() if value is not None)]
        self.loss_weights = dict.fromkeys(given, 1.0) | (loss_weights or {})
        for name, weight in self.loss_weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"MOKD.{name.upper()}.LOSS_WEIGHT is {weight}: expected a finite number > 0. "
                    f"To go without this objective set MOKD.{name.upper()}.ENABLED to False."
                )
        self.inference = student.__call__
        self.teacher_view = None

    @classmethod
    def from_config(cls, cfg):
        options = cfg.MOKD
        # The student comes before the teacher, so that a seed gives it the same initial weights
        # as without distillation.
        student = build_detector(cfg)
        _check_student(student, cfg.MODEL.META_ARCHITECTURE)
        boundary = boundary_of(cfg, student.backbone)
        teacher = build_teacher(cfg)
        _check_channels(student, teacher.model)
        features = outputs = None
        if options.FEATURES.ENABLED:
            features = FeatureObjective.from_config(cfg, student, teacher)
        if options.OUTPUTS.ENABLED:
            outputs = OutputObjective.from_config(cfg, student, teacher)
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
    def device(self):
        return next(self.student.parameters()).device

    @property
    def projectors(self):
        """nn.ModuleDict: by the student's feature name; what is trained besides the student."""
        return nn.ModuleDict() if self.features is None else self.features.projectors

    def forward(self, batched_inputs, teacher_view=None):
        """
        Args:
            batched_inputs (list[dict]): Detectron2's format, as the student takes it.
            teacher_view (TeacherView): the teacher's of this batch, if known already.

        Returns:
            In training dict[str, dict[str, Tensor]]: losses by objective, ``{"task": the
            student's own, "features": {"loss_features": scalar}, "outputs":
            {"loss_output_classes": scalar, "loss_output_boxes": scalar}}``, without those that
            are not enabled; their gradients meet at ``self.boundary``.
            In evaluation what the student returns.
        """
        if not self.training:
            return self.inference(batched_inputs)

        view = teacher_view or self.teacher.view(batched_inputs, self.input_format)
        needed_again = self.boundary.balancer.needs_second_forward
        self.teacher_view = view if needed_again else None
        losses = {}

        def on_features(features):
            self.teacher.wait(view)
            names, maps = list(features), list(features.values())
            extra, own = {}, []
            if self.features is not None:
                trained = {n: p for n, p in self.features.named_parameters() if p.requires_grad}
                own = [self.objectives.index("features")]
                extra[own[0]] = list(trained.values())
            if self.outputs is not None:
                extra[self.objectives.index("outputs")] = self.outputs.parameters
            copies = self.boundary.split(maps, len(self.objectives), names, extra, own)
            copies = {
                name: (dict(zip(names, tensors)), tensors[len(names) :])
                for name, tensors in zip(self.objectives, copies)
            }
            # Before the heads run: autograd then adds the distillation's gradient after theirs,
            # in the order of a plain sum.
            if self.features is not None:
                maps, parameters = copies["features"]
                losses["features"] = functional_call(
                    self.features,
                    dict(zip(trained, parameters)),
                    (maps, view, self.teacher, batched_inputs),
                )
            if self.outputs is not None:
                losses["outputs"] = self.outputs(*copies["outputs"], view, self.teacher)
            for name, parts in losses.items():
                if (weight := self.loss_weights[name]) != 1:
                    losses[name] = {key: weight * loss for key, loss in parts.items()}
            return copies["task"][0]

        with self.replace_features(on_features):
            task = self.student(batched_inputs)
        return {"task": task, **losses}

    def replace_features(self, function):
        """
        Return a context in which the student's shared features, dict[str, Tensor], go through
        ``function`` on their way to the heads.
        """
        return replace_features(self.student.backbone, function)


def boundary_of(cfg, shared):
    """Return the boundary of ``cfg.MOKD.BALANCING``; ``shared`` is the module before it."""
    options = cfg.MOKD
    return build_boundary(
        shared=shared,
        objectives=1 + options.FEATURES.ENABLED + options.OUTPUTS.ENABLED,
        steps=cfg.SOLVER.MAX_ITER,
        **{key.lower(): value for key, value in options.BALANCING.items()},
    )


def loss_weights_of(cfg):
    """Return the factors of the distillation losses, by objective."""
    options = {"features": cfg.MOKD.FEATURES, "outputs": cfg.MOKD.OUTPUTS}
    return {name: option.LOSS_WEIGHT for name, option in options.items()}


def _check_student(student, name):
    backbone = getattr(student, "backbone", None)
    if not isinstance(backbone, nn.Module) or not hasattr(backbone, "output_shape"):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE '{name}' has no 'backbone' with 'output_shape()', which "
            "distilling its features needs: see DistillationModel's documentation."
        )


def _check_channels(student, teacher):
    """What both sides are given has one number of channels."""
    sides = [getattr(model, "pixel_mean", None) for model in (student, teacher)]
    if all(mean is not None for mean in sides):
        ours, theirs = (mean.numel() for mean in sides)
        if ours != theirs:
            raise ValueError(
                f"MODEL.PIXEL_MEAN has {ours} entries for the student and {theirs} for the "
                "teacher, but both see the same images: use models for the same number of channels."
            )
