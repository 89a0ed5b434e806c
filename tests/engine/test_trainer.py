# Copyright (c) The mokd_det authors.
"""The training step and the trainer, by equality with what they must equal."""

import json
import subprocess
import sys

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from mokd_det.balancing import Boundary, Branch
from mokd_det.config import get_cfg, stock_config
from mokd_det.data import build_resumable_train_loader
from mokd_det.engine import DistillationTrainer, Trainer, build_trainer, writers
from mokd_det.evaluation import build_evaluator

from ..conftest import OUTPUTS
from .helpers import train_and_stop


EVALUATED = ["DATASETS.TEST", ("tests_trees_val",)]


def train(cfg, cls=None, resume=False):
    seed_all_rng(cfg.SEED)
    trainer = cls(cfg) if cls else build_trainer(cfg)
    trainer.resume_or_load(resume)
    # Of Detectron2's own step RetinaNet's focal loss is compiled anew, to other bits, during its
    # first calls in a process.
    with torch.jit.optimized_execution(False):
        trainer.train()
    return trainer


def losses_of(cfg):
    with open(f"{cfg.OUTPUT_DIR}/metrics.json") as f:
        lines = [json.loads(line) for line in f]
    return [{k: v for k, v in line.items() if "loss" in k} for line in lines]


def assert_equal_states(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


class StockTrainer(DefaultTrainer):
    """Detectron2's own, with the evaluator that it leaves to its users."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return build_evaluator(cfg, dataset_name)


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet"])
def test_disabled_is_stock_detectron2_bit_for_bit(make_cfg, name):
    ours = make_cfg(name, ["MOKD.ENABLED", False, *EVALUATED], "ours")
    ours_trainer = train(ours)
    assert type(ours_trainer) is Trainer
    stock = make_cfg(name, EVALUATED, "stock")
    stock_trainer = train(stock, StockTrainer)
    assert_equal_states(stock_trainer.model.state_dict(), ours_trainer.model.state_dict())
    assert losses_of(stock) == losses_of(ours) != []
    assert repr(stock_trainer._last_eval_results) == repr(ours_trainer._last_eval_results)


class PlainSum(Boundary):
    """In the boundary's place: no boundary at all, and the sum of the losses."""

    measured_at = "none"

    def _split(self, features, parameters):
        return {
            name: Branch(dict(features), {p: p for p in used}) for name, used in parameters.items()
        }

    def _accumulate(self, losses):
        sum(losses.values()).backward()

    def _finish(self, parameters):
        return None


@pytest.mark.parametrize("outputs", [False, True], ids=["features", "outputs"])
@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet"])
def test_weights_one_equal_the_plain_sum_bit_for_bit(make_cfg, name, outputs):
    """With outputs up to the order in which floats are added: a head gets several gradients."""
    opts = ["MOKD.ENABLED", True, "MOKD.BALANCING.RULE", "fixed"]
    opts += OUTPUTS if outputs else []
    opts += ["MOKD.BALANCING.FIXED.WEIGHTS", [1.0] * (2 + outputs)]
    opts += ["SOLVER.MAX_ITER", 1 if outputs else 3]
    balanced = train(make_cfg(name, opts, "balanced"))

    cfg = make_cfg(name, opts, "plain")
    seed_all_rng(cfg.SEED)
    plain = build_trainer(cfg)
    plain.model.boundary = plain._trainer.boundary = PlainSum(plain._trainer.boundary.balancer)
    plain.resume_or_load(False)
    with torch.jit.optimized_execution(False):
        plain.train()
    if not outputs:
        assert_equal_states(plain.model.state_dict(), balanced.model.state_dict())
    for (key, a), b in zip(plain.model.state_dict().items(), balanced.model.state_dict().values()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7), key


@pytest.mark.parametrize(
    "name, objectives",
    [
        ("faster_rcnn", []),
        pytest.param("retinanet", [], marks=pytest.mark.slow),
        pytest.param(
            "faster_rcnn", ["MOKD.FEATURES.PROJECTOR", "MaskedGenerator"], marks=pytest.mark.slow
        ),
        pytest.param(
            "faster_rcnn", ["MOKD.OBJECTIVES", ["teacher_head", "outputs"]], marks=pytest.mark.slow
        ),
    ],
    ids=["faster_rcnn", "retinanet", "MGD", "teacher_head"],
)
def test_distillation_of_weight_zero_is_training_from_scratch(make_cfg, name, objectives):
    """So a student and its baseline differ by nothing but the teacher."""
    opts = ["MOKD.ENABLED", False, "DATALOADER.RESUMABLE", True]
    scratch = train(make_cfg(name, opts, "scratch"))
    opts = [
        "MOKD.ENABLED",
        True,
        "MOKD.BALANCING.RULE",
        "fixed",
        "MOKD.OBJECTIVES",
        ["features", "outputs"],
        *objectives,
    ]
    mokd = train(make_cfg(name, [*opts, "MOKD.BALANCING.FIXED.WEIGHTS", [1.0, 0.0, 0.0]], "mokd"))
    assert_equal_states(scratch.model.student.state_dict(), mokd.model.student.state_dict())


@pytest.mark.slow
def test_scale_of_the_distillation_losses_is_irrelevant(make_cfg):
    """For the student and the projectors; by powers of two, which floats are scaled by exactly."""
    states = []
    for scale in (1.0, 2.0**-10, 2.0**10):
        opts = ["MOKD.OBJECTIVES", ["features", "outputs"]]
        # A memory so short that the outputs are trusted within these few steps.
        opts += ["MOKD.BALANCING.SMOOTHING", 0.3, "MOKD.BALANCING.INTERVAL", 1]
        opts += ["MOKD.FEATURES.LOSS_WEIGHT", scale, "MOKD.OUTPUTS.LOSS_WEIGHT", 1 / scale]
        trainer = train(make_cfg("mokd", opts, f"scale_{scale}"))
        assert trainer.model.boundary.balancer.rule.name == "loss_ratio"
        assert trainer.storage.latest()["balance/features/weight_outputs"][0] > 0
        states.append(trainer.model.state_dict())
    for other in states[1:]:
        for key, value in states[0].items():
            assert torch.equal(value, other[key]), key


def test_distillation_changes_the_student(make_cfg):
    """Else the equalities above would prove nothing."""
    scratch = train(make_cfg("faster_rcnn", [], "scratch"))
    mokd = train(make_cfg("mokd", [], "mokd"))
    name = "backbone.bottom_up.res4.0.conv1.weight"
    assert not torch.equal(scratch.model.state_dict()[name], mokd.model.student.state_dict()[name])


def test_same_initial_student_as_without_distillation(make_cfg):
    cfg, mokd_cfg = make_cfg("faster_rcnn"), make_cfg("mokd")
    seed_all_rng(7)
    plain = Trainer.build_model(cfg)
    seed_all_rng(7)
    student = DistillationTrainer.build_model(mokd_cfg).student
    assert_equal_states(plain.state_dict(), student.state_dict())


def test_checkpoint_is_a_stock_student_without_a_teacher(make_cfg):
    cfg = make_cfg("mokd", [], "mokd")
    trainer = train(cfg)
    model = trainer.model
    teacher_parameters = {id(p) for p in model.teacher.model.parameters()}
    teacher_shapes = {tuple(p.shape) for p in model.teacher.model.parameters() if p.dim() > 1}
    student_and_projectors = {id(p) for p in model.parameters()}
    assert teacher_parameters and not teacher_parameters & student_and_projectors
    names = {n for n, _ in model.named_parameters()} | set(model.state_dict())
    assert {n.split(".")[0] for n in names} == {"student", "objectives"}
    assert all(n.startswith(("student.", "objectives.features.projectors.")) for n in names)
    in_optimizer = {
        id(p) for group in trainer._trainer.optimizer.param_groups for p in group["params"]
    }
    assert in_optimizer == student_and_projectors
    assert not any(p.requires_grad for p in model.teacher.model.parameters())

    # weights_only: numbers and tensors, nothing that runs code.
    checkpoint = torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)
    assert set(checkpoint) == {"model", "objectives", "trainer", "iteration", "run"}
    assert set(checkpoint["model"]) == set(
        Trainer.build_model(make_cfg("faster_rcnn")).state_dict()
    )
    assert set(checkpoint["objectives"]) == set(model.objectives.state_dict())
    only_teachers = teacher_shapes - {tuple(p.shape) for p in model.parameters()}
    assert only_teachers

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            for part in value.values() if isinstance(value, dict) else value:
                yield from tensors(part)

    assert not only_teachers & {tuple(t.shape) for t in tensors(checkpoint)}


