# Copyright (c) The mokd_det authors.
"""A running mean of the student's weights."""

import torch
from torch.optim.swa_utils import AveragedModel

__all__ = ["WeightAverage"]


class WeightAverage:
    """
    Exponential moving average of parameters and buffers, by torch's ``AveragedModel``.

    The decay grows to its final value, ``min(decay, (1 + n) / (10 + n))`` after n steps, so that
    the random initial weights are forgotten in short runs as well.
    """

    def __init__(self, student, decay):
        """
        Args:
            student (nn.Module): is copied.
            decay (float): in (0, 1).
        """

        @torch.no_grad()
        def update(means, values, steps):
            steps = float(steps)
            weight = 1 - min(decay, (1 + steps) / (10 + steps))
            for mean, value in zip(means, values):
                if mean.is_floating_point():
                    mean.lerp_(value, weight)
                else:
                    mean.copy_(value)

        self._average = AveragedModel(student, multi_avg_fn=update, use_buffers=True)
        self.model = self._average.module.eval().requires_grad_(False)

    def update(self, student):
        self._average.update_parameters(student)

    # The averaged weights themselves are the checkpoint's "model".
    def state_dict(self):
        return {"steps": int(self._average.n_averaged)}

    def load_state_dict(self, state):
        self._average.n_averaged.fill_(state["steps"])
