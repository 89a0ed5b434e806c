# Copyright (c) The mokd_det authors.
"""Statistics of the student's BatchNorm, computed anew for evaluation."""

from collections.abc import Callable, Iterable
from typing import Any

from detectron2.engine import hooks
from torch import nn


class StudentStatistics(hooks.PreciseBN):
    """
    ``TEST.PRECISE_BN`` (Wu and Johnson 2021) of the student alone, from the same batches each time:
    a resumed run has the statistics of the uninterrupted one.

    Args:
        period: in iterations; 0: only at the end.
        make_loader: returns a loader of training batches that begins with the first.
        num_iter: batches that are looked at.
    """

    def __init__(
        self,
        period: int,
        student: nn.Module,
        make_loader: Callable[[], Iterable[Any]],
        num_iter: int,
    ):
        super().__init__(period, student, None, num_iter)
        self._make_loader = make_loader

    def update_stats(self) -> None:
        if not self._disabled:
            self._data_iter = iter(self._make_loader())
        super().update_stats()
