# Copyright (c) The mokd_det authors.
"""Where a teacher comes from, and its options for speed."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from torch import nn

from mokd_det.config import find_config, load_config
from mokd_det.engine import DistillationTrainer, build_trainer
from mokd_det.modeling import Teacher, build_teacher

from ..conftest import CONFIGS, TREE_OPTS
from .families import batch_of, step

OUTPUTS = ["MOKD.OUTPUTS.ENABLED", True]
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


def teacher_opts(options):
    return [f"MOKD.TEACHER.{v}" if i % 2 == 0 else v for i, v in enumerate(options)]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A random teacher whose normalisation fits the tiles: features of usual size, as a trained
    one's. Without, they are smaller than float16's smallest numbers."""
    norm = ["MODEL.TORCHVISION.NORM", "BN"]
    cfg = load_config(CONFIGS["teacher"], [*TREE_OPTS, *norm, "MODEL.TORCHVISION.WEIGHTS", ""])
    seed_all_rng(3)
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of the one batch that follows
    with torch.no_grad():
        model.backbone.train()(model.preprocess_image(batch_of(cfg)).tensor)
    path = tmp_path_factory.mktemp("calibrated") / "teacher.pth"
    torch.save({"model": model.state_dict()}, path)
    return ["MOKD.TEACHER.WEIGHTS", str(path), "MOKD.TEACHER.OPTS", norm, *OUTPUTS]


@pytest.mark.parametrize("name", OPTIONS)
def test_options_change_results_within_their_tolerance_only(make_cfg, calibrated, name):
    options, tolerance = OPTIONS[name]
    torch._dynamo.reset()
    plain = build_teacher(make_cfg("mokd", calibrated))
    fast = build_teacher(make_cfg("mokd", [*calibrated, *teacher_opts(options)]))
    batch = batch_of(make_cfg("mokd"))
    wanted, got = (t.view(batch, "BGR") for t in (plain, fast))
    for level, feature in wanted.features.items():
        assert got.features[level].dtype == torch.float32
        error = (got.features[level] - feature).square().mean().sqrt() / feature.std()
        assert error <= tolerance, (level, error)
    # At the same boxes: proposals may change places where scores are nearly equal.
    wanted, other = (t.outputs(v, wanted.proposals) for t, v in ((plain, wanted), (fast, got)))
    ours, theirs = (x.log_probabilities()[0].exp() for x in (other, wanted))
    assert (ours - theirs).abs().max() <= tolerance
    distance = (other.boxes - wanted.boxes).abs().max()
    assert distance <= 40 * tolerance, distance  # pixels of 192


