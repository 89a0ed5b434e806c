# Copyright (c) The mokd_det authors.
"""A distillation in Python (LazyConfig): the YAML's run, its checks and its guarantees."""

import errno
import json
import os
import re
import shutil

import detectron2.data.transforms as T
import pytest
import torch
import yaml
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.data import get_detection_dataset_dicts
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from fvcore.common.param_scheduler import MultiStepParamScheduler

from mokd_det.commands import predict
from mokd_det.config import get_cfg, load_config, trust_files
from mokd_det.data import register_coco
from mokd_det.engine import DistillationTrainer, LazyTrainer, lazy, read_lazy, write_student
from mokd_det.engine.lazy_options import IN_YAML, TRAIN, described, plain
from mokd_det.report.runs import read_runs

from ..conftest import CONFIGS, ROOT, TREE_OPTS, TREES
from ..test_tools import refused, run_here

FILE = "configs/Quick-Start/student_retinanet_mokd.py"
YAML = CONFIGS["retinanet"]


def own_set(split):
    """Elements of a data set that no name stands for."""
    return get_detection_dataset_dicts(f"tests_trees_{split}")


class OwnEvaluator(DatasetEvaluator):
    def process(self, inputs, outputs):
        pass

    def evaluate(self):
        return {"own": {"score": 1.0}}


def overrides(teacher_weights, output, **train):
    given = {"max_iter": 4, "output_dir": f"'{output}'", "eval_period": 0, "seed": 7} | train
    return [
        f"model.teacher.weights='{teacher_weights}'",
        "model.teacher.precision=''",  # what "auto" chooses is the machine's
        "dataloader.train.dataset.names=tests_trees_train",
        "dataloader.test.dataset.names=tests_trees_val",
        "dataloader.train.total_batch_size=2",
        *(f"train.{key}={value}" for key, value in given.items()),
    ]


@pytest.fixture
def make_lazy(teacher_weights):
    """From a folder and options of ``train`` to the config on the tiles of tests/data."""
    for split in ("train", "val"):
        register_coco(f"tests_trees_{split}", str(TREES / f"{split}.json"), str(TREES / split))

    def make(output, opts=(), **train):
        cfg = read_lazy(FILE, [*overrides(teacher_weights, output, **train), *opts])
        resize = {"short_edge_length": [192], "max_size": 192, "sample_style": "choice"}
        cfg.dataloader.train.mapper.augmentations = [
            L(T.ResizeShortestEdge)(**resize),
            L(T.RandomFlip)(),
        ]
        cfg.lr_multiplier = L(MultiStepParamScheduler)(values=[1.0, 1.0], milestones=[2, 4])
        return cfg

    return make


def train(cfg, resume=False):
    seed_all_rng(7)
    trainer = LazyTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.run()
    return trainer


def losses(trainer):
    return {
        name: [value for value, _ in history.values()]
        for name, history in trainer.storage.histories().items()
        if "loss" in name
    }


@pytest.fixture(scope="session")
def retinanet_weights(tmp_path_factory):
    """Of a teacher that is built as the student: there is something to inherit."""
    seed_all_rng(3)
    path = tmp_path_factory.mktemp("retinanet") / "teacher.pth"
    run = {"class_names": ["Tree"]}
    torch.save({"model": build_model(load_config(YAML)).state_dict(), "run": run}, path)
    return str(path)


