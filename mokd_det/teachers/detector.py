# Copyright (c) The mokd_det authors.
"""The frozen detector: its own weights, its own preprocessing."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..readers import AnchorOutputs, BoxOutputs, BoxReader, RPNReader, build_box_reader
from ..readers import feature_shapes, stock_rpn
from ..speed import pool_in_float32
from .base import Teacher, TeacherOutputs, noise_image
from .scripted import ScriptedDetector


@dataclasses.dataclass
class DetectorTeacherOutputs(TeacherOutputs):
    """
    What a detector says about a batch. More is computed when it is asked for.

    Attributes:
        image_sizes: (height, width) of each image before padding.
        proposals: for each image (P_i, 4) boxes, XYXY in pixels; None unless asked for before.
        state: what the teacher's reader needs to say more.
        rpn: what its RPN's head said on all of its levels when it proposed; None: it did not.
    """

    image_sizes: list[tuple[int, int]]
    teacher: "DetectorTeacher"
    proposals: list[Tensor] | None = None
    state: Any = None
    rpn: Any = None

    def at(self, boxes: list[Tensor]) -> BoxOutputs:
        """Return what it says at boxes, for each image (R_i, 4) XYXY in pixels."""
        reader = self.teacher.reader
        assert reader is not None, "[DetectorTeacher] boxes need read_boxes()"

        def ask() -> BoxOutputs:
            return self.teacher.ask(reader.at, self.state, boxes, self.image_sizes)

        # Several objectives ask about the proposals.
        return self.remember("at proposals", ask) if boxes is self.proposals else ask()

    def anchors(self, reader: RPNReader) -> AnchorOutputs:
        """Return what its RPN says at every anchor, by a reader of this teacher's."""
        if self.rpn is not None:
            return reader.of_whole(self.rpn)
        question = ("at anchors", *reader.in_features)
        return self.remember(question, lambda: self.teacher.ask(reader, self.features))

    def objects(self, threshold: float) -> list[Tensor]:
        """Return, for each image, the (B_i, 4) boxes that it is sure of beyond ``threshold``."""
        assert self.proposals is not None, "[DetectorTeacher] objects need read_boxes()"
        outputs = self.at(self.proposals)
        confidence, classes = outputs.confidence()
        counts = [len(boxes) for boxes in self.proposals]
        boxes = outputs.boxes_of(classes).split(counts)
        return [b[c > threshold] for b, c in zip(boxes, confidence.split(counts))]


class DetectorTeacher(Teacher):
    """A frozen detector of Detectron2 or torchvision, or another with such a ``backbone``."""

    def __init__(self, model: Any, input_format: str, *, proposals: int = 256, **options: Any):
        """
        ``input_format``: it was trained with, "RGB" or "BGR"; ``proposals``: most boxes an image at
        which its outputs are read. Options and errors are :class:`Teacher`'s.
        """
        if options.get("compile") and isinstance(model, ScriptedDetector):
            raise ValueError(
                f"MOKD.TEACHER.COMPILE is '{options['compile']}', but a TorchScript file is "
                "compiled already: set it to ''."
            )
        # A script may have a precision written into it.
        is_script = isinstance(model, ScriptedDetector)
        look = None if is_script else functools.partial(_features_of_noise, model)
        super().__init__(model, model.backbone, look, **options)
        self.input_format, self.proposals = input_format, proposals
        self.reader: BoxReader | None = None
        if self.precision != torch.float32:  # else it may run under the student's autocast
            pool_in_float32(self.model)

    def feature_shapes(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of the backbone's feature maps."""
        return feature_shapes(self.model)

    def read_boxes(self) -> None:
        """
        From now on :meth:`run` also proposes boxes, and its outputs can be asked about boxes.
        ValueError if this detector's cannot be read.
        """
        if self.reader is None:
            self.reader = build_box_reader(self.model, "teacher")

    def run(self, batch: list[dict], input_format: str) -> DetectorTeacherOutputs:
        """See :meth:`Teacher.run`; each dict has ``image``, a (C, H, W) tensor."""
        return self._run_beside(self._run_detector, batch, input_format)

    def _run_detector(self, batch: list[dict], input_format: str) -> DetectorTeacherOutputs:
        if input_format != self.input_format:
            batch = [{"image": x["image"].flip(0)} for x in batch]
        images: ImageList = self.model.preprocess_image(batch)
        tensor = images.tensor.contiguous(memory_format=self.memory_format)
        features = self.model.backbone(tensor)
        outputs = DetectorTeacherOutputs(features, images.image_sizes, self)
        if self.reader is not None:
            outputs.state = self.reader.run(features)
            rpn = stock_rpn(self.model)
            with _said_by(rpn.rpn_head if rpn else None) as said:
                outputs.proposals = self.reader.propose(outputs.state, images, self.proposals)
            outputs.rpn = said[0] if said else None
        if self.precision is not None:
            # The student's side may have another precision, and no autocast to bridge it.
            outputs.features = {name: x.float() for name, x in features.items()}
        return outputs

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)`` of a part of the teacher, run as the teacher is."""
        return self._run(function, *args)


@contextlib.contextmanager
def _said_by(module: nn.Module | None) -> Iterator[list[Any]]:
    """Collect what a module returns while this is open."""
    said: list[Any] = []
    if module is None:
        yield said
        return
    handle = module.register_forward_hook(lambda _module, _inputs, output: said.append(output))
    try:
        yield said
    finally:
        handle.remove()


def _features_of_noise(model: Any) -> dict[str, Tensor]:
    image = noise_image(getattr(model, "pixel_mean", torch.zeros(3)).numel(), 256)
    return model.backbone(model.preprocess_image([{"image": image}]).tensor)
