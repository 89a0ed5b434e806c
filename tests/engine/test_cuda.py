# Copyright (c) The mokd_det authors.
"""What the other tests show on the CPU, where a GPU could make it different."""

import copy
import functools

import pytest
import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from mokd_det.engine import DistillationTrainer
from mokd_det.engine.replay import Replay
from mokd_det.export import ExportOptions, export_model
from mokd_det.export.detector import detect
from mokd_det.export.parity import compare_detections
from mokd_det.export.torchscript import load_torchscript
from mokd_det.tasks import task_of

from ..conftest import OUTPUTS
from ..export.models import TILE, detector, tile
from ..modeling.families import step
from ..teachers.test_teacher import (  # noqa: F401  (calibrated: a fixture)
    OneConvolution,
    calibrated,
    script_opts,
)
from .helpers import train_and_stop
from .test_classification import SMALL
from .test_step import BF16, FAMO, FP16, PARAMETERS, build, run_steps
from .test_trainer import assert_equal_states, train

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no GPU; the same on the CPU is tested beside"
)
DEVICE = "cuda"

# The device's generator draws samples of anchors and proposals: take all of them instead, and no
# best few, of which equal scores would decide. Through an untrained ResNet's batch statistics,
# rounding would become per cents of gradients.
EXACT = [
    *("MODEL.RESNETS.NORM", "FrozenBN"),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 4096, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4096),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 4096, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 4096),
    *("MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0, "MOKD.TEACHER.PROPOSALS", 4096),
    "MOKD.TEACHER.OPTS",
    ["MODEL.TORCHVISION.NORM", "BN", "MODEL.RPN.PRE_NMS_TOPK_TEST", 4096]
    + ["MODEL.RPN.POST_NMS_TOPK_TEST", 4096],
]
# Or so few that a different sample would change the losses.
FEW = ["MODEL.RPN.BATCH_SIZE_PER_IMAGE", 8, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8]
MIN_NORM = ["MOKD.BALANCING.RULE", "min_norm"]  # which uses the teacher from the first step on