# By name of the test: overrides of the Python config, and of the YAML config.
ALIKE = {
    "defaults": ([], []),
    "all": (
        [
            f"model.teacher.config_file={YAML}",
            "model.inherit=[backbone.fpn_, head.]",
            "model.student.test_score_thresh=0.0",
            "train.ema_decay=0.9",
            "train.micro_batches=2",
            "train.non_finite_gradients=skip",
            "train.max_skipped_steps=3",
            "train.backbone.checkpointing=true",
            "train.eval_period=2",
            "train.best_metric=bbox/AP",
            "train.patience=9",
            "train.writers=[csv, json]",
        ],
        [
            *("MOKD.TEACHER.CONFIG_FILE", YAML, "MOKD.INHERIT", ["backbone.fpn_", "head."]),
            *("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "SOLVER.EMA_DECAY", 0.9),
            *("SOLVER.MICRO_BATCHES", 2, "MODEL.BACKBONE.CHECKPOINTING", True),
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIKE)
def test_it_is_the_yamls_run(name, make_lazy, teacher_weights, retinanet_weights, tmp_path):
    """All losses of all steps and the trained student, bit for bit."""
    ours, theirs = ALIKE[name]
    weights = teacher_weights if name == "defaults" else retinanet_weights
    lazy = train(make_lazy(tmp_path / "lazy", [*ours, f"model.teacher.weights='{weights}'"]))
    opts = [*TREE_OPTS, "MOKD.OBJECTIVES", None, "MOKD.ENABLED", True, "SOLVER.MAX_ITER", 4]
    opts += ["MOKD.TEACHER.CONFIG_FILE", CONFIGS["teacher"], "MOKD.TEACHER.PROPOSALS", 64]
    opts += ["MOKD.TEACHER.WEIGHTS", weights, "OUTPUT_DIR", str(tmp_path / "yaml"), *theirs]
    cfg = load_config(YAML, opts)
    cfg.DATASETS.TEST = ()
    seed_all_rng(7)
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(False)
    trainer.train()
    mine, theirs = losses(lazy), losses(trainer)
    assert len(theirs) > 5 and len(theirs["total_loss"]) == 4
    assert mine == theirs
    saved = [torch.load(tmp_path / run / "model_final.pth") for run in ("lazy", "yaml")]
    for key in ("model", *(["student"] if name == "all" else [])):
        states = [checkpoint[key] for checkpoint in saved]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
    build_model(cfg).load_state_dict(saved[0]["model"], strict=True)  # the student is plain
    made = {path.name for path in (tmp_path / "lazy").iterdir()}
    assert {"metrics.json", "balance.json"} <= made
    more = {"model_best.pth", "metrics.csv"}
    assert (made & more == more) == (name == "all")
    assert any(file.startswith("events.") for file in made) == (name == "defaults")


@pytest.mark.slow
def test_a_run_ends_when_its_metric_no_longer_rises(make_lazy, tmp_path, monkeypatch):
    monkeypatch.setattr(lazy, "_evaluated", lambda cfg, model: {"bbox": {"AP": 1.0}})
    opts = ["train.best_metric=bbox/AP", "train.patience=2"]
    trainer = train(make_lazy(tmp_path / "run", opts, max_iter=9, eval_period=1))
    assert (trainer.iter, trainer.results) == (2, {"bbox": {"AP": 1.0}})
    assert {"model_best.pth", "model_final.pth"} <= {f.name for f in (tmp_path / "run").iterdir()}


@pytest.mark.slow
def test_metrics_of_an_evaluator_of_ones_own(make_lazy, tmp_path):
    """Only its first evaluation says which there are."""
    opts = ["train.eval_period=2", "dataloader.evaluator={}"]

    def run(metric):
        cfg = make_lazy(tmp_path / metric.replace("/", "_"), [f"train.best_metric={metric}", *opts])
        cfg.dataloader.evaluator = L(OwnEvaluator)()
        return train(cfg)

    assert run("own/score").results == {"own": {"score": 1.0}}
    with pytest.raises(ValueError, match="'bbox/AP', which the evaluation .* it gives own/score"):
        run("bbox/AP")


@pytest.mark.slow
@pytest.mark.parametrize(
    "unnamed, message",
    [
        ("train", "is 'bbox/AQ': .* There are bbox/AP,"),
        ("test", "which the evaluation .* bbox/AP,"),
    ],
)
def test_metrics_of_sets_without_a_name(make_lazy, tmp_path, unnamed, message):
    cfg = make_lazy(tmp_path, ["train.best_metric=bbox/AQ", "train.eval_period=2"])
    cfg.dataloader.evaluator.dataset_name = "tests_trees_val"
    cfg.dataloader[unnamed].dataset = L(own_set)(split="val" if unnamed == "test" else "train")
    with pytest.raises(ValueError, match=message):
        train(cfg)


@pytest.mark.slow
def test_steps_that_are_not_finite_are_left_out(make_lazy, tmp_path):
    far = ["optimizer.lr=1e30", "dataloader.evaluator=null"]
    trainer = train(make_lazy(tmp_path / "skip", [*far, "train.non_finite_gradients=skip"]))
    assert trainer.skipped.total == 3
    next(trainer.inner.student.parameters()).data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="The checkpoint was not written"):
        trainer.checkpointer.save("model_nan")
    with pytest.raises(FloatingPointError, match="The gradient is not finite in iteration 1"):
        train(make_lazy(tmp_path / "raise", far))


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(make_lazy, tmp_path):
    period = ["train.checkpointer.period=2"]
    whole = train(make_lazy(tmp_path / "whole", period))
    (tmp_path / "part").mkdir()
    shutil.copy(tmp_path / "whole/model_0000001.pth", tmp_path / "part")
    resumed = train(make_lazy(tmp_path / "part", period), resume=True)
    assert resumed.start_iter == 2
    ours, theirs = (x.inner.state_dict() for x in (resumed, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    cfg = make_lazy(tmp_path / "part", ["dataloader.train.total_batch_size=3"])
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH was 2 and is 3 now"):
        train(cfg, resume=True)


def predict_with(config, weights, output):
    """By the YAML that the run has written: the same model, and images of the same size."""
    cfg = load_config(str(config))
    alone = instantiate(LazyConfig.load(str(config.parent / "student_model.yaml")).model)
    for model in (build_model(cfg), alone):
        model.load_state_dict(torch.load(weights)["model"], strict=True)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT) == (256, 256, "BGR")
    args = ["--trust", "--config-file", config, "--weights", weights, "--output", output]
    parsed = predict.argument_parser().parse_args([*map(str, args), str(TREES / "val")])
    predict.run(parsed)
    assert json.loads((output / "predictions.json").read_text()) == []


@pytest.mark.parametrize(
    "augmentations, sizes",
    [
        ([L(T.ResizeShortestEdge)(short_edge_length=96, max_size=128)], (96, 128)),
        ([L(T.ResizeShortestEdge)(short_edge_length=[96, 96], max_size=128)], (96, 128)),
        ([L(T.ResizeShortestEdge)(short_edge_length=[64, 96], max_size=128)], None),
        ([L(T.ResizeShortestEdge)(short_edge_length=96)], None),
        ([L(T.Resize)(shape=[96, 96])], None),
        ([], None),
        (None, None),
    ],
)
def test_sizes_of_evaluation_in_the_students_yaml(tmp_path, caplog, augmentations, sizes):
    """What a YAML config cannot say is left out with a word, not replaced by its default."""
    lazy = read_lazy(FILE, [f"train.output_dir='{tmp_path}'"])
    lazy.dataloader.test.mapper.augmentations = augmentations
    cfg = described(plain(lazy.train), "BGR", {})
    with open(write_student(lazy, cfg)) as file:
        given = yaml.safe_load(file)["INPUT"]
    expected = dict(zip(("MIN_SIZE_TEST", "MAX_SIZE_TEST"), sizes or ()))
    assert given == {"FORMAT": "BGR", **expected}
    assert ("set INPUT.MIN_SIZE_TEST" in caplog.text) == (sizes is None)


def test_a_student_that_yaml_cannot_say_has_no_yaml(tmp_path, caplog):
    lazy = read_lazy(FILE, [f"train.output_dir='{tmp_path}'"])
    lazy.model.student.box2box_transform = L(lambda: None)()
    assert write_student(lazy, described(plain(lazy.train), "BGR", {})) == ""
    assert re.search("student.yaml is not written, .*lambda>, which no module has", caplog.text)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_stops_the_run_with_one_sentence(
    make_lazy, tmp_path, monkeypatch, caplog, number
):
    period = ["train.checkpointer.period=1"]
    replace = os.replace

    def full(source, target):
        if "model_0000002" in target:
            raise OSError(number, os.strerror(number))
        replace(source, target)

    message = "'.*model_0000002.pth' could not be written .*: make room there and .* --resume"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=message):
        patch.setattr(os, "replace", full)
        train(make_lazy(tmp_path / "full", period))
    assert "Traceback" not in caplog.text and "Exception during training" not in caplog.text
    assert not list((tmp_path / "full").glob("*.tmp"))
    assert train(make_lazy(tmp_path / "full", period), resume=True).start_iter == 2


@pytest.mark.slow
def test_the_command_trains_and_evaluates(teacher_weights, make_lazy, tmp_path):
    tool, run = "tools/train_net.py", tmp_path / "run"
    opts = overrides(teacher_weights, run, max_iter=2)
    args = ["--trust", "--config-file", FILE]
    said = run_here(tool, *args, *opts)
    for text in (
        "The run:\n  student    RetinaNet, FPN: 0.86 M parameters, 1 class (Tree), random weights",
        "  teacher    GeneralizedRCNN, build_torchvision_fpn_backbone: 4.64 M parameters",
        "  objectives teacher_head (p3 -> p3, p4 -> p4, p5 -> p5, p6 -> p6), outputs\n",
        "  data       tests_trees_train, 6 images; 2 a step\n  length     2 iterations (0.667 ep",
        "  evaluation tests_trees_val, at the end\n  device     cpu, 1 process",
        f"  predict   mokd predict --trust --config-file {run}/student.yaml --weights {run}/model_",
    ):
        assert said.count(text) == 1, text
    assert json.loads((run / "summary.json").read_text())["student"]["classes"] == ["Tree"]
    made = read_runs([str(run)])[0]
    assert made.is_distilled and made.options["DATASETS.TEST"] == ["tests_trees_val"]
    predict_with(run / "student.yaml", run / "model_final.pth", tmp_path / "found")
    first = json.loads((run / "results.json").read_text())
    weights = f"train.init_checkpoint='{run}/model_final.pth'"
    gone = "model.teacher.weights=gone.pth"
    out = f"train.output_dir='{tmp_path}/eval'"
    run_here(tool, "--eval-only", *args, *opts, weights, gone, out)
    assert json.loads((tmp_path / "eval/results.json").read_text()) == first
    said = run_here(tool, "-q", "--eval-only", "--resume", *args, *opts, gone)  # the last weights
    assert json.loads((run / "results.json").read_text()) == first
    assert "results.json" in said and "Environment info" not in said
    assert "has checkpoints of an earlier run" in refused(*args, *opts, script=tool)
    assert "--zoo-row is for YAML configs" in refused("--zoo-row", *args, *opts, script=tool)
    said = refused(*args, *opts, gone, f"train.output_dir='{tmp_path}/no'", script=tool)
    assert "MOKD.TEACHER.WEIGHTS 'gone.pth' does not exist" in said
    assert not (tmp_path / "no").exists()


@pytest.mark.slow  # most build a model first
@pytest.mark.bad_input
@pytest.mark.parametrize(
    "opts, message",
    [
        (["train.max_itre=3"], "no option train.max_itre. Did you mean 'max_iter'"),
        (["train.amp.on=true"], "no option train.amp.on"),
        (["+model.techer.weights=x"], "no option MOKD.TECHER.* Did you mean MOKD.TEACHER"),
        (
            ["model.teacher.weigths=x"],
            "no option MOKD.TEACHER.WEIGTHS. Did you mean MOKD.TEACHER.W",
        ),
        (["model.teacher.proposals=many"], "MOKD.TEACHER.PROPOSALS is 'many': expected an integer"),
        (["model.teacher.weights=gone.pth"], "MOKD.TEACHER.WEIGHTS 'gone.pth' does not exist"),
        (["model._target_=torch.nn.Identity"], "model builds a Identity: expected L"),
        (
            ["model.student.num_classes=2", "model.objectives=[teacher_head]"],
            "'num_classes' of the model, a RetinaNet,",
        ),
        (["model.student.num_classes=2"], "student has 2 classes and the teacher 1"),
        (["train.clip_gradients.clip_type=nrom"], "CLIP_TYPE is 'nrom'"),
        (["train.ema_decay=2"], "SOLVER.EMA_DECAY is 2: expected"),
        (["train.writers=[jsn]"], r"LOGGING.WRITERS is \['jsn'\].*did you mean 'json'"),
        (["train.non_finite_gradients=skp"], "NON_FINITE_GRADIENTS is 'skp'.*did you mean 'skip'"),
        (["train.max_skipped_steps=3"], "MAX_SKIPPED_STEPS is 3, but it is read with"),
        (["train.backbone.compile=indctor"], "MODEL.BACKBONE.COMPILE is 'indctor'"),
        (["train.checkpointer.period=0"], "SOLVER.CHECKPOINT_PERIOD is 0: expected"),
        (["train.micro_batches=3"], "MICRO_BATCHES is 3: expected a divisor of the 2 images"),
        (["train.best_metric=bbox/AP"], "BEST_METRIC is 'bbox/AP', but TEST.EVAL_PERIOD is 0"),
        (
            ["train.best_metric=bbox/AQ", "train.eval_period=2"],
            "BEST_METRIC is 'bbox/AQ'.*There are bbox/AP, bbox/AP50, bbox/AP75, .*, bbox/APl.$",
        ),
        (  # which a RetinaNet does not say
            ["train.best_metric=segm/AP", "train.eval_period=2"],
            "BEST_METRIC is 'segm/AP'.*There are bbox/AP, bbox/AP50, bbox/AP75, .*, bbox/APl.$",
        ),
        (["train.patience=2"], "TEST.PATIENCE is 2, but TEST.BEST_METRIC, which it waits for"),
        (["model.inherit=[neck]"], "MOKD.INHERIT has 'neck', of which nothing fits"),
        (
            ["model.balancing.rule=torchjd.CAGrad", "model.balancing.torchjd.q=1"],
            "{'q': 1} does not fit",
        ),
        (["dataloader.train.mapper.brokn=skip"], "dataloader.train cannot be built: .*'brokn'"),
        (["model.enabled=false"], "model.enabled is False, but MOKD.ENABLED is for YAML"),
        (["model.meta_architecture=X"], "MOKD.META_ARCHITECTURE is for YAML"),
        (["model.teacher={}", "model.techer={}"], "no option MOKD.TECHER"),
        (["model.train={max_iter: 3}"], r"model.train is not the config's train.*\$\{train\}"),
    ],
)
def test_mistakes_are_one_message(make_lazy, tmp_path, opts, message):
    with pytest.raises(ValueError if "gone" not in opts[0] else FileNotFoundError, match=message):
        LazyTrainer(make_lazy(tmp_path, opts))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "opt, message",
    [
        # of a YAML config
        ("TEST.BEST_METRIC=bbox/AP", "has 'TEST', .*TEST.BEST_METRIC is train.best_metric here"),
        ("test.patience=3", "has 'test', .*TEST.PATIENCE is train.patience here"),
        ("SOLVER.EMA_DECAY=0.9", "SOLVER.EMA_DECAY is train.ema_decay here"),
        ("SOLVER.NON_FINITE_GRADIENTS=skip", "is train.non_finite_gradients here"),
        ("MODEL.BACKBONE.COMPILE=inductor", "is train.backbone.compile here"),
        ("MODEL.BACKBONE.CHECKPOINTING=true", "is train.backbone.checkpointing here"),
        ("LOGGING.WRITERS=[csv]", "LOGGING.WRITERS is train.writers here"),
        ("MOKD.INHERIT=[backbone]", "MOKD.INHERIT is model.inherit here"),
        ("MOKD.TEACHER.WEIGHTS=x", "MOKD.TEACHER.WEIGHTS is model.teacher.weights here"),
        ("INPUT.COLOR_JITTER=0.3", "to set INPUT.COLOR_JITTER, use a YAML config"),
        # misspelt, or of nobody
        ("optimiser.lr=1", "has 'optimiser', which nothing reads.*Did you mean 'optimizer'"),
        ("sizes.a=1", "has 'sizes'.* begins with '_': _sizes"),
        ("train.ema_decai=0.9", "no option train.ema_decai. Did you mean 'ema_decay'"),
        ("train.best_metrik=x", "no option train.best_metrik. Did you mean 'best_metric'"),
        ("train.amp.precision=bfloat16", "train.amp.enabled is not, and nothing reads it"),
        ("train.amp=true", "train.amp is True: expected its options"),
        ("train=3", "train is 3: expected its options"),
        ("train.log_period=0", "train.log_period is 0: expected an integer"),
        ("dataloader.tests=1", "has 'dataloader.tests', .*Did you mean 'test'"),
        ("dataloader.train.total_batchsize=2", "'total_batchsize'.*mean 'total_batch_size'"),
        ("model.student.num_clases=2", "model.student has 'num_clases'.*mean 'num_classes'"),
        ("optimizer.momentm=1", "optimizer has 'momentm'.*Did you mean 'momentum'"),
        ("lr_multiplier.warmup_len=1", "lr_multiplier has 'warmup_len'.*mean 'warmup_length'"),
        ("optimizer.params=3", "has no 'optimizer.params': expected L"),
        ("dataloader=3", "has no 'dataloader': expected model, .* each a dict or a call"),
        ("train.max_iter='${gone}'", "is no config: .*gone"),
    ],
)
def test_nothing_is_accepted_that_nothing_reads(opt, message):
    with pytest.raises(ValueError, match=message):
        read_lazy(FILE, [opt])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "gone, opts, message",
    [
        ("evaluator", ["train.best_metric=bbox/AP"], "but no 'dataloader.evaluator' that measures"),
        ("test", [], "has no 'dataloader.test'"),
        ("train", [], "has no 'dataloader.train'"),
    ],
)
def test_parts_of_the_loaders_that_are_not_there(tmp_path, gone, opts, message):
    path = tmp_path / "lazy.py"
    path.write_text(f"{(ROOT / FILE).read_text()}\ndel dataloader['{gone}']\n")
    with pytest.raises(ValueError, match=message):
        read_lazy(str(path), opts)


def test_options_of_train_have_the_defaults_of_yaml_or_of_detectron2():
    cfg = get_cfg()
    for name, key in IN_YAML.items():
        place, option = TRAIN, cfg
        for part in name.split("."):
            place = place[part]
        for part in key.split("."):
            option = option[part]
        detectron2s = ("init_checkpoint", "max_iter", "eval_period", "clip_gradients.clip_type")
        assert place == option or name in detectron2s, name


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "text, message",
    [
        ("model = {}\ntrain = {}\n", "has no 'optimizer': expected model, train, optimizer"),
        ("train = {}\n", "defines no 'model'"),
        ("train = dict(\n", "is no valid Python: .* line 1"),
        (None, "does not exist"),
    ],
)
def test_files_that_are_no_whole_config(tmp_path, text, message):
    path = tmp_path / "lazy.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_lazy(str(path))


@pytest.mark.bad_input
def test_it_needs_trust_and_its_own_command(tmp_path):
    trust_files(False)
    with pytest.raises(ValueError, match="is a Python config.* add --trust"):
        read_lazy(FILE)
    with pytest.raises(ValueError, match="Python config .*: mokd train takes it"):
        load_config(FILE)
