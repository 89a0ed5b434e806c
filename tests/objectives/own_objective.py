# Copyright (c) The mokd_det authors.
"""Attention transfer (Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928), equation 2."""

import torch.nn.functional as F

from mokd_det.objectives import OBJECTIVES, Objective


@OBJECTIVES.register("attention")
class AttentionObjective(Objective):
    """Match where both sides are active."""

    options = {"STUDENT": [], "TEACHER": []}  # names of features, as in MOKD.FEATURES

    def __init__(self, levels):
        super().__init__()
        self.levels = levels
        self.taps = [level.student for level in levels]  # for classifiers

    @classmethod
    def from_config(cls, cfg, task, student, teacher):
        options = cfg.MOKD.ATTENTION
        pairs = options.STUDENT, options.TEACHER
        return cls(task.match_features(cfg, student, teacher, *pairs))

    def forward(self, student, teacher):
        loss = 0.0
        for level in self.levels:
            maps = level.align(student.features[level.student], teacher.features[level.teacher])
            ours, theirs = (F.normalize(x.square().mean(1).flatten(1)) for x in maps)
            loss = loss + (ours - theirs).norm(dim=1).mean()
        return {"loss_attention": loss}