@pytest.mark.parametrize("name", OPTIONS)
def test_options_suit_the_whole_step(make_cfg, name):
    """Learned projection of the teacher's side and foreground: the teacher's tensors take part in
    the graph, which tensors of inference mode must not."""
    options, _ = OPTIONS[name]
    torch._dynamo.reset()
    opts = [*OUTPUTS, "MOKD.FEATURES.TEACHER_SIDE", "learned", "MOKD.FEATURES.DIM", 0]
    opts += ["MOKD.FEATURES.FOREGROUND", "teacher", "MOKD.FEATURES.FOREGROUND_SCORE", 0.0]
    cfg = make_cfg("mokd", [*opts, *teacher_opts(options)])
    model = DistillationTrainer.build_model(cfg)
    objectives, balance = step(model, batch_of(cfg))
    assert balance.fallback == ""
    assert all(loss.isfinite() for parts in objectives.values() for loss in parts.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", [["PRECISION", "bfloat16"], ["INFERENCE_MODE", True]])
def test_retinanet_as_a_fast_teacher(family_cfg, tmp_path, options):
    torch.manual_seed(0)
    cfg = family_cfg("retinanet")
    torch.save(
        {"model": DistillationTrainer.build_model(cfg).student.state_dict()}, tmp_path / "t.pth"
    )
    (tmp_path / "t.yaml").write_text(cfg.dump())
    opts = ["MOKD.TEACHER.CONFIG_FILE", str(tmp_path / "t.yaml"), "MOKD.ENABLED", True]
    opts += ["MOKD.TEACHER.WEIGHTS", str(tmp_path / "t.pth"), *OUTPUTS, *teacher_opts(options)]
    cfg = family_cfg("faster_rcnn", opts)
    objectives, _ = step(DistillationTrainer.build_model(cfg), batch_of(cfg))
    assert all(loss.isfinite() for loss in objectives["outputs"].values())


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
            teacher.view(batch, "BGR")
        dtypes[precision] = seen[0]
    assert dtypes == {"": torch.bfloat16, "float32": torch.float32}


@pytest.mark.parametrize(
    "opts, message",
    [
        (["PRECISION", "int8"], "MOKD.TEACHER.PRECISION is 'int8': expected one of '', 'float32'"),
        (["COMPILE", "gcc"], "MOKD.TEACHER.COMPILE is 'gcc': expected '' .off. or a backend"),
        (["STREAM", True], "MOKD.TEACHER.STREAM True needs a GPU, but MODEL.DEVICE is 'cpu'"),
        (["OPTS", ["MODEL.PIXEL_MEAN", [1.0], "MODEL.PIXEL_STD", [1.0]]], "MODEL.PIXEL_MEAN has"),
    ],
)
def test_bad_options_are_explained(make_cfg, opts, message):
    with pytest.raises(ValueError, match=message):
        DistillationTrainer.build_model(make_cfg("mokd", teacher_opts(opts)))


class Maps(nn.Module):
    """The teacher's backbone as a network of somebody else's: dict of tensors in, nothing else."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone(x)


def scripted(module, path, size=64):
    with torch.no_grad():
        torch.jit.trace(module.eval(), torch.zeros(1, 3, size, size), strict=False).save(path)
    return str(path)


def script_opts(path):
    empty = ["MOKD.TEACHER.CONFIG_FILE", "", "MOKD.TEACHER.WEIGHTS", ""]
    return [*empty, "MOKD.TEACHER.TORCHSCRIPT.FILE", path]


def test_torchscript_teacher_is_the_teacher_it_was_made_from(make_cfg, tmp_path):
    """Its normalisation and channel order are those of the options (here RGB, ImageNet's)."""
    cfg = make_cfg("mokd")
    original = build_teacher(cfg)
    path = scripted(Maps(original.model.backbone), tmp_path / "t.ts")
    loaded = build_teacher(make_cfg("mokd", script_opts(path)))
    shapes = original.feature_shapes()
    assert {n: (s.stride, s.channels) for n, s in loaded.feature_shapes().items()} == {
        n: (s.stride, s.channels) for n, s in shapes.items()
    }
    batch = batch_of(cfg)
    wanted, got = (t.view(batch, "BGR").features for t in (original, loaded))
    for name in wanted:
        assert torch.allclose(wanted[name], got[name], atol=1e-4), name
    trainer = build_trainer(make_cfg("mokd", [*script_opts(path), "SOLVER.MAX_ITER", 1]))
    trainer.resume_or_load(False)
    trainer.train()
    assert "loss_features" in trainer.storage.latest()


class OneConvolution(nn.Module):
    """A backbone that becomes all constants when it is frozen."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 8, 1)

    def forward(self, x):
        return {"p3": self.conv(x)}


def test_frozen_torchscript_has_no_parameters(make_cfg, tmp_path):
    torch.jit.freeze(torch.jit.script(OneConvolution().eval())).save(tmp_path / "f.ts")
    model = DistillationTrainer.build_model(
        make_cfg("mokd", [*script_opts(str(tmp_path / "f.ts")), "MOKD.FEATURES.STUDENT", ["p3"]])
    )
    objectives, _ = step(model, batch_of(make_cfg("mokd")))
    assert objectives["features"]["loss_features"].isfinite()


class Tuple(nn.Module):
    def forward(self, x):
        return x, x


class Odd(nn.Module):
    def forward(self, x):
        return {"odd": x[..., :-3]}


@pytest.mark.parametrize(
    "module, message",
    [(Tuple(), "but it returns a tuple"), (Odd(), r"\['odd'\] are no maps whose stride divides")],
)
def test_torchscript_that_returns_something_else(make_cfg, tmp_path, module, message):
    path = scripted(module, tmp_path / "t.ts")
    with pytest.raises(ValueError, match=f"MOKD.TEACHER.TORCHSCRIPT.FILE must map.*{message}"):
        build_teacher(make_cfg("mokd", script_opts(path)))


def test_torchscript_errors(make_cfg, tmp_path, teacher_weights):
    (tmp_path / "no.ts").write_text("no")
    with pytest.raises(ValueError, match="no.ts' is no TorchScript file"):
        build_teacher(make_cfg("mokd", script_opts(str(tmp_path / "no.ts"))))
    with pytest.raises(FileNotFoundError, match="TORCHSCRIPT.FILE 'none.ts' does not exist"):
        build_teacher(make_cfg("mokd", script_opts("none.ts")))
    with pytest.raises(ValueError, match="name two teachers"):
        build_teacher(make_cfg("mokd", ["MOKD.TEACHER.TORCHSCRIPT.FILE", "none.ts"]))
    path = scripted(Maps(build_teacher(make_cfg("mokd")).model.backbone), tmp_path / "t.ts")
    with pytest.raises(ValueError, match="a ScriptedDetector, cannot be read.*MOKD.OUTPUTS"):
        build_teacher(make_cfg("mokd", [*script_opts(path), *OUTPUTS]))
    with pytest.raises(ValueError, match="a TorchScript file is compiled already"):
        opts = [*script_opts(path), "MOKD.TEACHER.COMPILE", "aot_eager"]
        build_teacher(make_cfg("mokd", opts))


def test_zoo_name_is_config_and_weights(make_cfg, monkeypatch, teacher_weights):
    """Detectron2's own functions resolve the name; here they answer with local files."""
    name = "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml"
    monkeypatch.setattr(model_zoo, "get_config_file", lambda asked: CONFIGS["teacher"])
    monkeypatch.setattr(model_zoo, "get_checkpoint_url", lambda asked: teacher_weights)
    opts = ["MOKD.TEACHER.CONFIG_FILE", name, "MOKD.TEACHER.WEIGHTS", ""]
    loaded = build_teacher(make_cfg("mokd", opts)).model.state_dict()
    state = torch.load(teacher_weights)["model"]
    assert all(torch.equal(state[key], loaded[key]) for key in state)
    opts += ["MOKD.TEACHER.OPTS", ["MODEL.WEIGHTS", "mine.pth"]]  # what the user says wins
    with pytest.raises(FileNotFoundError, match="'mine.pth' does not exist"):
        build_teacher(make_cfg("mokd", opts))


def test_zoo_names_of_the_installed_detectron2():
    name = "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"
    try:
        path, weights = find_config(name, "OPTION")
    except FileNotFoundError as error:  # the packaged 0.6 has lost its config files
        assert "came without the zoo's config files" in str(error) and "OPTION" in str(error)
    else:
        assert path.endswith(name)
        assert weights.endswith("faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl")
    with pytest.raises(FileNotFoundError, match="'no/such.yaml' does not exist .looked in .* zoo"):
        find_config("no/such.yaml", "OPTION")


def test_old_zoo_weights_load_strictly(make_cfg, tmp_path):
    """Old checkpoints hold the anchors, which are no parameters any more."""
    import pickle

    cfg = make_cfg("retinanet")
    model = DistillationTrainer.build_model(make_cfg("retinanet", ["MOKD.ENABLED", True])).student
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    state["anchor_generator.cell_anchors.0"] = torch.zeros(3, 4).numpy()
    state["pixel_mean"] = model.pixel_mean.numpy()  # once a part of the state
    with open(tmp_path / "old.pkl", "wb") as f:
        pickle.dump({"model": state, "__author__": "Detectron2 Model Zoo"}, f)
    opts = ["MOKD.ENABLED", True, "MOKD.TEACHER.CONFIG_FILE", CONFIGS["retinanet"]]
    opts += ["MOKD.TEACHER.WEIGHTS", str(tmp_path / "old.pkl")]
    teacher = build_teacher(make_cfg("retinanet", opts))
    for key, value in teacher.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert isinstance(teacher, Teacher) and cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    state["pixel_mean"] = state["pixel_mean"] + 1  # of other images
    with open(tmp_path / "old.pkl", "wb") as f:
        pickle.dump({"model": state, "__author__": "Detectron2 Model Zoo"}, f)
    with pytest.raises(ValueError, match="unexpected: pixel_mean"):
        build_teacher(make_cfg("retinanet", opts))


def test_stream_waits_for_the_teacher(make_cfg, monkeypatch):
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
    view = teacher.view(batch_of(make_cfg("mokd")), "BGR")
    teacher.wait(view)
    order = ["teacher waits for student", "teacher runs", "back", "student waits for teacher"]
    assert calls == order
    kept = {id(t) for t in recorded}
    assert {id(t) for t in [*view.features.values(), *view.proposals]} <= kept
