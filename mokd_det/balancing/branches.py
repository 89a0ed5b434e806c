# Copyright (c) The mokd_det authors.
"""What an objective is given at a boundary, and what it uses besides."""

import dataclasses
from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.nn import Parameter


@dataclasses.dataclass(frozen=True)
class Parameters:
    """
    What an objective uses besides the shared features. It does not count in the measurement.

    Attributes:
        own: nothing else uses these (projectors); their gradient is multiplied by the objective's
            ``Decision.projector_weights``.
        borrowed: the task uses these, too (a head); what the objective adds to their gradient is
            multiplied by its weight.
    """

    own: Sequence[Parameter] = ()
    borrowed: Sequence[Parameter] = ()

    def __iter__(self) -> Iterator[Parameter]:
        yield from self.own
        yield from self.borrowed


@dataclasses.dataclass(frozen=True)
class Branch:
    """
    One objective's copies, which share their memory with the originals; changing one in place is an
    error of autograd's. They must lead to this objective's loss only.

    Attributes:
        is_idle: the objective changes nothing in this step, so it may run without gradients.
    """

    features: dict[str, Tensor]
    parameters: dict[Parameter, Tensor]
    is_idle: bool = False
