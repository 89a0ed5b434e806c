# Copyright (c) The mokd_det authors.
"""The frozen classifier: the student's images, under its own normalisation and resolution."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Teacher, TeacherOutputs, noise_image

if TYPE_CHECKING:
    from ..data.classification import Batch
    from ..modeling import Classifier

# Name of the head's input among the names of submodules.
PRE_LOGITS = "pre_logits"


@dataclasses.dataclass
class ClassifierTeacherOutputs(TeacherOutputs):
    """What a classifier says about a batch; its features are the tapped ones."""

    logits: Tensor  # (N, C)


class ClassifierTeacher(Teacher):
    """A frozen classifier."""

    def __init__(
        self, model: "Classifier", image_size: int, is_resized: bool = False, **options: Any
    ):
        """
        ``image_size``: side of the images that it sees, in pixels; ``is_resized``: the student's
        images have another. Options and errors are :class:`Teacher`'s.
        """
        self.image_size, self.is_resized = image_size, is_resized
        super().__init__(model, model.network, self._logits_of_noise, **options)
        self._found: dict[str, Tensor] = {}
        self._tapped: set[str] = set()

    def tap(self, names: Sequence[str]) -> None:
        """From now on outputs have these features: of submodules, or ``PRE_LOGITS``."""
        # Hooks for good, unlike the student's: the teacher is ours, and may be compiled.
        for name in names:
            if name in self._tapped:
                continue
            self._tapped.add(name)
            if name == PRE_LOGITS:
                self.model.head.register_forward_pre_hook(
                    lambda _module, args: (self._keep(PRE_LOGITS, args[0]),)
                )
            else:
                self.model.network.get_submodule(name).register_forward_hook(
                    lambda _module, _args, output, name=name: self._keep(name, output)
                )

    def _logits_of_noise(self) -> Tensor:
        image = noise_image(3, self.image_size)[None].to(self.model.device, torch.float32)
        return self.model.network(self.model.preprocess(image))

    def _keep(self, name: str, feature: Tensor) -> Tensor:
        self._found[name] = feature
        return feature.clone()  # goes on: what follows may work in place, as on the student's side

    def run(self, batch: "Batch", input_format: str = "RGB") -> ClassifierTeacherOutputs:
        """See :meth:`Teacher.run`; images are always RGB."""
        return self._run_beside(self._run_network, batch.images)

    def _run_network(self, images: Tensor) -> ClassifierTeacherOutputs:
        images = images.to(self.model.device, torch.float32, non_blocking=True)
        if self.is_resized:
            images = F.interpolate(images, self.image_size, mode="bilinear", antialias=True)
        images = self.model.preprocess(images).contiguous(memory_format=self.memory_format)
        self._found.clear()
        logits = self.model.network(images)
        outputs = ClassifierTeacherOutputs(dict(self._found), logits)
        if self.precision is not None:
            # The student's side may have another precision, and no autocast to bridge it.
            outputs.features = {name: x.float() for name, x in outputs.features.items()}
            outputs.logits = logits.float()
        return outputs
