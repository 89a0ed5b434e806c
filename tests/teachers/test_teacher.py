# Copyright (c) The mokd_det authors.
"""What every teacher is: frozen, and as fast as its options say."""

import dataclasses

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from mokd_det.engine import DistillationTrainer, validate
from mokd_det.teachers import Teacher, TeacherOutputs

from ..conftest import OUTPUTS
from ..modeling.families import batch_of, saved_teacher, step
from .helpers import (  # noqa: F401  (also for tests/engine)
    OneConvolution,
    build_teacher,
    calibrated,
    prefixed,
    script_opts,
)

# (options, largest root mean square error of features, in units of their standard deviation). A
# trained network is more than ten times as close in half precision: docs/distillation.md.
OPTIONS = {
    "float32": (["PRECISION", "float32"], 0.0),
    "bfloat16": (["PRECISION", "bfloat16"], 0.5),
    "float16": (["PRECISION", "float16"], 0.1),
    "channels_last": (["CHANNELS_LAST", True], 1e-4),
    "compile": (["COMPILE", "aot_eager"], 1e-4),
    "inference_mode": (["INFERENCE_MODE", True], 0.0),
    "all": (
        ["PRECISION", "bfloat16", "CHANNELS_LAST", True, "COMPILE", "aot_eager"]
        + ["INFERENCE_MODE", True],
        0.5,
    ),
}


def options(*quick):
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS]


@pytest.mark.parametrize("name", options("bfloat16", "channels_last", "inference_mode"))
def test_options_change_results_within_their_tolerance_only(make_cfg, calibrated, name):  # noqa: F811
    given, tolerance = OPTIONS[name]
    torch._dynamo.reset()
    plain = build_teacher(make_cfg("mokd", calibrated))
    fast = build_teacher(make_cfg("mokd", [*calibrated, *prefixed(given)]))
    batch = batch_of(make_cfg("mokd"))
    wanted, got = (t.run(batch, "BGR") for t in (plain, fast))
    for level, feature in wanted.features.items():
        assert got.features[level].dtype == torch.float32
        error = (got.features[level] - feature).square().mean().sqrt() / feature.std()
        assert error <= tolerance, (level, error)
    # At the same boxes: proposals may change places where scores are nearly equal.
    wanted, other = (outputs.at(wanted.proposals) for outputs in (wanted, got))
    ours, theirs = (x.log_probabilities()[0].exp() for x in (other, wanted))
    assert (ours - theirs).abs().max() <= tolerance
    distance = (other.boxes - wanted.boxes).abs().max()
    assert distance <= 40 * tolerance, distance  # pixels of 192


