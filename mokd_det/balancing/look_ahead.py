# Copyright (c) The mokd_det authors.
"""Weights learned from whether following an objective helped the task on the next batch."""

import math

import torch

from .rules import BALANCERS

__all__ = ["LookAhead", "STARTS"]

STARTS = ("one", "loss", "norm")


@BALANCERS.register("look_ahead")
class LookAhead:
    """
    Look-ahead merit (ours; relatives: hypergradient descent, OL-AUX by Lin et al. 2019,
    gradient-similarity weighting by Du et al. 2018).

    The last step's gradient of an objective has merit if it still points downhill for the task on
    a fresh batch::

        merit_k = cos(g_task[t + 1], g_k[t]) - cos(g_task[t + 1], g_task[t])
        log w_k += lr * mean(merit_k) / rms(merit_k),    w_task = 1

    with running means. The second cosine takes out the oscillation that both share; it is left
    out with ``relative=False``. No guarantee, but the question that a user has.

    Needs the gradients themselves, in one space for all batches: place ``parameters``. Those of
    the last step are kept, also in checkpoints: K numbers for each measured parameter.
    """

    needs_gradients = True
    reads_gradients = False  # one that vanishes has no merit, and that is all
    MEAN, RMS = 0.9, 0.99  # of the running means, as in Adam but shorter
    LEAST = 1e-3  # of w_k in its unit

    def __init__(self, lr=0.02, cap=10.0, relative=True, start="loss"):
        """
        Args:
            lr (float): step of log w_k, > 0.
            cap (float): largest w_k in its unit, >= 1.
            relative (bool): subtract the task's own merit.
            start (str): the unit, and first value, of w_k: "one"; "loss": the first step's
                L_task / L_k; "norm": its |g_task| / |g_k|. The last two make the rule
                independent of the scale of L_k.
        """
        option = "MOKD.BALANCING.LOOK_AHEAD"
        if not lr > 0:
            raise ValueError(f"{option}.LR is {lr}: expected a number > 0.")
        if not cap >= 1:
            raise ValueError(f"{option}.CAP is {cap}: expected a number >= 1.")
        if start not in STARTS:
            raise ValueError(f"{option}.START is '{start}': expected one of {STARTS}.")
        self.lr, self.cap, self.relative, self.start = lr, cap, relative, start
        self.previous = None  # the last step's gradients, one flat tensor for each objective
        self.unit = None
        self.count = 0
        self.logs = self.mean = self.square = None

    def observe(self, gradients):
        """
        Args:
            gradients (list[list[Tensor or None]]): K lists, equal on all ranks.
        """
        flat = [_flatten(parts, gradients) for parts in gradients]
        if self.previous is not None and len(self.previous[0]) != len(flat[0]):
            raise ValueError(
                f"Rule 'look_ahead' got gradients of {len(flat[0])} numbers after "
                f"{len(self.previous[0])}: MOKD.BALANCING.LAYERS or the student has changed since "
                "the checkpoint. Resume with the same, or start a new run."
            )
        if self.previous is not None:
            task = flat[0]
            cosines = torch.stack([_cosine(task, old) for old in self.previous]).double().cpu()
            merit = cosines[1:] - (cosines[0] if self.relative else 0)
            # New tensors, nothing in place: a step that mixed precision skips is undone by
            # putting the old ones back.
            self.mean = self.MEAN * self.mean + (1 - self.MEAN) * merit
            self.square = self.RMS * self.square + (1 - self.RMS) * merit**2
            self.count += 1
            mean = self.mean / (1 - self.MEAN**self.count)
            rms = (self.square / (1 - self.RMS**self.count)).sqrt().clamp_min(1e-12)
            self.logs = (self.logs + self.lr * mean / rms).clamp(
                math.log(self.LEAST), math.log(self.cap)
            )
        else:
            self.logs = torch.zeros(len(flat) - 1, dtype=torch.float64)
            self.mean = self.square = torch.zeros_like(self.logs)
        self.previous = flat

    def weights(self, gram, losses):
        if self.logs is None:
            raise RuntimeError("LookAhead.weights() needs gradients: call observe() before it.")
        unit = self.unit
        if unit is None:
            squares = gram.diagonal()
            unit = {
                "one": torch.ones_like(losses[1:]),
                "loss": losses[0] / losses[1:],
                "norm": torch.sqrt(squares[0] / squares[1:]),
            }[self.start]
            if unit.isfinite().all() and (unit > 0).all():
                self.unit = unit  # else the next step's
        return torch.cat([losses.new_ones(1), unit * self.logs.exp()])

    def state_dict(self):
        names = ("previous", "unit", "count", "logs", "mean", "square")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state):
        for name, value in state.items():
            setattr(self, name, value)


def _flatten(parts, gradients):
    shapes = [next((g for g in part if g is not None), None) for part in zip(*gradients)]
    return torch.cat(
        [
            (torch.zeros_like(like) if part is None else part).detach().reshape(-1).float()
            for part, like in zip(parts, shapes)
            if like is not None  # no objective reaches it
        ]
    )


def _cosine(first, second):
    second = second.to(first.device)  # a checkpoint is loaded on the CPU
    norms = first.norm() * second.norm()
    return torch.dot(first, second) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
