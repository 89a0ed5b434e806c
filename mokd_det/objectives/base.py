# Copyright (c) The mokd_det authors.
"""What an objective is: something in which the student is to match its teacher."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import Parameter

from ..balancing import Parameters
from ..config import declare_options
from ..registry import Registry
from ..teachers import Teacher, TeacherOutputs

if TYPE_CHECKING:
    from ..tasks import Task
    from .features import Level

# The student's own losses, and what the node MOKD has besides objectives.
RESERVED = (
    *("task", "enabled", "objectives", "meta_architecture", "teacher", "inherit", "balancing"),
    "recipe_for",
)


class _ObjectiveRegistry(Registry):
    def register(self, name: str) -> Callable:
        if name.lower() in RESERVED:
            raise KeyError(f"An objective cannot be called '{name}': that name has a meaning.")
        add = super().register(name)

        def decorator(cls: Any) -> Any:
            cls = add(cls)
            declare_options(name.upper(), {"LOSS_WEIGHT": 1.0, **cls.options})
            return cls

        return decorator

    def remove(self, name: str) -> None:
        super().remove(name)
        declare_options(name.upper(), None)


OBJECTIVES = _ObjectiveRegistry("OBJECTIVES", "MOKD.OBJECTIVES")
"""Subclasses of :class:`Objective`, built by their ``from_config``."""


@dataclasses.dataclass(frozen=True)
class StudentOutputs:
    """
    What the student says about a batch, on one objective's branch of the boundary.

    Attributes:
        features: by name: of a detector's backbone (N, C, H / stride, W / stride); of a classifier
            what is tapped.
        batch: what the student was given, with ground truth: a list of Detectron2's dicts, or a
            :class:`mokd_det.data.classification.Batch`.
        parameters: this branch's copies of the parameters that the objective borrows.
    """

    features: dict[str, Tensor]
    batch: Any
    parameters: dict[Parameter, Tensor] = dataclasses.field(default_factory=dict)

    def run(self, module: nn.Module, *args: Any) -> Any:
        """
        Return ``module(*args)`` of a borrowed module, on this branch. Its buffers stay as they are:
        a second run must not count for BatchNorm's statistics.
        """
        tensors = {name: buffer.clone() for name, buffer in module.named_buffers()}
        for name, parameter in module.named_parameters():
            if parameter in self.parameters:
                tensors[name] = self.parameters[parameter]
        return functional_call(module, tensors, args)


class Objective(nn.Module):
    """
    One distillation loss. Its gradient is measured, weighed and logged under its name.

    Its parameters are its own (projectors): they train beside the student and end with training.
    Parts of the student that it runs again, such as a head, it declares by :meth:`borrow` and runs
    by :meth:`StudentOutputs.run`.

    Class attributes, for subclasses to set:
        options ({}): options and their defaults, in the config's node ``MOKD.<NAME>``;
            ``LOSS_WEIGHT`` is always there.
        tasks (()): names of the tasks that it is for; empty: all.
        compares_classes (False): of both sides, by the classes' numbers.

    Attributes, for :meth:`from_config` to set:
        taps: names of the student's features that it reads.
        levels: the pairs of features that it matches, if it does; for the log.
    """

    name: str = ""
    options: ClassVar[dict[str, Any]] = {}
    tasks: ClassVar[tuple[str, ...]] = ()
    compares_classes: ClassVar[bool] = False
    taps: Sequence[str] = ()
    levels: Sequence["Level"] = ()

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Raise ValueError for options out of their range. No data or weights are read for it."""

    @classmethod
    def from_config(
        cls, cfg: CfgNode, task: "Task", student: nn.Module, teacher: Teacher
    ) -> "Objective":
        """
        Build it by the student's config; ValueError if a model lacks what is to be matched. The
        task knows where models are tapped. The teacher is asked here for the outputs it shall give.
        """
        return cls()

    def forward(self, student: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """
        Return named scalars whose sum is the objective. Names begin with "loss_" and are unique
        among all objectives and the student's own losses.
        """
        raise NotImplementedError

    def borrow(self, module: nn.Module) -> nn.Module:
        """Declare a part of the student that this objective runs; return it."""
        # Not as a submodule: it stays the student's in parameters(), state_dict() and optimizers.
        self.__dict__.setdefault("_borrowed", []).append(module)
        return module

    def heads(self) -> Sequence[nn.Module]:
        """
        Return modules of the student that this objective runs on the very features that the task
        runs them on, so that they may run once.
        """
        return ()

    def used_parameters(self) -> Parameters:
        """Return the trained parameters that it has for itself, and those that it borrows."""
        borrowed = [p for m in self.__dict__.get("_borrowed", ()) for p in m.parameters()]
        own, borrowed = ([p for p in x if p.requires_grad] for x in (self.parameters(), borrowed))
        return Parameters(own, borrowed)

    def on_branch(
        self,
        features: dict[str, Tensor],
        parameters: dict[Parameter, Tensor],
        batch: Any,
        teacher: TeacherOutputs,
    ) -> dict[str, Tensor]:
        """Run it on its branch of the boundary: on the copies of features and parameters."""
        own = {name: parameters[p] for name, p in self.named_parameters() if p in parameters}
        outputs = StudentOutputs(features, batch, parameters)
        return functional_call(self, own, (outputs, teacher))
