# Copyright (c) The mokd_det authors.
"""``mokd doctor``, in this process."""

import importlib
import os

import pytest
import torch

from mokd_det.commands import doctor, dry_run, installation

from ..conftest import CONFIGS, TREE_OPTS

STEP = "s for 2 images, the student's own"


@pytest.fixture
def examine(tmp_path, capsys, teacher_weights, monkeypatch):
    """From (name of a config, overrides) to the exit code and the printed lines."""

    monkeypatch.setattr(dry_run, "STEPS", 1)

    def run(name, *opts):
        args = doctor.argument_parser().parse_args(["--config-file", CONFIGS[name]])
        levels = ["MOKD.FEATURES.STUDENT", ["p3", "p4"]] if name == "mokd" else []
        args.opts = [*TREE_OPTS, *levels, "OUTPUT_DIR", str(tmp_path / "run")]
        args.opts += ["MOKD.TEACHER.WEIGHTS", teacher_weights, *opts] if name == "mokd" else opts
        code = doctor.run(args)
        return code, capsys.readouterr().out.splitlines()

    return run


def test_a_distilled_run_is_tried_and_leaves_nothing(examine, tmp_path):
    code, lines = examine("mokd", "MOKD.OBJECTIVES", ["features", "outputs"])
    said = "\n".join(lines)
    assert code == 0 and lines[-1] == "no problems", said
    for words in (
        "train on tests_trees_train, 1 class: ",
        "student      GeneralizedRCNN with 0.97 million parameters, on cpu",
        "teacher      GeneralizedRCNN with ",
        "objectives   features, outputs; balanced by 'loss_ratio'",
        "Features (student -> teacher): p3 -> p3, p4 -> p4",
        STEP,
        "; distilled ",
        "the run      3 steps, 0:00:",
    ):
        assert words in said, words
    assert not (tmp_path / "run").exists()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "opts, messages",
    [
        (["MOKD.TEACHER.WEIGHTS", "no.pth"], ["MOKD.TEACHER.WEIGHTS 'no.pth' does not exist"]),
        (["MODEL.DEVICE", "cuda"], ["Add the override: MODEL.DEVICE cpu"]),
        (["DATASETS.TRAIN", ("nowhere",)], ["DATASETS.TRAIN names 'nowhere', which is not reg"]),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 5], ["MODEL.ROI_HEADS.NUM_CLASSES is 5, but"]),
        (["OUTPUT_DIR", "setup.cfg/x"], ["OUTPUT_DIR 'setup.cfg/x' cannot be written: choose"]),
        (["SOLVER.MAXITER", 5], ["no option SOLVER.MAXITER. Did you mean SOLVER.MAX_ITER"]),
        (
            ["MOKD.TEACHER.WEIGHTS", "no.pth", "DATASETS.TEST", ("nowhere",)],
            ["'no.pth' does not exist", "DATASETS.TEST names 'nowhere'"],
        ),
    ],
)
def test_each_problem_is_a_line_with_its_remedy(examine, monkeypatch, opts, messages):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, lines = examine("mokd", *opts)
    problems = [line for line in lines if line.startswith("PROBLEM")]
    assert code == 1 and len(problems) == len(messages), lines
    assert all(message in line for message, line in zip(messages, problems)), problems
    assert not any(STEP in line for line in lines)


def test_a_folder_of_an_earlier_run(examine, tmp_path):
    os.mkdir(tmp_path / "run")
    (tmp_path / "run" / "model_final.pth").touch()
    code, lines = examine("faster_rcnn")
    (problem,) = [line for line in lines if line.startswith("PROBLEM")]
    assert code == 1 and "(model_final.pth ...): train with --resume (go on), with" in problem


def test_a_step_that_fails(examine):
    """A constant far from what images are: the loss overflows."""
    code, lines = examine("faster_rcnn", "MODEL.PIXEL_STD", [1e-38] * 3)
    (problem,) = [line for line in lines if line.startswith("PROBLEM")]
    assert code == 1 and "contain Inf/NaN" in problem


def test_what_is_not_installed(monkeypatch, capsys):
    """The config is not tried then."""
    found = importlib.import_module

    def find(name, *args):
        if name == "torchvision":
            raise ImportError("operator does not exist")
        return found(name, *args)

    monkeypatch.setattr(installation.importlib, "import_module", find)
    args = doctor.argument_parser().parse_args(["--config-file", "no.yaml"])
    assert doctor.run(args) == 1
    (problem,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("PROBLEM")]
    assert "torchvision cannot be imported (operator does not exist): install it as docs" in problem
