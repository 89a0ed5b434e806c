# Copyright (c) The mokd_det authors.
"""What tools/benchmark.py says of a step."""

import pytest
from detectron2.utils.env import seed_all_rng

from .conftest import OUTPUTS
from .test_tools import load_script


@pytest.fixture
def benchmark():
    return load_script("tools/benchmark.py")


@pytest.fixture
def pair(make_cfg, benchmark):
    cfg = make_cfg("mokd", [*OUTPUTS, "MOKD.BALANCING.LOSS_RATIO.AGREEMENT", 0.0])
    cfg.SOLVER.BASE_LR = 0.0
    return cfg, benchmark.random_batch(cfg, 96, 128, 2)


@pytest.mark.slow
def test_parts_of_a_step(benchmark, pair):
    """Each part is there once, and heads that task and outputs share run once in between."""
    found = benchmark.compare_parts(*pair, count=2)
    for parts in found.values():
        assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
        for who in ("student", "teacher"):
            for name in ("backbone", "FPN", "RPN head"):
                assert parts[f"{who}: {name}"]["gflops"] > 0, (who, name)
        assert parts["outputs: student box head"]["gflops"] > 0
        assert parts["features: projectors"]["gflops"] > 0
        # Backward passes are found as well: a backbone's is longer than its forward pass.
        assert parts["student: backbone"]["share"] > parts["teacher: backbone"]["share"] / 2
    measuring, between = found["measuring"], found["in between"]
    own, again = "student: RPN head", "outputs: student RPN head"
    assert measuring[again]["gflops"] == pytest.approx(measuring[own]["gflops"], rel=0.01)
    assert between.get(again, {"gflops": 0})["gflops"] == 0
    assert "balancing" in measuring and "balancing" not in between


@pytest.mark.slow
def test_variants_are_timed_over_whole_intervals(benchmark, pair, monkeypatch):
    cfg, batch = pair
    cfg.MOKD.BALANCING.INTERVAL = 3
    seed_all_rng(0)
    model = benchmark.random_model(cfg)
    steps = benchmark.build_steps(cfg, model, batch)
    assert steps["features"].steps == 3
    result = benchmark.compare_variants(cfg, model, batch, 2, ("student", "teacher", "features"))
    variants = result["variants"]
    assert {"student", "teacher", "fixed", "features"} <= set(variants)
    assert all(entry["seconds"] > 0 for entry in variants.values())