@pytest.fixture(autouse=True)
def no_surprises(monkeypatch):
    """No TF32, and a first loss scale at which untrained networks do not overflow."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**8)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)


@pytest.fixture
def make(make_cfg, calibrated):  # noqa: F811
    """As ``make_cfg``, of a teacher that tells boxes apart, all objectives, on the GPU."""

    def make(opts=(), folder="run", name="mokd", device=DEVICE):
        opts = [*calibrated, "MOKD.ENABLED", True, *opts, "MODEL.DEVICE", device]
        return make_cfg(name, opts, folder)

    return make


def first_step(cfg, batch=None):
    """Return (model, initial state, batch, losses, balance) of one step on ``batch``."""
    trainer = build(cfg)
    batch = batch or next(iter(trainer._trainer.data_loader))
    model = trainer.model
    state = {key: value.cpu().clone() for key, value in model.state_dict().items()}
    with torch.jit.optimized_execution(False):
        objectives, decision = step(model, batch)
    assert {p.device.type for p in model.parameters()} == {torch.device(cfg.MODEL.DEVICE).type}
    losses = {k: v.item() for parts in objectives.values() for k, v in parts.items()}
    return model, state, batch, losses, decision


def assert_alike(first, second, rel):
    """The results of :func:`first_step` on two devices: losses, Gram matrix, weights, gradients."""
    assert_equal_states(first[1], second[1])
    assert first[3].keys() == second[3].keys()
    for key, value in first[3].items():
        assert second[3][key] == pytest.approx(value, rel=rel, abs=1e-6), key
    ours, theirs = first[4], second[4]
    assert_grams_alike(ours.gram, theirs.gram, rel, rel)
    assert torch.allclose(ours.weights, theirs.weights, rtol=rel)
    groups = {}
    for (name, p), q in zip(first[0].named_parameters(), second[0].parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            pair = p.grad.cpu().flatten(), q.grad.cpu().flatten()
            groups.setdefault(".".join(name.split(".")[:3]), []).append(pair)
    for name, pairs in groups.items():
        ours, theirs = (torch.cat(side) for side in zip(*pairs))
        assert (ours - theirs).norm() <= 10 * rel * ours.norm(), name


def assert_grams_alike(first, second, rel, cosine):
    norms = [gram.diagonal().sqrt() for gram in (first, second)]
    assert torch.allclose(*norms, rtol=rel)
    cosines = [gram / torch.outer(n, n) for gram, n in zip((first, second), norms)]
    assert torch.allclose(*cosines, rtol=0, atol=cosine)


@pytest.mark.parametrize("place", ["features", "parameters"])
@pytest.mark.parametrize("name", ["mokd", "retinanet"])
def test_a_step_is_the_cpus(make, name, place):
    opts = [*EXACT, *MIN_NORM, "MOKD.BALANCING.MEASURE_AT", place]
    on_cpu = first_step(make(opts, "cpu", name, "cpu"))
    on_gpu = first_step(make(opts, "gpu", name), on_cpu[2])
    assert ("loss_output_rpn_cls" in on_gpu[3]) == (name == "mokd")
    assert_alike(on_cpu, on_gpu, 2e-3)


def test_a_classifiers_step_is_the_cpus(make_digits_cfg):
    opts = [*SMALL, *MIN_NORM, "MODEL.DEVICE"]
    on_cpu = first_step(make_digits_cfg([*opts, "cpu"], "cpu"))
    on_gpu = first_step(make_digits_cfg([*opts, DEVICE], "gpu"), on_cpu[2])
    assert {"loss_cls", "loss_features", "loss_logits"} == set(on_gpu[3])
    assert_alike(on_cpu, on_gpu, 2e-3)


@pytest.mark.parametrize("place", ["features", "parameters"])
@pytest.mark.parametrize("precision", [FP16, BF16], ids=["float16", "bfloat16"])
def test_half_precision_is_close_to_float32(make, precision, place):
    opts = [*EXACT, *MIN_NORM, "MOKD.BALANCING.MEASURE_AT", place]
    plain, half = build(make(opts, "plain")), build(make([*opts, *precision], "half"))
    before = copy.deepcopy(half.model.state_dict())
    wanted, got = run_steps(plain), run_steps(half)
    for key, value in wanted.items():
        if "loss" in key:
            assert got[key] == pytest.approx(value, rel=0.15, abs=3e-3), key
    first, second = (t._trainer.boundary.last for t in (plain, half))
    assert_grams_alike(first.gram, second.gram, 0.2, 0.1)
    assert torch.allclose(first.weights, second.weights, rtol=0.2)
    run_steps(half, 2)
    for name, p in half.model.named_parameters():
        assert p.dtype == torch.float32 and p.isfinite().all(), name
    trained = half.model.student.backbone.fpn_output3.weight
    assert not torch.equal(trained, before["student.backbone.fpn_output3.weight"])


@pytest.mark.parametrize("rule", [FAMO, MIN_NORM], ids=lambda rule: rule[-1])
def test_an_overflowing_step_leaves_no_trace(make, rule):
    trainer = build(make([*rule, *FP16, "SOLVER.EMA_DECAY", 0.9]))
    balanced, model = trainer._trainer, trainer.model
    before = copy.deepcopy(model.state_dict())
    empty = copy.deepcopy(balanced.boundary.balancer.state_dict())
    for scale, done in ((2.0**100, 0), (2.0**8, 1)):
        balanced.grad_scaler = torch.amp.GradScaler(DEVICE, init_scale=scale)
        run_steps(trainer)
        balancer = balanced.boundary.balancer
        assert balanced.grad_scaler.get_scale() == (scale if done else scale / 2)
        assert balancer.step == done and trainer.average.state_dict() == {"steps": done}
        assert (repr(balancer.state_dict()) == repr(empty)) == (not done)
        moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        assert bool(moved) == bool(done), moved
    assert balanced.boundary.last.fallback == ""


# With outputs the CPU waits for the teacher's boxes, so that the student cannot be too early.
@pytest.mark.parametrize("outputs", [False, True], ids=["features", "outputs"])
def test_a_teacher_on_its_own_stream_changes_nothing(make, outputs):
    """Even if the teacher or the student is late."""
    opts = [*EXACT, *MIN_NORM, "SOLVER.BASE_LR", 0.0]
    if outputs:
        opts += OUTPUTS
        opts += ["MOKD.TEACHER.PRECISION", "bfloat16", "MOKD.TEACHER.INFERENCE_MODE", True]
    logged = []
    for stream in (False, True):
        trainer = build(make([*opts, "MOKD.TEACHER.STREAM", stream], f"{stream}"))
        teacher, student = trainer.model.teacher.model.backbone, trainer.model.student.backbone
        assert (trainer.model.teacher._stream is not None) == stream
        losses = []
        for late in 3 * [teacher, student, nn.Identity()]:
            hook = late.register_forward_pre_hook(lambda *_: torch.cuda._sleep(10**8))
            losses.append({k: v for k, v in run_steps(trainer).items() if "loss" in k})
            hook.remove()
        logged.append(losses)
    assert logged[0][0] != logged[0][1]  # other images
    for ours, theirs in zip(*logged):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)


def test_a_second_forward_draws_the_same_samples(make):
    trainer = build(make(FAMO))
    model, batch = trainer.model, next(iter(trainer._trainer.data_loader))
    replay = Replay(model)
    with torch.jit.optimized_execution(False), EventStorage(0):
        torch.manual_seed(3)
        torch.rand(5, device=DEVICE)
        replay.before(batch)
        losses = [sum(parts.values()) for parts in model(batch).values()]
        replay.after()
        state = torch.cuda.get_rng_state()
        again = replay.losses(trainer._trainer.autocast)
        assert torch.allclose(again, torch.stack(losses).detach(), rtol=1e-4)
        assert torch.equal(state, torch.cuda.get_rng_state())


@pytest.mark.parametrize(
    "opts",
    [
        # Rounding in half precision turns proposals over, and others are drawn from them.
        [*FAMO, *FP16, "SOLVER.EMA_DECAY", 0.9, *EXACT],
        ["MOKD.TEACHER.STREAM", True, "TEST.EVAL_PERIOD", 3, *FEW],
    ],
    ids=["famo", "default"],
)
def test_resumed_is_the_uninterrupted_run_but_for_rounding(make, opts):
    opts = ["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 100, *opts]
    opts += ["SOLVER.BASE_LR", 0.002, *EXACT[:2]]  # no chaos
    whole = train(make(opts, "whole"))
    cfg = make(opts, "stopped")
    train_and_stop(cfg, 2)
    cfg.SEED = 12345
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 2
    losses = [
        {k: v for k, (v, _) in t.storage.latest().items() if "loss" in k} for t in (whole, resumed)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05, abs=1e-4)
    saved = torch.load(f"{cfg.OUTPUT_DIR}/model_0000001.pth", map_location=DEVICE)
    saved = saved.get("student", saved["model"])
    ends = [dict(t.model.student.named_parameters()) for t in (whole, resumed)]
    moved, error = (
        torch.cat([(a[n] - b[n]).flatten() for n in ends[0]]).norm()
        for a, b in ((ends[0], saved), ends)
    )
    assert error < 0.2 * moved


@pytest.mark.parametrize(
    "opts",
    [
        [*PARAMETERS, "MOKD.BALANCING.LAYERS", ["fpn_output3", "bottom_up.res5"]],
        [*PARAMETERS, "SOLVER.MICRO_BATCHES", 2, *FP16],
        ["SOLVER.MICRO_BATCHES", 2, "MOKD.BALANCING.INTERVAL", 2, "SOLVER.EMA_DECAY", 0.9],
        [*PARAMETERS, "MODEL.BACKBONE.CHECKPOINTING", True],
        [*FAMO, *BF16, "SOLVER.MICRO_BATCHES", 2, "MOKD.TEACHER.STREAM", True],
        [*MIN_NORM, "MOKD.TEACHER.CHANNELS_LAST", True, "MOKD.TEACHER.PRECISION", "float16"]
        + ["MOKD.FEATURES.FOREGROUND", "teacher", "MOKD.FEATURES.FOREGROUND_SCORE", 0.0],
        [*MIN_NORM, "MOKD.FEATURES.FOREGROUND", "ground_truth"]
        + ["MOKD.INHERIT", ["proposal_generator.rpn_head.anchor_deltas.bias"]],
    ],
    ids=["layers", "parameters", "interval", "checkpointing", "famo", "foreground", "ground_truth"],
)
def test_options_run_on_the_gpu(make, opts):
    trainer = build(make(opts))
    logged = run_steps(trainer, 3)
    assert all(v == v and abs(v) < float("inf") for v in logged.values()), logged
    assert trainer._trainer.boundary.last.fallback == ""
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("network", ["shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_a_classifier_trains_in_bfloat16(make_digits_cfg, network):
    opts = [*SMALL, *MIN_NORM, "MODEL.DEVICE", DEVICE, "MODEL.CLASSIFIER.NAME", network]
    opts += ["TEST.EVAL_PERIOD", 3, "DATALOADER.NUM_WORKERS", 2]  # batches are pinned
    plain, half = build(make_digits_cfg(opts)), build(make_digits_cfg([*opts, *BF16], "half"))
    wanted, got = run_steps(plain), run_steps(half)
    for key in ("loss_cls", "loss_features", "loss_logits"):
        assert got[key] == pytest.approx(wanted[key], rel=0.15), key
    half.train()
    assert all(p.isfinite().all() for p in half.model.parameters())
    assert half._last_eval_results["classification"]["images"] == 40


def test_frozen_torchscript_teaches_on_the_gpu(make_cfg, tmp_path):
    """Its weights are constants, which no ``to`` moves."""
    torch.jit.freeze(torch.jit.script(OneConvolution().eval())).save(tmp_path / "f.ts")
    opts = [*script_opts(str(tmp_path / "f.ts")), "MOKD.FEATURES.STUDENT", ["p3"]]
    seed_all_rng(0)
    model = DistillationTrainer.build_model(make_cfg("mokd", [*opts, "MODEL.DEVICE", DEVICE]))
    shapes = model.teacher.feature_shapes()
    assert (shapes["p3"].channels, shapes["p3"].stride) == (8, 8)


@pytest.mark.parametrize(
    "family, method, freeze",
    [("faster_rcnn", "tracing", True), ("faster_rcnn", "scripting", True)]
    + [("retinanet", "tracing", False)],
)
def test_torchscript_finds_what_the_model_finds(tmp_path, family, method, freeze):
    cfg = detector(family, tmp_path)
    cfg.MODEL.DEVICE = DEVICE
    folder = str(tmp_path / "export")
    options = ExportOptions(method=method, freeze=freeze)
    result = export_model(task_of(cfg), cfg, folder, options, [str(TILE)])
    assert result["parity"]["passed"], result["parity"]
    module, _ = load_torchscript(result["file"], DEVICE)
    image = tile("1.jpg").to(DEVICE)
    with torch.no_grad():
        found = module(image)
    assert found["boxes"].device.type == DEVICE and len(found["boxes"])
    differences = compare_detections(detect(task_of(cfg).load_trained(cfg), image), found)
    assert differences.pop("unmatched") == 0 and max(differences.values()) < 1e-2
