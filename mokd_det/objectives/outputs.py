# Copyright (c) The mokd_det authors.
"""The objective that matches what both detectors say about the same boxes and anchors."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detectron2.config import CfgNode
from torch import Tensor, nn

from ..readers import BoxReader, RPNReader, build_box_reader, build_rpn_readers
from .base import OBJECTIVES, Objective, StudentOutputs
from .output_losses import box_loss, check_beta, check_weights, class_loss, rpn_losses

if TYPE_CHECKING:
    from ..tasks import Task


@OBJECTIVES.register("outputs")
class OutputObjective(Objective):
    """
    Classes and boxes of both sides at the teacher's proposals, and what their RPNs say at each
    anchor. In steps that measure the student's heads run a second time for it, on copies of
    features and parameters, so that the boundary can weigh what it adds to each.
    """

    tasks = ("detection",)
    compares_classes = True

    def __init__(
        self,
        student_reader: BoxReader,
        temperature: float = 1.0,
        class_weight: float = 1.0,
        box_weight: float = 1.0,
        rpn_weight: float = 1.0,
        rpn_readers: tuple[RPNReader, RPNReader] | None = None,
        loss: str = "kl",
        dkd_beta: float = 1.0,
    ):
        """``rpn_readers``: of student and teacher, or None. For the rest see ``MOKD.OUTPUTS``."""
        super().__init__()
        self.temperature, self.loss, self.dkd_beta = temperature, loss, dkd_beta
        self.class_weight, self.box_weight, self.rpn_weight = class_weight, box_weight, rpn_weight
        # A list: parts of the student and the teacher, not of this module.
        self._readers: list[Any] = [self.borrow(student_reader)]
        if rpn_readers and rpn_weight:
            self._readers += [self.borrow(rpn_readers[0]), rpn_readers[1]]

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        options = cfg.MOKD.OUTPUTS
        check_beta("MOKD.OUTPUTS", options)
        check_weights("MOKD.OUTPUTS", options, ("CLASS_WEIGHT", "BOX_WEIGHT"))

    @classmethod
    def from_config(
        cls, cfg: CfgNode, task: "Task", student: nn.Module, teacher: Any
    ) -> "OutputObjective":
        options = cfg.MOKD.OUTPUTS
        teacher.read_boxes()
        reader = build_box_reader(student, "student")
        if reader.num_classes != teacher.reader.num_classes:
            raise ValueError(
                f"MOKD.OBJECTIVES has 'outputs', but the student has {reader.num_classes} classes "
                f"and the teacher {teacher.reader.num_classes}, so they cannot be compared. Set "
                "MODEL.ROI_HEADS.NUM_CLASSES or MODEL.RETINANET.NUM_CLASSES, or distil "
                "features only (MOKD.OBJECTIVES ['teacher_head'])."
            )
        if options.LOSS == "dkd" and not (reader.exclusive and teacher.reader.exclusive):
            raise ValueError(
                "MOKD.OUTPUTS.LOSS is 'dkd', which compares softmaxes, but a side has sigmoids, "
                "one for each class (RetinaNet): use 'kl' or 'dist'."
            )
        rpn_readers = build_rpn_readers(student, teacher.model)
        given = list(getattr(task.shared_part(student), "output_shape", dict)())
        read = {*reader.in_features, *(rpn_readers[0].in_features if rpn_readers else ())}
        if given and (missing := sorted(read - set(given))):
            raise ValueError(
                f"MOKD.OBJECTIVES has 'outputs', but the heads of the student read {missing}, and "
                f"gradients meet at {given}: take it out."
            )
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
            options.LOSS,
            options.DKD_BETA,
        )

    def heads(self) -> Sequence[nn.Module]:
        student_reader, *rpn_readers = self._readers
        return [module for reader in (student_reader, *rpn_readers[:1]) for module in reader.heads]

    def forward(self, student: StudentOutputs, teacher: Any) -> dict[str, Tensor]:
        """
        Return scalars ``loss_output_classes`` and ``loss_output_boxes``, with RPNs also
        ``loss_output_rpn_cls`` and ``loss_output_rpn_loc``.
        """
        reader, *rpn_readers = self._readers
        boxes = reader.locations(student.features, teacher.proposals)
        targets = teacher.remember("outputs at boxes", lambda: teacher.at(boxes))
        losses = {}
        outputs = student.run(reader, student.features, boxes, teacher.image_sizes)
        if self.class_weight:
            loss = class_loss(outputs, targets, self.temperature, self.loss, self.dkd_beta)
            losses["loss_output_classes"] = self.class_weight * loss
        if self.box_weight:
            losses["loss_output_boxes"] = self.box_weight * box_loss(outputs, targets)
        if rpn_readers:
            rpn, teacher_rpn = rpn_readers
            theirs = teacher.anchors(teacher_rpn)
            ours = student.run(rpn, student.features)
            objectness, deltas = rpn_losses(ours.cropped_to(theirs), theirs.cropped_to(ours))
            losses["loss_output_rpn_cls"] = self.rpn_weight * objectness
            losses["loss_output_rpn_loc"] = self.rpn_weight * deltas
        return losses
