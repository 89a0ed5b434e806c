# Copyright (c) The mokd_det authors.
"""A distillation in Python (LazyConfig): the YAML's run, its checks and its guarantees."""

import json
import shutil

import detectron2.data.transforms as T
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from fvcore.common.param_scheduler import MultiStepParamScheduler

from mokd_det.config import load_config, trust_files
from mokd_det.data import register_coco
from mokd_det.engine import DistillationTrainer, LazyTrainer, read_lazy

from ..conftest import CONFIGS, TREE_OPTS, TREES
from ..test_tools import refused, run_here

FILE = "configs/Quick-Start/student_retinanet_mokd.py"
YAML = CONFIGS["retinanet"]


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


@pytest.mark.slow
def test_it_is_the_yamls_run(make_lazy, teacher_weights, tmp_path):
    """All losses of all steps and the trained student, bit for bit."""
    lazy = train(make_lazy(tmp_path / "lazy"))
    opts = [*TREE_OPTS, "MOKD.OBJECTIVES", None, "MOKD.ENABLED", True, "SOLVER.MAX_ITER", 4]
    opts += ["MOKD.TEACHER.CONFIG_FILE", CONFIGS["teacher"], "MOKD.TEACHER.PROPOSALS", 64]
    opts += ["MOKD.TEACHER.WEIGHTS", teacher_weights, "OUTPUT_DIR", str(tmp_path / "yaml")]
    cfg = load_config(YAML, opts)
    cfg.DATASETS.TEST = ()
    seed_all_rng(7)
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(False)
    trainer.train()
    mine, theirs = losses(lazy), losses(trainer)
    assert len(theirs) > 5 and len(theirs["total_loss"]) == 4
    assert mine == theirs
    states = [torch.load(tmp_path / run / "model_final.pth")["model"] for run in ("lazy", "yaml")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
    build_model(cfg).load_state_dict(states[0], strict=True)  # the student is plain


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


@pytest.mark.slow
def test_the_command_trains_and_evaluates(teacher_weights, make_lazy, tmp_path):
    tool, run = "tools/train_net.py", tmp_path / "run"
    opts = overrides(teacher_weights, run, max_iter=2)
    args = ["--trust", "--config-file", FILE]
    assert "results.json" in run_here(tool, *args, *opts)
    first = json.loads((run / "results.json").read_text())
    weights = f"train.init_checkpoint='{run}/model_final.pth'"
    gone = "model.teacher.weights=gone.pth"
    out = f"train.output_dir='{tmp_path}/eval'"
    run_here(tool, "--eval-only", *args, *opts, weights, gone, out)
    assert json.loads((tmp_path / "eval/results.json").read_text()) == first
    assert "has checkpoints of an earlier run" in refused(*args, *opts, script=tool)
    assert "--zoo-row is for YAML configs" in refused("--zoo-row", *args, *opts, script=tool)
    said = refused(*args, *opts, gone, f"train.output_dir='{tmp_path}/no'", script=tool)
    assert "MOKD.TEACHER.WEIGHTS 'gone.pth' does not exist" in said
    assert not (tmp_path / "no").exists()


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
    ],
)
def test_mistakes_are_one_message(make_lazy, tmp_path, opts, message):
    with pytest.raises(ValueError if "gone" not in opts[0] else FileNotFoundError, match=message):
        LazyTrainer(make_lazy(tmp_path, opts))


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
