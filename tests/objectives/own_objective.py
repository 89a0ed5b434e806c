# Copyright (c) The mokd_det authors.
"""Attention transfer (Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928), equation 2."""

import torch.nn.functional as F

from mokd_det.objectives import OBJECTIVES, Objective


@OBJECTIVES.register("attention")
class AttentionObjective(Objective):
    """Match where both sides are active, on some of the levels of MOKD.FEATURES."""

    options = {"LEVELS": []}  # MOKD.ATTENTION.LEVELS: the student's names; empty: all

    def __init__(self, levels):
        super().__init__()
        self.levels = levels
        self.taps = [level.student for level in levels]  # for classifiers

    @classmethod
    def from_config(cls, cfg, task, student, teacher):
        levels = task.match_features(cfg, student, teacher)
        names = cfg.MOKD.ATTENTION.LEVELS or [level.student for level in levels]
        return cls([level for level in levels if level.student in names])

    def forward(self, student, teacher):
        loss = 0.0
        for level in self.levels:
            maps = level.align(student.features[level.student], teacher.features[level.teacher])
            ours, theirs = (F.normalize(x.square().mean(1).flatten(1)) for x in maps)
            loss = loss + (ours - theirs).norm(dim=1).mean()
        return {"loss_attention": loss}