STOCK_PROCESS = """
import sys, torch
import mokd_det.compat  # Detectron2 0.6 needs its patches; nothing else of it may be loaded
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model

cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
model = build_model(cfg).eval()
state = torch.load(sys.argv[2], weights_only=True)["model"]
model.load_state_dict(state, strict=True)
assert "DistillationModel" not in META_ARCH_REGISTRY
loaded = [name for name in sys.modules if name.startswith("mokd_det.")]
assert loaded == ["mokd_det.compat"], loaded
torch.manual_seed(0)
image = (255 * torch.rand(3, 192, 160)).to(torch.uint8)
torch.set_num_threads(int(sys.argv[4]))
with torch.no_grad():
    features = model.backbone(model.preprocess_image([{"image": image}]).tensor)
    instances = model([{"image": image}])[0]["instances"]
torch.save([features, instances.pred_boxes.tensor, instances.scores], sys.argv[3])
"""


@pytest.mark.parametrize("name", ["faster_rcnn", pytest.param("retinanet", marks=pytest.mark.slow)])
def test_checkpoint_loads_in_stock_detectron2_with_equal_outputs(make_cfg, tmp_path, name):
    opts = ["MOKD.ENABLED", True, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    opts += ["MODEL.RETINANET.SCORE_THRESH_TEST", 0.0]
    cfg = make_cfg(name, opts, "mokd")
    trainer = train(cfg)
    student = trainer.model.student.eval()
    (tmp_path / "stock.yaml").write_text(stock_config(cfg).dump())
    output = tmp_path / "outputs.pt"
    subprocess.run(
        [sys.executable, "-c", STOCK_PROCESS, str(tmp_path / "stock.yaml")]
        + [f"{cfg.OUTPUT_DIR}/model_final.pth", str(output), str(torch.get_num_threads())],
        check=True,
    )
    features, boxes, scores = torch.load(output, weights_only=True)
    torch.manual_seed(0)
    image = (255 * torch.rand(3, 192, 160)).to(torch.uint8)
    with torch.no_grad():
        ours = student.backbone(student.preprocess_image([{"image": image}]).tensor)
        instances = student([{"image": image}])[0]["instances"]
    assert_equal_states(features, ours)
    assert len(boxes) > 0
    assert torch.equal(boxes, instances.pred_boxes.tensor)
    assert torch.equal(scores, instances.scores)


HEADS = [
    *("MOKD.OBJECTIVES", ["teacher_head", "outputs"]),
    *("MOKD.FEATURES.STUDENT", [], "MOKD.FEATURES.DIM", 0),
]
GENERATED = ["MOKD.FEATURES.PROJECTOR", "MaskedGenerator", "MOKD.FEATURES.DIM", 0]


@pytest.mark.parametrize(
    "workers, objectives",
    [
        (0, []),
        pytest.param(2, [], marks=pytest.mark.slow),
        pytest.param(0, HEADS, marks=pytest.mark.slow),
        pytest.param(0, GENERATED, marks=pytest.mark.slow),
    ],
    ids=["plain", "workers", "teacher_head", "MGD"],
)
def test_resumed_equals_uninterrupted(make_cfg, workers, objectives):
    # Evaluation in between, colours and flips: everything that draws random numbers.
    opts = ["SOLVER.MAX_ITER", 4, "INPUT.COLOR_JITTER", 0.3, "SOLVER.CHECKPOINT_PERIOD", 2]
    opts += ["TEST.EVAL_PERIOD", 2, *EVALUATED, *objectives]
    whole = train(make_cfg("mokd", opts, "whole"))

    cfg = make_cfg("mokd", [*opts, "DATALOADER.NUM_WORKERS", workers], "stopped")
    train_and_stop(cfg, 2)
    cfg.SEED = 12345  # the checkpoint's seed counts
    second = train(cfg, resume=True)
    assert second.start_iter == 2
    assert_equal_states(whole.model.state_dict(), second.model.state_dict())
    momentum = [t._trainer.optimizer.state_dict()["state"] for t in (whole, second)]
    for key in momentum[0]:
        assert torch.equal(momentum[0][key]["momentum_buffer"], momentum[1][key]["momentum_buffer"])


def test_other_projectors_cannot_be_resumed(make_cfg):
    opts = [*EVALUATED[:1], (), "SOLVER.MAX_ITER", 1, *HEADS]
    train(make_cfg("mokd", opts))
    cfg = make_cfg("mokd", [*opts, "MOKD.TEACHER_HEAD.STUDENT", ["p3", "p4"]])
    with pytest.raises(ValueError, match="other projectors .teacher_head.projectors.p5.*resume wi"):
        train(cfg, resume=True)


@pytest.mark.slow
def test_evaluation_in_between_changes_nothing(make_cfg):
    never = train(make_cfg("mokd", [], "never"))
    often = train(make_cfg("mokd", ["TEST.EVAL_PERIOD", 1, *EVALUATED], "often"))
    assert_equal_states(never.model.state_dict(), often.model.state_dict())


@pytest.fixture
def one_step(make_cfg):
    """A distillation trainer with an open event storage, and what one step wrote."""

    def run(opts=()):
        cfg = make_cfg("mokd", opts)
        seed_all_rng(cfg.SEED)
        trainer = build_trainer(cfg)
        with EventStorage(0) as storage:
            trainer.run_step()
            return trainer, {k: float(v[0]) for k, v in storage.latest().items()}

    return run


def test_diagnostics_are_logged_with_their_place_and_never_in_the_loss(one_step):
    trainer, scalars = one_step()
    names = {n for n in scalars if n.startswith("balance/")}
    assert names == {
        f"balance/features/{n}"
        for n in (
            "weight_task",
            "weight_features",
            "cosine_features",
            "dominance_features",
            "seen_cosine_features",  # the default rule sees running means
            "seen_dominance_features",
            "share_task",
            "update_cosine",
            "dominated",
            "level_features_p3",
            "level_features_p4",
            "fallbacks_degenerate",
            "fallbacks_non_finite",
        )
    }
    parts = [v for n, v in scalars.items() if n.startswith("loss_")]
    assert "loss_features" in scalars and len(parts) == 5
    assert scalars["total_loss"] == pytest.approx(sum(parts), rel=1e-6)
    balance = trainer._trainer.boundary.last
    assert scalars["balance/features/weight_features"] == float(balance.weights[1])


def test_balance_json_and_bounded_logs_of_a_run(make_cfg, monkeypatch):
    monkeypatch.setattr(writers, "HISTORY", 2)
    cfg = make_cfg("mokd")
    storage = train(cfg).storage
    with open(f"{cfg.OUTPUT_DIR}/balance.json") as f:
        (line,) = [json.loads(line) for line in f]
    assert line["iteration"] == 2 and "balance/features/cosine_features" in line
    assert max(len(history.values()) for history in storage.histories().values()) == 2


def test_non_finite_loss_stops_before_the_weights_change(make_cfg):
    cfg = make_cfg("mokd")
    seed_all_rng(cfg.SEED)
    trainer = build_trainer(cfg)
    model = trainer.model
    before = {k: v.clone() for k, v in model.named_parameters()}
    model.objectives["features"].loss = lambda student, teacher: (student * float("nan")).sum()
    with EventStorage(0), pytest.raises(FloatingPointError, match="comes from features"):
        trainer.run_step()
    for key, value in model.named_parameters():
        assert torch.equal(before[key], value), key
    assert trainer._trainer.boundary.last.fallback == "non_finite"


class OwnMapper:
    def __init__(self, cfg):
        self.mapper = DatasetMapper(cfg, is_train=True)
        self.seen = 0

    def __call__(self, element):
        self.seen += 1
        return self.mapper(element)


def test_a_trainer_with_a_mapper_of_its_own(make_cfg):
    class OwnTrainer(DistillationTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            cls.mapper = OwnMapper(cfg)
            return build_resumable_train_loader(cfg, mapper=cls.mapper)

    trainer = OwnTrainer(make_cfg("mokd"))
    with EventStorage():
        trainer.run_step()
    assert OwnTrainer.mapper.seen >= trainer.cfg.SOLVER.IMS_PER_BATCH


def test_a_loader_that_cannot_resume_is_refused(make_cfg):
    class OwnTrainer(DistillationTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg, mapper=OwnMapper(cfg))

    with pytest.raises(TypeError, match="Return mokd_det.data.build_resumable_train_loader"):
        OwnTrainer(make_cfg("mokd"))


def test_options_of_ones_own_beside_ours(make_cfg, tmp_path):
    written = make_cfg("mokd")
    written.MODEL.OWN = CfgNode({"SIZE": 3})
    (tmp_path / "own.yaml").write_text(written.dump())
    cfg = get_cfg()
    cfg.MODEL.OWN = CfgNode({"SIZE": 1})
    cfg.merge_from_file(str(tmp_path / "own.yaml"))
    assert cfg.MODEL.OWN.SIZE == 3
    assert isinstance(build_trainer(cfg), DistillationTrainer)


def test_classes_of_the_teacher_are_compared_before_training(make_cfg, tmp_path):
    categories = [{"id": 1, "name": "shrub"}]
    (tmp_path / "shrubs.json").write_text(json.dumps({"images": [], "categories": categories}))
    sets = [["shrubs", str(tmp_path / "shrubs.json"), str(tmp_path)]]
    teacher = ["DATASETS.COCO", sets, "DATASETS.TRAIN", ("shrubs",)]
    opts = ["MOKD.OBJECTIVES", ["features", "outputs"], "MOKD.TEACHER.OPTS", teacher]
    with pytest.raises(ValueError, match="'outputs'. compares classes .* teacher's 1: shrub"):
        DistillationTrainer(make_cfg("mokd", opts))


@pytest.mark.parametrize(
    "opts",
    [
        ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"],
        ["MOKD.TEACHER.PRECISION", "bfloat16", "MOKD.TEACHER.CHANNELS_LAST", True],
        ["MOKD.TEACHER.INFERENCE_MODE", True, "SOLVER.MICRO_BATCHES", 2],
        ["MOKD.BALANCING.MEASURE_AT", "parameters"],
        ["MOKD.BALANCING.RULE", "famo"],
    ],
    ids=["bfloat16", "teacher at speed", "micro-batches", "parameters", "famo"],
)
@pytest.mark.slow
def test_teacher_head_with_every_kind_of_step(make_cfg, opts):
    opts = [*HEADS, *opts, "MOKD.TEACHER_HEAD.STUDENT", ["p4", "p5"], "SOLVER.MAX_ITER", 2]
    trainer = train(make_cfg("mokd", [*opts, "MOKD.TEACHER_HEAD.TEACHER", ["p4", "p5"]]))
    assert trainer.iter == 2
    assert trainer.storage.latest()["loss_teacher_head_classes"][0] > 0
    assert all(p.isfinite().all() for p in trainer.model.parameters())
