# Copyright (c) The mokd_det authors.
"""The objective that matches what both detectors say about the same boxes and anchors."""

import logging

from torch.func import functional_call

from .output_losses import box_loss, class_loss, rpn_losses
from .outputs import build_output_reader
from .rpn_outputs import build_rpn_readers

__all__ = ["OutputObjective"]


class OutputObjective:
    """
    Classes and boxes of both sides at the teacher's proposals, and what their RPNs say at each
    anchor. The student's heads run a second time for it, on copies of the features and of their
    own parameters, so that the boundary can weigh what this objective adds to each.

    No ``nn.Module``: all of its parameters are the student's.
    """

    def __init__(
        self,
        student_reader,
        temperature=1.0,
        class_weight=1.0,
        box_weight=1.0,
        rpn_weight=1.0,
        rpn_readers=None,
    ):
        """
        Args:
            student_reader (OutputReader):
            temperature, class_weight, box_weight, rpn_weight (float): see ``MOKD.OUTPUTS``.
            rpn_readers (tuple[RPNReader]): of student and teacher; None: RPNs are not compared.

        Raises:
            ValueError: an option out of its range.
        """
        if not temperature > 0:
            raise ValueError(f"MOKD.OUTPUTS.TEMPERATURE is {temperature}: expected > 0.")
        if min(class_weight, box_weight, rpn_weight) < 0 or not class_weight + box_weight > 0:
            raise ValueError(
                f"MOKD.OUTPUTS.CLASS_WEIGHT is {class_weight}, BOX_WEIGHT {box_weight} and "
                f"RPN_WEIGHT {rpn_weight}: expected numbers >= 0, one of the first two above."
            )
        self.temperature = temperature
        self.class_weight = class_weight
        self.box_weight = box_weight
        self.rpn_weight = rpn_weight
        self.reader = student_reader
        self.rpn, self.teacher_rpn = rpn_readers if rpn_readers and rpn_weight else (None, None)
        trained = [
            (module, name, parameter)
            for module in (self.reader, self.rpn)
            if module is not None
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        self._places = [(module, name) for module, name, _ in trained]
        self.parameters = [parameter for _, _, parameter in trained]

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """
        Build from ``cfg.MOKD.OUTPUTS``.

        Raises:
            ValueError: outputs of a detector that cannot be read, or of other classes.
        """
        options = cfg.MOKD.OUTPUTS
        reader = build_output_reader(student, "student")
        if reader.num_classes != teacher.reader.num_classes:
            raise ValueError(
                f"MOKD.OUTPUTS.ENABLED True: the student has {reader.num_classes} classes and the "
                f"teacher {teacher.reader.num_classes}, so their outputs cannot be compared. Set "
                "MODEL.ROI_HEADS.NUM_CLASSES or MODEL.RETINANET.NUM_CLASSES, or distil features "
                "only (MOKD.OUTPUTS.ENABLED False)."
            )
        rpn_readers = build_rpn_readers(student, teacher.model)
        if options.RPN_WEIGHT and (rpn := getattr(student, "proposal_generator", None)):
            logging.getLogger(__name__).info(
                "Outputs: the RPNs of both sides are %s",
                f"compared on {', '.join(rpn_readers[0].in_features)} of "
                f"{', '.join(rpn.in_features)}."
                if rpn_readers
                else "not compared: on no level do both have one with the same anchors.",
            )
        return cls(
            reader,
            options.TEMPERATURE,
            options.CLASS_WEIGHT,
            options.BOX_WEIGHT,
            options.RPN_WEIGHT,
            rpn_readers,
        )

    def __call__(self, features, parameters, view, teacher):
        """
        Args:
            features (dict[str, Tensor]): the student's, this objective's copies.
            parameters (list[Tensor]): likewise of ``self.parameters``.
            view (TeacherView): of the same images; keeps the teacher's answer.
            teacher (Teacher): that had it.

        Returns:
            dict[str, Tensor]: scalars ``loss_output_classes`` and ``loss_output_boxes``, with RPNs
            ``loss_output_rpn_cls`` and ``loss_output_rpn_loc``.
        """
        boxes = self.reader.locations(features, view.proposals)
        if view.targets is None:
            view.targets = teacher.outputs(view, boxes)
            if self.rpn is not None:
                view.rpn_targets = teacher.rpn_outputs(view, self.teacher_rpn)
        losses = {}
        outputs = self._run(self.reader, parameters, features, boxes, view.image_sizes)
        if self.class_weight:
            loss = class_loss(outputs, view.targets, self.temperature)
            losses["loss_output_classes"] = self.class_weight * loss
        if self.box_weight:
            losses["loss_output_boxes"] = self.box_weight * box_loss(outputs, view.targets)
        if self.rpn is not None:
            ours, theirs = self._run(self.rpn, parameters, features), view.rpn_targets
            objectness, deltas = rpn_losses(ours.cropped_to(theirs), theirs.cropped_to(ours))
            losses["loss_output_rpn_cls"] = self.rpn_weight * objectness
            losses["loss_output_rpn_loc"] = self.rpn_weight * deltas
        return losses

    def _run(self, module, parameters, *args):
        # Copies of the buffers as well: a second run must not count for BatchNorm's statistics.
        tensors = {name: buffer.clone() for name, buffer in module.named_buffers()}
        for (owner, name), parameter in zip(self._places, parameters):
            if owner is module:
                tensors[name] = parameter
        return functional_call(module, tensors, args)
