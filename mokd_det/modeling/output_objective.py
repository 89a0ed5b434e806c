# Copyright (c) The mokd_det authors.
"""The objective that matches what both detectors say about the same boxes."""

from torch.func import functional_call

from .output_losses import box_loss, class_loss
from .outputs import build_output_reader

__all__ = ["OutputObjective"]


class OutputObjective:
    """
    Classes and boxes of both sides at the teacher's proposals. The student's heads run a second
    time for it, on copies of the features and of their own parameters, so that the boundary can
    weigh what this objective adds to each.

    No ``nn.Module``: all of its parameters are the student's.
    """

    def __init__(self, student_reader, temperature=1.0, class_weight=1.0, box_weight=1.0):
        """
        Args:
            student_reader (OutputReader):
            temperature, class_weight, box_weight (float): see ``MOKD.OUTPUTS``.

        Raises:
            ValueError: an option out of its range.
        """
        if not temperature > 0:
            raise ValueError(f"MOKD.OUTPUTS.TEMPERATURE is {temperature}: expected > 0.")
        if min(class_weight, box_weight) < 0 or not class_weight + box_weight > 0:
            raise ValueError(
                f"MOKD.OUTPUTS.CLASS_WEIGHT is {class_weight} and BOX_WEIGHT {box_weight}: "
                "expected numbers >= 0, at least one above."
            )
        self.reader = student_reader
        self.temperature = temperature
        self.class_weight = class_weight
        self.box_weight = box_weight
        trained = {n: p for n, p in student_reader.named_parameters() if p.requires_grad}
        self._names = list(trained)
        self.parameters = list(trained.values())

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
        return cls(reader, options.TEMPERATURE, options.CLASS_WEIGHT, options.BOX_WEIGHT)

    def __call__(self, features, parameters, view, teacher):
        """
        Args:
            features (dict[str, Tensor]): the student's, this objective's copies.
            parameters (list[Tensor]): likewise of ``self.parameters``.
            view (TeacherView): of the same images; keeps the teacher's answer.
            teacher (Teacher): that had it.

        Returns:
            dict[str, Tensor]: scalars ``loss_output_classes`` and ``loss_output_boxes``.
        """
        boxes = self.reader.locations(features, view.proposals)
        if view.targets is None:
            view.targets = teacher.outputs(view, boxes)
        # Copies of the buffers as well: a second run must not count for BatchNorm's statistics.
        tensors = {name: buffer.clone() for name, buffer in self.reader.named_buffers()}
        tensors |= dict(zip(self._names, parameters))
        outputs = functional_call(self.reader, tensors, (features, boxes, view.image_sizes))
        losses = {}
        if self.class_weight:
            loss = class_loss(outputs, view.targets, self.temperature)
            losses["loss_output_classes"] = self.class_weight * loss
        if self.box_weight:
            losses["loss_output_boxes"] = self.box_weight * box_loss(outputs, view.targets)
        return losses
