# Copyright (c) The mokd_det authors.
"""Any weighting of TorchJD as a rule (optional extra ``balancers``)."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from .base import Rule

# These look at the gradients themselves, or need several Jacobians a step.
NEED_MORE_THAN_A_GRAM_MATRIX = ("ExcessMTL", "MoDo", "SDMGrad", "CRMOGM")


class TorchjdRule(Rule):
    """
    A ``*Weighting`` of :mod:`torchjd.aggregation`: it maps a Gram matrix to weights, as our rules.
    Random ones get a seed that counts up, so that all ranks draw the same numbers and nobody else's
    random stream moves.
    """

    def __init__(self, name: str, **options: Any):
        """
        ``options`` are those of ``<name>Weighting``, e.g. c=0.5 for the name "CAGrad". ImportError:
        TorchJD, or what this weighting needs, is not installed.
        """
        try:
            from torchjd import aggregation
        except ImportError as error:
            raise ImportError(
                f"MOKD.BALANCING.RULE is 'torchjd.{name}', which needs TorchJD: "
                "pip install -e '.[balancers]' in the checkout"
            ) from error
        names = [n.removesuffix("Weighting") for n in dir(aggregation) if n.endswith("Weighting")]
        known = sorted(n for n in names if n)
        usable = [n for n in known if n not in NEED_MORE_THAN_A_GRAM_MATRIX]
        if name not in usable:
            reason = "needs more than a Gram matrix" if name in known else "does not exist"
            raise ValueError(
                f"MOKD.BALANCING.RULE is 'torchjd.{name}', which {reason}: expected one of "
                f"{', '.join(f'torchjd.{n}' for n in usable)}."
            )
        cls = getattr(aggregation, f"{name}Weighting")
        options = {
            key: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
            for key, value in options.items()
        }
        try:
            self.weighting = cls(**options)
        except TypeError as error:
            raise ValueError(
                f"MOKD.BALANCING.TORCHJD {options} does not fit torchjd.{name}"
                f"{inspect.signature(cls)}: {error}"
            ) from error
        self.name = f"torchjd.{name}"
        # A vector of options has an entry for each objective, also for one that vanishes.
        self.takes_vanishing_gradients = any(isinstance(v, Tensor) for v in options.values())
        self._options, self.calls = options, 0
        self._built = self._held()

    def check_objectives(self, count: int) -> None:
        try:
            with torch.random.fork_rng(devices=[]):
                copy.deepcopy(self.weighting)(torch.eye(count, dtype=torch.float64))
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"MOKD.BALANCING.TORCHJD {self._options} of {self.name} does not fit {count} "
                f"objectives: {error}"
            ) from error

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        self.calls += 1
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.calls)
            return self.weighting(gram).to(torch.float64)

    def _held(self):
        # Stateful weightings change attributes and buffers in place.
        held = {**vars(self.weighting), **dict(self.weighting.named_buffers())}
        kinds = (torch.Tensor, int, float, tuple, type(None))
        return copy.deepcopy({k: v for k, v in held.items() if isinstance(v, kinds)})

    def state_dict(self) -> dict[str, Any]:
        # What has not changed is the config's.
        state = {k: v for k, v in self._held().items() if not _same(v, self._built.get(k))}
        return {"calls": self.calls, "weighting": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]
        # Also what has changed since: a step that is undone may have been the first to change it.
        for key, value in copy.deepcopy({**self._built, **state["weighting"]}).items():
            setattr(self.weighting, key, value)


def _same(first, second):
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    return first == second
