# Copyright (c) The mokd_det authors.
"""Detectors on two processes: the step of one on the joined batch, to float tolerance."""

import mokd_det.compat  # noqa: F401  (first: the other processes have no conftest)
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.utils.env import seed_all_rng

from mokd_det.config import load_config
from mokd_det.data import build_train_mapper, register_datasets

from ..conftest import CONFIGS, TREE_OPTS
from .helpers import balanced_steps, on_two_ranks

# As many proposals on each image, so that the ranks' means are the mean over all.
OUTPUTS = ["MOKD.OBJECTIVES", ["features", "outputs"], "MOKD.TEACHER.PROPOSALS", 16]
CASES = {
    "features": ["MOKD.BALANCING.MEASURE_AT", "features"],
    # A smaller part of the small gradient, whose rounding the third step's weights follow. Not of
    # the default rule (that is "features"): its weights follow how far a running cosine, next to 0
    # then, is above half of AGREEMENT, and the same rounding is 1e-3 of them.
    "parameters": [
        *("MOKD.BALANCING.MEASURE_AT", "parameters", "MOKD.BALANCING.RULE", "min_norm"),
    ],
    "features at each step": ["MOKD.BALANCING.INTERVAL", 1],
    # Measured, summed, summed: heads run once then.
    "outputs in between": [
        *("MOKD.BALANCING.RULE", "fixed", "MOKD.BALANCING.FIXED.WEIGHTS", [1.0, 0.5, 2.0]),
        *OUTPUTS,
    ],
    "features with outputs": ["MOKD.BALANCING.RULE", "min_norm", *OUTPUTS],
    # A random teacher's heads say next to nothing: only with a large weight does it matter.
    "teacher_head": [
        *("MOKD.BALANCING.RULE", "fixed", "MOKD.BALANCING.FIXED.WEIGHTS", [1.0, 3000.0]),
        *("MOKD.OBJECTIVES", ["teacher_head"]),
        *("MOKD.TEACHER.PROPOSALS", 16, "MOKD.FEATURES.STUDENT", [], "MOKD.FEATURES.DIM", 0),
    ],
    "parameters with outputs": [
        *("MOKD.BALANCING.MEASURE_AT", "parameters", "MOKD.BALANCING.RULE", "fixed"),
        *("MOKD.BALANCING.FIXED.WEIGHTS", [1.0, 0.5, 2.0], *OUTPUTS),
    ],
}
# Statistics of a batch's part are another matter (SyncBN), and so is the number of boxes that a
# part divides its loss by: one image each, with all of a fixed number of boxes sampled.
OPTS = [
    "MODEL.RESNETS.NORM",
    "FrozenBN",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
    64,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    32,
    "INPUT.RANDOM_FLIP",
    "none",
]


def steps(opts, weights, rank=None):
    """Three steps on two images, or on one of them; return (weights of the steps, state)."""
    cfg = load_config(CONFIGS["mokd"], [*TREE_OPTS, *OPTS, *opts])
    cfg.MOKD.TEACHER.WEIGHTS = weights
    register_datasets(cfg)
    mapper = build_train_mapper(cfg)
    # Two square tiles of the same size.
    batch = [mapper(d) for d in DatasetCatalog.get("tests_trees_train")[:2]]
    batch = batch if rank is None else batch[rank : rank + 1]
    seed_all_rng(rank or 0)  # as Detectron2 does: ranks start apart, and are made equal
    # Which boxes are sampled must not depend on who samples: the first ones.
    randperm, torch.randperm = torch.randperm, lambda n, **kwargs: torch.arange(n)
    try:
        decided, model = balanced_steps(cfg, batch)
    finally:
        torch.randperm = randperm
    return decided, model.state_dict()


def all_cases(rank, weights):
    return {name: steps(opts, weights, rank) for name, opts in CASES.items()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, teacher_weights):
    return on_two_ranks(all_cases, tmp_path_factory.mktemp("ranks"), teacher_weights)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(two_ranks, teacher_weights, name):
    weights, state = steps(CASES[name], teacher_weights)
    first, second = (results[name] for results in two_ranks)
    assert torch.equal(first[0], second[0])
    assert torch.allclose(first[0], weights, rtol=1e-4)
    for key, value in state.items():
        assert torch.equal(first[1][key], second[1][key]), key
        assert torch.allclose(first[1][key], value, rtol=1e-3, atol=5e-4), key