@pytest.mark.parametrize("name", options("bfloat16", "inference_mode"))
def test_options_suit_the_whole_step(make_cfg, name):
    """Learned projection of the teacher's side and foreground: the teacher's tensors take part in
    the graph, which tensors of inference mode must not."""
    given, _ = OPTIONS[name]
    torch._dynamo.reset()
    opts = [*OUTPUTS, "MOKD.FEATURES.TEACHER_SIDE", "learned", "MOKD.FEATURES.DIM", 0]
    opts += ["MOKD.FEATURES.FOREGROUND", "teacher", "MOKD.FEATURES.FOREGROUND_SCORE", 0.0]
    cfg = make_cfg("mokd", [*opts, *prefixed(given)])
    model = DistillationTrainer.build_model(cfg)
    losses, decision = step(model, batch_of(cfg))
    assert decision.fallback == ""
    assert all(loss.isfinite() for parts in losses.values() for loss in parts.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("given", [["PRECISION", "bfloat16"], ["INFERENCE_MODE", True]])
def test_retinanet_as_a_fast_teacher(family_cfg, tmp_path, given):
    cfg = family_cfg("retinanet")
    opts = [*saved_teacher(cfg, build_model(cfg), tmp_path), *OUTPUTS, *prefixed(given)]
    cfg = family_cfg("faster_rcnn", opts)
    losses, _ = step(DistillationTrainer.build_model(cfg), batch_of(cfg))
    assert all(loss.isfinite() for loss in losses["outputs"].values())


def test_teacher_follows_the_students_precision_unless_it_has_its_own(make_cfg):
    batch = batch_of(make_cfg("mokd"))
    dtypes = {}
    for precision in ("", "float32"):
        teacher = build_teacher(make_cfg("mokd", ["MOKD.TEACHER.PRECISION", precision]))
        seen = []
        teacher.model.backbone.bottom_up.register_forward_hook(
            lambda _m, _i, out, seen=seen: seen.append(next(iter(out.values())).dtype)
        )
        with torch.autocast("cpu", torch.bfloat16):
            teacher.run(batch, "BGR")
        dtypes[precision] = seen[0]
    assert dtypes == {"": torch.bfloat16, "float32": torch.float32}


@pytest.mark.parametrize(
    "opts, message",
    [
        (["COMPILE", "gcc"], "MOKD.TEACHER.COMPILE is 'gcc': expected '' .off. or a backend"),
        (["STREAM", True], "MOKD.TEACHER.STREAM True needs a GPU, but MODEL.DEVICE is 'cpu'"),
    ],
)
def test_options_that_this_machine_does_not_have(make_cfg, opts, message):
    with pytest.raises(ValueError, match=message):
        build_teacher(make_cfg("mokd", prefixed(opts)))


def test_an_unknown_precision(make_cfg):
    message = "MOKD.TEACHER.PRECISION is 'int8': expected one of 'auto', '', 'float32'"
    with pytest.raises(ValueError, match=message):
        validate(make_cfg("mokd", ["MOKD.TEACHER.PRECISION", "int8"]))


def test_it_is_eval_without_gradient_at_every_step(make_cfg):
    cfg = make_cfg("mokd")
    model, batch = DistillationTrainer.build_model(cfg), batch_of(cfg)
    teacher = model.teacher.model
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.train()  # somebody's loop over all modules
    step(model, batch)
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    for key, value in teacher.state_dict().items():
        assert torch.equal(before[key], value), key
    with torch.enable_grad():
        features = model.teacher.run(batch, "BGR").features
    assert not any(f.requires_grad for f in features.values())


def test_it_is_no_module(make_cfg):
    """So no parameters(), state_dict() or DistributedDataParallel can ever see it."""
    assert not issubclass(Teacher, nn.Module)
    model = DistillationTrainer.build_model(make_cfg("mokd", OUTPUTS))
    hidden = {id(m) for m in model.teacher.model.modules()}
    assert not hidden & {id(m) for m in model.modules()}
    hidden = {id(p) for p in model.teacher.model.parameters()}
    assert not hidden & {id(p) for p in model.parameters()}


def test_a_question_is_asked_once():
    outputs, asked = TeacherOutputs({}), []
    for _ in range(2):
        assert outputs.remember("question", lambda: asked.append(1) or "answer") == "answer"
    assert len(asked) == 1
    assert dataclasses.replace(outputs, answers={}).answers == {} != outputs.answers


def test_a_stream_waits_for_the_teacher(make_cfg, monkeypatch):
    """The order of calls on a machine with CUDA, with its functions replaced."""
    teacher = build_teacher(make_cfg("mokd", OUTPUTS))
    calls = []

    class Stream:
        device = torch.device("cuda", 1)  # not the current one

        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

        def __enter__(self):
            calls.append(f"{self.name} runs")

        def __exit__(self, *error):
            calls.append("back")

    teacher._stream = Stream("teacher")
    students = {Stream.device: Stream("student")}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: students[device])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    recorded = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, _: recorded.append(tensor))
    outputs = teacher.run(batch_of(make_cfg("mokd")), "BGR")
    teacher.wait(outputs)
    order = ["teacher waits for student", "teacher runs", "back", "student waits for teacher"]
    assert calls == order
    kept = {id(t) for t in recorded}
    assert {id(t) for t in [*outputs.features.values(), *outputs.proposals]} <= kept


@pytest.mark.parametrize(
    "has_instructions, error, precision",
    [
        (True, 0.04, torch.bfloat16),
        (True, 0.06, None),
        (True, float("nan"), None),
        (False, 0.0, None),
    ],
)
def test_auto_is_bfloat16_where_it_is_fast_and_close(
    monkeypatch, has_instructions, error, precision
):
    monkeypatch.setattr("mokd_det.teachers.base.computes_bfloat16", lambda _: has_instructions)
    features = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    features /= features.std()

    def look():
        return features + (error if torch.is_autocast_enabled("cpu") else 0)

    teacher = Teacher(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(3, 4, 1), look, precision="auto")
    assert teacher.precision == precision
    alone = Teacher(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(3, 4, 1), precision="auto")
    assert alone.precision is None


def test_auto_of_real_teachers(make_cfg, make_digits_cfg, monkeypatch):
    """It has looked at their features, and with SOLVER.AMP it is the student's precision."""
    monkeypatch.setattr("mokd_det.teachers.base.computes_bfloat16", lambda _: True)
    monkeypatch.setattr("mokd_det.teachers.base.MOST_DIFFERENCE", 10.0)
    for make in (lambda opts: make_cfg("mokd", opts), make_digits_cfg):
        opts = ["MOKD.TEACHER.PRECISION", "auto"]
        teacher = build_teacher(make(opts))
        assert teacher.precision == torch.bfloat16
        assert teacher.memory_format == torch.channels_last
        assert build_teacher(make([*opts, "SOLVER.AMP.ENABLED", True])).precision is None
        monkeypatch.setattr("mokd_det.teachers.base.MOST_DIFFERENCE", 0.0)
        assert build_teacher(make(opts)).precision is None
        monkeypatch.setattr("mokd_det.teachers.base.MOST_DIFFERENCE", 10.0)
