# Copyright (c) The mokd_det authors.
"""The command line, as a user calls it."""

import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.modeling import build_model
from PIL import Image

from mokd_det.commands import train, training, visualize, visualizing
from mokd_det.config import load_config
from mokd_det.data import register_datasets
from mokd_det.engine.summary import next_steps
from mokd_det.evaluation.results import set_aside
from mokd_det.report import plot_balance, read_balance

from .conftest import CONFIGS, ROOT, TREE_OPTS, TREES, loggers_restored
from .data.annotated import coco_layout
from .modeling.families import FCOS


def load_script(path):
    """Import a script of tools/ or datasets/ by its path."""
    spec = importlib.util.spec_from_file_location(path.split("/")[-1][:-3], ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, *args, check=True, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **variables}
    done = subprocess.run(
        [sys.executable, script, *map(str, args)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr, file=sys.stderr)  # for pytest_terminal_summary
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def run_here(script, *args):
    """As :func:`run`, in this process, because importing torch takes seconds; what it prints."""
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [script, *map(str, args)]),
        mock.patch.object(sys, "path", [str((ROOT / script).parent), *sys.path]),
        loggers_restored(),
        contextlib.redirect_stdout(printed),
    ):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stopped:
            if stopped.code:
                raise
    return printed.getvalue()


def refused(*args, tool="train_net", script=None):
    """The message of a tool, or another script, for a command line that it refuses."""
    said = io.StringIO()
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stderr(said):
        run_here(script or f"tools/{tool}.py", *args)
    print(said.getvalue(), file=sys.stderr)  # for pytest_terminal_summary
    assert stopped.value.code == 2 and "Traceback" not in said.getvalue()
    return said.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, teacher_weights):
    """tools/train_net.py with distillation, on the command line: (output folder, overrides)."""
    output = tmp_path_factory.mktemp("cli")
    teacher = output / "teacher.pth"  # names its classes: the quick start's data need not be there
    state = torch.load(teacher_weights, weights_only=True)
    torch.save({**state, "run": {"class_names": ["Tree"]}}, teacher)
    opts = [*TREE_OPTS, "MOKD.TEACHER.WEIGHTS", str(teacher), "OUTPUT_DIR", str(output)]
    done = run("tools/train_net.py", "--config-file", CONFIGS["mokd"], *opts)
    return output, opts, done.stdout


def test_train_net_trains_evaluates_and_leaves_what_it_says(trained):
    output, _, stdout = trained
    files = set(os.listdir(output))
    assert {"model_final.pth", "metrics.json", "balance.json", "results.json", "log.txt"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert "Average Precision" in stdout and "results.json" in stdout
    with open(output / "results.json") as f:
        assert set(json.load(f)["bbox"]) >= {"AP", "AP50"}
    # The written config is what stock Detectron2 reads.
    cfg = get_detectron2_cfg()
    cfg.merge_from_file(str(output / "student.yaml"))
    state = torch.load(output / "model_final.pth", weights_only=True)["model"]
    build_model(cfg).load_state_dict(state, strict=True)


def test_next_steps_name_the_trained_weights_only():
    """Not those that the training began with."""
    opts = ["MODEL.WEIGHTS", "start.pth", "SEED", 3]
    said = next_steps("c.yaml", opts, "out", "out/model_final.pth")
    assert "start.pth" not in said and said.count("SEED 3") == 3


@pytest.mark.parametrize(
    "student, weights, commands",
    [
        (
            "out/student.yaml",
            "out/model_best.pth",
            {
                "train --trust --config-file c.py --eval-only train.seed=3 "
                "train.init_checkpoint=out/model_best.pth",
                "export --trust --config-file out/student.yaml --format torchscript "
                "--output out/export MODEL.WEIGHTS out/model_best.pth",
                "predict --trust --config-file out/student.yaml --weights out/model_best.pth "
                "PHOTO...",
                "report out",
            },
        ),
        (
            "",  # of what YAML cannot say
            "out/a b.pth",
            {
                "train --trust --config-file c.py --eval-only train.seed=3 "
                "train.init_checkpoint='out/a b.pth'",
                "report out",
            },
        ),
    ],
)
def test_next_steps_of_a_python_config(student, weights, commands):
    opts = ["train.init_checkpoint=start.pth", "train.seed=3"]
    said = next_steps("c.py", opts, "out", weights, (), student).splitlines()[1:]
    split = [shlex.split(line)[1:] for line in said]
    assert {" ".join(words[1:]) for words in split} == commands


def test_training_prints_what_a_person_checks(trained):
    """Once each, and not the config: that is in log.txt, as all that Detectron2 says."""
    output, _, stdout = trained
    summary = json.loads((output / "summary.json").read_text())
    assert summary["student"]["parameters"] == 971_712 and summary["images"] == 6
    assert summary["teacher"]["classes"] == ["Tree"] and summary["rule"] == "loss_ratio"
    assert summary["objectives"] == {"features": [[f"p{i}", f"p{i}"] for i in range(3, 7)]}
    for text in (
        "The run:\n  student    GeneralizedRCNN, build_resnet_fpn_backbone: 0.97 M parameters",
        "  teacher    GeneralizedRCNN, build_torchvision_fpn_backbone: ",
        "  objectives features (p3 -> p3, p4 -> p4, p5 -> p5, p6 -> p6)\n  rule       loss_ratio",
        "  data       tests_trees_train, 6 images; 2 a step\n  length     3 iterations (1 epoch",
        "Starting training from iteration 0",
        f"What now:\n  evaluate  mokd train --config-file {CONFIGS['mokd']} --eval-only ",
        f"--weights {output}/model_final.pth PHOTO... DATASETS.COCO ",
        f"\n  report    mokd report {output}\n",
    ):
        assert stdout.count(text) == 1, text
    log = (output / "log.txt").read_text()
    for text in ("Running with full config", "Environment info", "Student:", "WARMUP_FACTOR"):
        assert text not in stdout and text in log
    assert len(stdout.splitlines()) < 100


def test_eval_only_gives_the_same_numbers_without_a_teacher(trained, tmp_path):
    output, opts, _ = trained
    opts = [*opts, "MODEL.WEIGHTS", output / "model_final.pth", "OUTPUT_DIR", tmp_path]
    opts += ["MOKD.TEACHER.WEIGHTS", "gone.pth"]
    printed = run_here("tools/train_net.py", "--config-file", CONFIGS["mokd"], "--eval-only", *opts)
    assert "Average Precision" in printed
    first, second = (json.loads((d / "results.json").read_text()) for d in (output, tmp_path))
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, change, message",
    [
        (
            "--resume",
            ["SOLVER.OPTIMIZER", "AdamW"],
            "SOLVER.OPTIMIZER was 'SGD' and is 'AdamW' now",
        ),
        ("--resume", ["MODEL.FPN.OUT_CHANNELS", 32], "of another architecture"),
        ("--overwrite", ["MOKD.TEACHER.WEIGHTS", "student.pth"], "does not fit the model"),
        ("--overwrite", ["MODEL.WEIGHTS", "balance.json"], "is a text file"),
    ],
)
def test_a_run_that_is_refused_leaves_the_old_one(trained, tmp_path, flag, change, message):
    output, opts, _ = trained
    run_folder = tmp_path / "run"
    shutil.copytree(output, run_folder)
    shutil.copy(output / "model_final.pth", tmp_path / "student.pth")
    shutil.copy(output / "balance.json", tmp_path / "balance.json")
    for name in (".lock", "log.txt"):  # the log of all runs
        (run_folder / name).unlink()
    before = {path.name: path.read_bytes() for path in run_folder.iterdir() if path.is_file()}
    opts = [*opts, *change[:-1], tmp_path / change[-1] if "WEIGHTS" in change[0] else change[-1]]
    opts += ["OUTPUT_DIR", run_folder, "TEST.EVAL_PERIOD", 100]
    assert re.search(message, refused("--config-file", CONFIGS["mokd"], flag, *opts))
    assert {p.name: p.read_bytes() for p in run_folder.iterdir() if p.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--eval-only"]])
def test_a_start_that_fails_leaves_nothing(tmp_path, flags):
    """A teacher, or for evaluation a student, that does not fit is found once it is built."""
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "t.pth")
    opts = ["MODEL.WEIGHTS" if flags else "MOKD.TEACHER.WEIGHTS", tmp_path / "t.pth"]
    opts += ["OUTPUT_DIR", tmp_path / "output/deep/run"]
    error = refused("--config-file", CONFIGS["mokd"], *flags, *TREE_OPTS, *opts)
    assert "does not fit the model" in error
    assert [path.name for path in tmp_path.iterdir()] == ["t.pth"]


@pytest.mark.slow
def test_overwrite_starts_anew(trained, tmp_path):
    output, opts, _ = trained
    run_folder = tmp_path / "run"
    shutil.copytree(output, run_folder)
    for name in ("model_0000000.pth", "events.out.tfevents.1"):
        (run_folder / name).touch()
    opts = [*opts, "OUTPUT_DIR", run_folder, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", ()]
    run_here("tools/train_net.py", "--config-file", CONFIGS["mokd"], "--overwrite", *opts)
    files = {path.name for path in run_folder.iterdir()}
    assert not files & {"model_0000000.pth", "events.out.tfevents.1", "results.json"}
    assert len([name for name in files if name.startswith("events.out")]) == 1
    for name in ("metrics.json", "balance.json"):
        (line,) = (run_folder / name).read_text().splitlines()
        assert json.loads(line)["iteration"] == 0
    assert torch.load(run_folder / "model_final.pth", weights_only=True)["iteration"] == 0


def test_resume_continues(trained, tmp_path):
    output, opts, _ = trained
    shutil.copytree(output, tmp_path, dirs_exist_ok=True)
    more = ["SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 100, "OUTPUT_DIR", tmp_path]
    more += ["MODEL.WEIGHTS", "gone.pth"]  # where training started: not needed any more
    args = ["--config-file", CONFIGS["mokd"], "--resume", *opts, *more]
    assert "Starting training from iteration 3" in run_here("tools/train_net.py", *args)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--config-file", "no.yaml"], "--config-file 'no.yaml' does not exist"),
        (["--config-file", CONFIGS["mokd"], "MOKD.RULE", "x"], "no option MOKD.RULE"),
        (
            ["--config-file", CONFIGS["mokd"], "--eval-only", "DATASETS.TEST", "('x',)"]
            + ["MODEL.WEIGHTS", "setup.cfg"],
            "DATASETS.TEST names 'x', which is not registered",
        ),
        (
            ["--config-file", CONFIGS["faster_rcnn"], *TREE_OPTS, "MODEL.WEIGHTS", "no.pth"],
            "'no.pth' does not",
        ),
        (
            ["--config-file", CONFIGS["mokd"], "--eval-only", *TREE_OPTS],
            "MODEL.WEIGHTS is empty",
        ),
        (
            ["--config-file", CONFIGS["mokd"], "MOKD.LOGITS.TEMPERATURE", "2.0"],
            "MOKD.LOGITS.TEMPERATURE is 2.0, but it is read by the objective 'logits' only, and "
            "MOKD.OBJECTIVES is ['teacher_head', 'outputs']",
        ),
        (
            ["--config-file", CONFIGS["mokd"], "MOKD.BALANCING.DOMINANCE", "6.0"],
            "no option MOKD.BALANCING.DOMINANCE any more: rule 'constant_dominance' is gone",
        ),
    ],
)
def test_bad_command_lines_fail_with_a_reason(tmp_path, args, message):
    assert message in refused(*args, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path)


def test_the_classes_of_a_python_config_are_compared_in_evaluation(tmp_path):
    (tmp_path / "lazy.py").write_text(FCOS)
    opts = ["MODEL.META_ARCHITECTURE", "LazyConfigDetector", "MODEL.DEVICE", "cpu", *TREE_OPTS]
    opts += ["MODEL.LAZY_CONFIG.FILE", str(tmp_path / "lazy.py")]
    opts += ["MODEL.LAZY_CONFIG.OVERRIDES", ["model.num_classes=2"], "OUTPUT_DIR", str(tmp_path)]
    opts += ["MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    cfg = load_config(CONFIGS["faster_rcnn"], opts)
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    args = ["--trust", "--eval-only", "--config-file", CONFIGS["faster_rcnn"]]
    assert "is 2, but 'tests_trees_val' (DATASETS.TEST)" in refused(*args, *opts)


def test_an_error_is_an_exit_code_and_one_message():
    """Before data and weights are read: there are none."""
    args = ["--config-file", CONFIGS["mokd"], "MOKD.BALANCING.FAMO.LR", 1.0, "MODEL.DEVICE", "cpu"]
    done = run("tools/train_net.py", *args, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "train_net.py: MOKD.BALANCING.FAMO.LR is 1.0, but it is read by rule 'famo' only, and "
        "MOKD.BALANCING.RULE is 'loss_ratio': remove it, or set it to 0.025 (the default); or "
        "choose that rule." in done.stderr
    )
    with pytest.raises(ValueError, match="FAMO.LR is 1.0"):
        run_here("tools/train_net.py", "--debug", *args)


VISUALIZE = ["--dataset", "x", "--output", "x.png", "--model", "a"]
EXPORT = ["--output", "out", "--config-file"]


@pytest.mark.parametrize(
    "tool, args, message",
    [
        ("export_model", [*EXPORT, "no.yaml"], "--config-file 'no.yaml' does not exist."),
        (
            "export_model",
            [*EXPORT, CONFIGS["mokd"], "MODEL.WEIGHTS", "no.pth"],
            "MODEL.WEIGHTS 'no.pth' does not exist.",
        ),
        ("benchmark", ["--config-file", "no.yaml"], "--config-file 'no.yaml' does not exist."),
        (
            "benchmark_classification",
            ["--config-file", "no.yaml"],
            "--config-file 'no.yaml' does not exist.",
        ),
        (
            "visualize_predictions",
            [*VISUALIZE, "no.yaml", "b"],
            "--model a: 'no.yaml' does not exist.",
        ),
        (
            "visualize_predictions",
            [*VISUALIZE, CONFIGS["mokd"], "b"],
            "--model a: weights 'b' do not exist.",
        ),
        (
            "visualize_predictions",
            [*VISUALIZE, "configs/Digits/teacher.yaml", "b"],
            "--model a: 'configs/Digits/teacher.yaml' is not of a detector.",
        ),
        (
            "plot_balance",
            ["no"],
            "no/balance.json does not exist: no is not the OUTPUT_DIR of a run with MOKD.ENABLED.",
        ),
        (
            "plot_balance",
            ["no", "--output", "no/x.png"],
            "--output 'no/x.png': its folder does not exist.",
        ),
        (
            "run_exported",
            ["setup.cfg", "setup.cfg"],
            "setup.cfg has no metadata.json inside: expected a file of tools/export_model.py "
            "--format torchscript.",
        ),
    ],
)
def test_what_is_missing_is_one_message_of_every_tool(monkeypatch, tool, args, message):
    monkeypatch.chdir(ROOT)
    if tool in ("export_model", "benchmark", "visualize_predictions"):
        args = [*args, "MODEL.DEVICE", "cpu"]
    assert refused(*args, tool=tool) == f"{tool}.py: {message}\n(--debug shows where)\n"
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(message)):
        run_here(f"tools/{tool}.py", "--debug", *args)


@pytest.mark.parametrize("tool", ["benchmark", "benchmark_classification"])
def test_benchmark_of_nothing_is_refused(capsys, tool):
    with pytest.raises(SystemExit):
        run_here(f"tools/{tool}.py", "--config-file", "no.yaml", "--batch", 0)
    assert "argument --batch: 0 is less than 1" in capsys.readouterr().err


def test_export_gives_a_stock_checkpoint(trained, tmp_path):
    output, _, _ = trained
    args = ["--config-file", CONFIGS["mokd"], "--format", "checkpoint", "--output", tmp_path]
    printed = run_here("tools/export_model.py", *args, "MODEL.WEIGHTS", output / "model_final.pth")
    written = json.loads(printed.splitlines()[-1])
    cfg = get_detectron2_cfg()
    cfg.merge_from_file(written["config"])
    assert cfg.MODEL.WEIGHTS == written["weights"]
    checkpoint = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)
    assert set(checkpoint) == {"model", "__author__"}
    build_model(cfg).load_state_dict(checkpoint["model"], strict=True)


def test_pictures(trained, tmp_path):
    output, _, _ = trained
    plot = tmp_path / "balance.png"
    printed = run_here("tools/plot_balance.py", output, output, "--output", plot)
    assert printed.splitlines()[-1] == str(plot)
    single = tmp_path / "single.png"
    plot_balance([str(output)], str(single))
    wide, narrow = cv2.imread(str(plot)), cv2.imread(str(single))
    assert wide.shape[1] > 1.9 * narrow.shape[1] > 500
    assert (narrow != 255).any(axis=-1).mean() > 0.02  # not an empty page

    register_datasets(load_config(CONFIGS["mokd"], TREE_OPTS))
    grid = tmp_path / "grid.png"
    model = ("mokd", CONFIGS["mokd"], str(output / "model_final.pth"))
    visualizing.visualize("tests_trees_val", [model], str(grid), count=2, score=0.0)
    picture = cv2.imread(str(grid))
    assert picture.shape[0] > 2 * 192 and picture.shape[1] > 2 * 192
    assert (picture == visualizing.GROUND_TRUTH_COLOUR).all(axis=-1).sum() > 500


def test_pictures_take_overrides_for_every_model(tmp_path, monkeypatch):
    register_datasets(load_config(CONFIGS["mokd"], TREE_OPTS))
    seen = []

    def predict(cfg, elements, score):
        seen.append((os.path.basename(cfg.MODEL.WEIGHTS), cfg.INPUT.MIN_SIZE_TEST))
        return [visualizing.ground_truth(element) for element in elements]

    monkeypatch.setattr(visualizing, "predict", predict)
    args = ["--dataset", "tests_trees_val", "--output", str(tmp_path / "grid.png")]
    for name in ("mokd", "teacher"):
        (tmp_path / f"{name}.pth").touch()
        args += ["--model", name, CONFIGS[name], str(tmp_path / f"{name}.pth")]

    def draw(*opts):
        visualize.run(visualize.argument_parser().parse_args([*args, *opts]))

    draw("INPUT.MIN_SIZE_TEST", "128")
    assert seen == [("mokd.pth", 128), ("teacher.pth", 128)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU. Add the override: MODEL.DEVICE cpu"):
        draw("MODEL.DEVICE", "cuda")
    assert len(seen) == 2


def test_plot_of_a_run_without_distillation_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the OUTPUT_DIR of a run with MOKD.ENABLED"):
        plot_balance([str(tmp_path)], "x.png")


def test_plot_takes_the_later_of_two_lines_for_a_step(tmp_path):
    lines = [
        {"iteration": i, "balance/features/cosine_features": v} for i, v in ((1, 5), (0, 1), (1, 2))
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "balance.json").write_text('{"iteration": 3, "bal\n' + text)  # killed, resumed
    series = read_balance(str(tmp_path))
    assert series == {"balance/features/cosine_features": ([0, 1], [1, 2])}


def test_student_and_teacher_are_evaluated_in_one_call(trained, tmp_path):
    output, opts, _ = trained
    opts = [*opts[:-1], tmp_path, "MODEL.WEIGHTS", output / "model_final.pth"]
    args = ["--config-file", CONFIGS["mokd"], "--eval-only", "--with-teacher", "--zoo-row", *opts]
    printed = run_here("tools/train_net.py", *args)
    results = json.loads((tmp_path / "results.json").read_text())
    teacher = json.loads((tmp_path / "teacher" / "results.json").read_text())
    trained_results = json.loads((output / "results.json").read_text())
    assert results == trained_results and teacher.keys() == results.keys()
    lines = printed.splitlines()
    table = lines.index("| task | model | AP | AP50 | AP75 | APs | APm | APl |")
    assert lines[table + 2].startswith("| bbox | teacher |")
    assert lines[table + 3].startswith("| bbox | student |")
    row = json.loads((tmp_path / "zoo_row.json").read_text())
    assert row["parameters"] == 971_712 and row["name"] == "student_mokd"
    assert row["gflops"] > 0.1 and row["inference_seconds_per_image"] > 0
    assert row["accuracy"] == {"box AP": results["bbox"]["AP"]} and len(row["sha256"]) == 64
    assert row["train_seconds_per_iteration"] is None  # it was not trained in this folder
    assert f"| [student_mokd]({CONFIGS['mokd']}) |" in printed


@pytest.mark.parametrize(
    "name, flags, opts, message",
    [
        ("mokd", ["--with-teacher"], [], "--with-teacher evaluates: use it together with --eval"),
        ("faster_rcnn", ["--eval-only", "--with-teacher"], [], "a config with MOKD.ENABLED True"),
        ("mokd", ["--zoo-row"], ["DATASETS.TEST", "()"], "--zoo-row needs DATASETS.TEST"),
    ],
)
def test_flags_that_do_not_fit_are_refused(name, flags, opts, message):
    assert message in refused("--config-file", CONFIGS[name], *flags, *TREE_OPTS, *opts)


@pytest.mark.parametrize(
    "size, teacher_opts, expected",
    [(0, [], 32), (48, [], 48), (48, ["INPUT.CLASSIFICATION.SIZE_TEST", 40], 40)],
)
def test_teacher_without_a_config_is_evaluated_at_its_size(
    make_digits_cfg, monkeypatch, size, teacher_opts, expected
):
    opts = ["MOKD.TEACHER.CONFIG_FILE", "", "MOKD.TEACHER.CLASSIFIER", "resnet18"]
    opts += ["MOKD.TEACHER.OPTS", teacher_opts]
    cfg = make_digits_cfg([*opts, "MOKD.TEACHER.IMAGE_SIZE", size])
    register_datasets(cfg)
    build = training.Trainer.build_test_loader
    images = []

    def test(cfg, model):
        images.append(next(iter(build(cfg, "tests_digits_val"))).images[0])
        return {"classification": {"top1": 1.0}}

    monkeypatch.setattr(training.Trainer, "test", test)
    monkeypatch.setattr(training.task_of(cfg).__class__, "load_trained", lambda *args: None)
    args = ["--eval-only", "--with-teacher"]
    before = training.FolderBefore(cfg.OUTPUT_DIR)
    training.evaluate(train.argument_parser().parse_args(args), cfg, before)
    student, teacher = (x.shape[-1] for x in images)
    assert student == 32 and teacher == expected
    assert size or torch.equal(*images)


COCO_CONFIG = "configs/COCO-Detection/mokd_faster_rcnn_R_101_to_R_50_FPN_1x.yaml"


@pytest.mark.slow
def test_coco_that_is_not_there_is_explained(tmp_path):
    """
    Before anything else, on any machine: no GPU and no weights are asked for first. In a process
    of its own, because Detectron2 looks for COCO's folder when it is imported.
    """
    done = run(
        "tools/train_net.py", "--config-file", COCO_CONFIG, check=False,
        DETECTRON2_DATASETS=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 2
    error = done.stderr.splitlines()[-2]
    assert error.startswith("train_net.py: DATASETS.TRAIN: the annotations of 'coco_2017_train'")
    assert f"{tmp_path}/coco/annotations/instances_train2017.json" in error
    assert "https://cocodataset.org/#download" in error and "DETECTRON2_DATASETS" in error


@pytest.mark.slow
def test_tiny_coco_trains_evaluates_and_prints_its_zoo_row(tmp_path):
    coco_layout(tmp_path / "coco", TREES)
    cfg = load_config("configs/COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    weights = tmp_path / "teacher.pth"
    torch.save({"model": build_model(cfg).state_dict()}, weights)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MOKD.TEACHER.WEIGHTS", weights]
    opts += ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()"]
    opts += ["INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", 96, "SOLVER.BASE_LR", 1e-5]
    opts += ["DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", tmp_path / "run"]
    args = ["--config-file", COCO_CONFIG, "--zoo-row", *opts]
    done = run("tools/train_net.py", *args, DETECTRON2_DATASETS=str(tmp_path))
    row = json.loads((tmp_path / "run" / "zoo_row.json").read_text())
    assert "| Name | schedule | train s/iter | inference s/im |" in done.stdout
    assert f"]({COCO_CONFIG}) | 2 x 2 images |" in done.stdout
    assert 41e6 < row["parameters"] < 42e6 and "box AP" in row["accuracy"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl"} <= set(results["bbox"])
    shutil.rmtree(tmp_path / "run")  # hundreds of MB
    weights.unlink()


@pytest.mark.parametrize(
    "script",
    ["run_exported", "benchmark", "benchmark_classification"]
    + ["quick_start", "quick_start_classification"],
)
def test_every_tool_has_help_with_an_example(script):
    assert f"python tools/{script}.py" in run_here(f"tools/{script}.py", "--help")


SHORT = ["MOKD.BALANCING.INTERVAL", 2]  # steps of a round
SMALL = ["--size", 64, 64, "--batch", 1, "--rounds", 2]


@pytest.mark.slow
def test_benchmark(tmp_path):
    output = tmp_path / "bench.json"
    # With one distillation objective, for which TorchJD is compared, too.
    opts = ["MODEL.DEVICE", "cpu", "MOKD.OBJECTIVES", "['features']", *SHORT]
    args = ["--config-file", CONFIGS["mokd"], *SMALL, "--output", output, *opts]
    printed = run_here("tools/benchmark.py", *args)
    result = json.loads(output.read_text())
    names = {"student", "teacher", "fixed", "features", "parameters", "famo", "torchjd"}
    objectives = {"objective features", "objective outputs", "objective teacher_head"}
    assert set(result["variants"]) == names | objectives
    for name, variant in result["variants"].items():
        if name == "torchjd" and "error" in variant:
            assert "not installed" in variant["error"]
            continue
        assert min(variant[key] for key in ("seconds", "vs_student", "vs_fixed")) > 0
        assert variant["peak_bytes"] > 4 * 900_000 * (name != "teacher")
        assert name in printed
    assert result["variants"]["fixed"]["vs_fixed"] == 1
    assert result["variants"]["student"]["vs_student"] == 1
    # Student and teacher are there at once, gradients of two objectives are more than one's.
    peaks = {name: v["peak_bytes"] for name, v in result["variants"].items() if "error" not in v}
    assert peaks["fixed"] > max(peaks["student"], peaks["teacher"])
    assert "fixed / (student + teacher)" in result["ratios"]


@pytest.mark.slow
def test_benchmark_of_an_objective_that_a_pair_does_not_support(tmp_path):
    output = tmp_path / "bench.json"
    names = ["objective outputs", "objective features"]
    args = ["--config-file", CONFIGS["mokd"], *SMALL, "--output", output, "--variants", *names]
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", 3, "MOKD.OBJECTIVES", "['features']", *SHORT]
    printed = run_here("tools/benchmark.py", *args, "MODEL.DEVICE", "cpu", *opts)
    variants = json.loads(output.read_text())["variants"]
    assert set(variants) == {"student", "fixed", *names}
    reason = variants.pop("objective outputs")["error"]
    assert "the student has 3 classes and the teacher 1" in reason and reason in printed
    assert all(variant["vs_student"] > 0 for variant in variants.values())


def test_models_of_objectives_differ_in_these_only():
    """Also where the rule's weights are for another number of objectives."""
    tool = load_script("tools/benchmark.py")
    opts = ["MODEL.DEVICE", "cpu", "MOKD.OUTPUTS.TEMPERATURE", 3.0]
    opts += ["MOKD.BALANCING.RULE", "fixed", "MOKD.BALANCING.FIXED.WEIGHTS", [1.0, 2.0, 3.0]]
    cfg = load_config(CONFIGS["mokd"], opts)
    features, outputs = (tool.model_of_objective(cfg, name) for name in ("features", "outputs"))
    assert features.names == ["task", "features"] and outputs.names == ["task", "outputs"]
    for ours, theirs in (
        (features.student, outputs.student),
        (features.teacher.model, outputs.teacher.model),
    ):
        other = theirs.state_dict()
        assert all(torch.equal(x, other[name]) for name, x in ours.state_dict().items())
    # Features are all that the first needs: its teacher proposes no boxes.
    assert features.teacher.reader is None and outputs.teacher.reader is not None
    assert outputs.objectives["outputs"].temperature == 3.0
    assert cfg.MOKD.BALANCING.FIXED.WEIGHTS == [1.0, 2.0, 3.0]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    model, reason = tool.build_objective_step(cfg, "outputs", batch=[])
    assert model is None and "the student has 3 classes and the teacher 1" in reason


@pytest.mark.slow
def test_benchmark_of_teacher_options(tmp_path):
    output = tmp_path / "bench.json"
    args = ["--config-file", CONFIGS["mokd"], *SMALL, "--teacher-options", "--output", output]
    printed = run_here("tools/benchmark.py", *args, "MODEL.DEVICE", "cpu")
    options = json.loads(output.read_text())["teacher_options"]
    assert "MOKD.TEACHER.STREAM True needs a GPU" in options.pop("stream")["error"]
    assert set(options) >= {"plain", "bfloat16", "channels_last", "compile", "inference_mode"}
    assert options["plain"]["difference"] == 0 < options["bfloat16"]["difference"]
    assert options["channels_last"]["difference"] < 1e-3  # the same weights
    assert options["plain"]["vs_plain"] == options["plain"]["step_vs_plain"] == 1
    assert all(min(e["step_seconds"], e["seconds"]) > 0 for e in options.values())
    assert all(name in printed for name in options)


@pytest.mark.slow
def test_benchmark_of_two_processes(tmp_path):
    output = tmp_path / "bench.json"
    launcher = ["torch.distributed.run", "--nproc-per-node", 2, "tools/benchmark.py"]
    args = ["--config-file", CONFIGS["mokd"], *SMALL, "--output", output]
    opts = ["MODEL.DEVICE", "cpu", "MOKD.OBJECTIVES", "['features']", *SHORT]
    objectives = {"objective features", "objective outputs", "objective teacher_head"}
    done = run("-m", *launcher, *args, *opts)
    result = json.loads(output.read_text())
    assert result["machine"]["processes"] == 2
    variants = result["variants"]
    assert "over processes" in variants.pop("torchjd")["error"]
    names = {"student", "teacher", "fixed", "features", "parameters", "famo"}
    assert set(variants) == names | objectives
    assert all(variant["vs_fixed"] > 0 for variant in variants.values())
    assert done.stdout.count("fixed / (student + teacher)") == 1  # one process prints


def test_benchmark_needs_a_distilled_detector():
    for config in (CONFIGS["faster_rcnn"], "configs/Digits/student_mokd.yaml"):
        message = refused("--config-file", config, tool="benchmark")
        assert "must be of a detector with MOKD.ENABLED True" in message


def test_benchmark_takes_overrides_after_its_variants():
    args = ["--config-file", CONFIGS["mokd"], "--variants", "student"]
    message = refused(*args, "featurs", "MODEL.DEVICE", "cpu", tool="benchmark")
    assert "--variants has ['featurs']: expected some of student" in message


def test_teacher_options_are_compared_in_one_process(monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    args = ["--config-file", CONFIGS["mokd"], "--teacher-options"]
    assert "--teacher-options and --profile look at one process" in refused(*args, tool="benchmark")


def test_prepare_voc(tmp_path, caplog):
    from .data.test_data import write_voc

    tool = load_script("datasets/prepare_voc.py")
    root = tmp_path / "voc"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name, label in (("a", "dog"), ("b", "cat")):
        xml, image = write_voc(tmp_path, [(label, (1, 1, 9, 9), 0)], name=name)
        xml.rename(root / "Annotations" / xml.name)
        image.rename(root / "JPEGImages" / image.name)
    (root / "ImageSets/Main/train.txt").write_text("a\n")
    (root / "ImageSets/Main/val.txt").write_text("b\n")
    (root / "ImageSets/Main/cat_val.txt").write_text("b 1\n")
    caplog.set_level("INFO")

    result = tool.prepare(root, tmp_path / "out")
    assert "left out cat_val as lists of one class; --splits" in caplog.text
    assert result["classes"] == ["cat", "dog"]
    assert result["splits"] == {s: {"images": 1, "boxes": 1} for s in ("train", "val")}
    coco = json.loads((tmp_path / "out/train.json").read_text())
    assert coco["images"][0]["file_name"] == "a.png"
    assert coco["annotations"][0]["category_id"] == 2
    lines = tool.config_lines("s", tmp_path / "out", result)
    assert '["s_train", ' in lines and lines.endswith("\n# classes: cat, dog")

    (root / "images").symlink_to(root / "JPEGImages")  # a user's own link stays a way to the photos
    tool.prepare(root, root, images="images")
    assert (root / "images" / "a.png").is_file() and (root / "train.json").is_file()

    (root / "ImageSets/Main/val.txt").write_text("b\nc\n")
    with pytest.raises(FileNotFoundError, match="c.xml does not exist, but split 'val' lists it"):
        tool.prepare(root, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="test.txt does not exist; there are"):
        tool.prepare(root, tmp_path / "out", splits=["test"])
    with pytest.raises(ValueError, match="class 'dog' is not among"):
        tool.prepare(root, tmp_path / "new", splits=["train"], classes=["cat"])
    assert json.loads((tmp_path / "out/train.json").read_text()) == coco  # errors leave it alone

    (root / "ImageSets/Main/val.txt").rename(root / "ImageSets/Main/my_val.txt")
    (root / "ImageSets/Main/my_val.txt").write_text("b\n")
    result = tool.prepare(root, tmp_path / "out")
    assert set(result["splits"]) == {"cat_val", "my_val", "train"}  # of no list "val"
    (tmp_path / "own").mkdir()
    (tmp_path / "own/my_val.json").write_text('{"info": {"description": "mine"}}')
    with pytest.raises(FileExistsError, match="own/my_val.json exists and was not made by mokd_de"):
        tool.prepare(root, tmp_path / "own")
    assert [p.name for p in (tmp_path / "own").iterdir()] == ["my_val.json"]
    for file in (root / "ImageSets/Main").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="ImageSets/Main has no list .* no --splits names one"):
        tool.prepare(root, tmp_path / "out")


def test_neon_splits_share_no_scene():
    tool = load_script("datasets/prepare_neon_trees.py")
    scenes = [scene for split in tool.SPLITS.values() for scene in split]
    assert len(set(scenes)) == len(scenes) == 4
    photos = {f"deepforest/data/{scene}.{suffix}" for scene in scenes for suffix in ("png", "xml")}
    assert photos < set(tool.FILES)


def test_neon_trees_delete_nothing_of_the_user(tmp_path, monkeypatch):
    tool = load_script("datasets/prepare_neon_trees.py")
    scene = tool.SPLITS["train"][0]

    def fetch(package, files, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for scene in (scene for scenes in tool.SPLITS.values() for scene in scenes):
            Image.new("RGB", (60, 40)).save(folder / f"{scene}.png")
            (folder / f"{scene}.xml").write_text("<annotation/>")

    monkeypatch.setattr(tool, "fetch_from_package", fetch)
    tool.prepare(tmp_path / "out", size=20, stride=10)
    (tmp_path / "out/train.json").unlink()  # as if it had been interrupted
    tool.prepare(tmp_path / "out", size=40, stride=40)
    tiles = {f"{scene}_0_0.png", f"{scene}_40_0.png"}
    assert {p.name for p in (tmp_path / "out/train").iterdir()} == tiles

    def refuse(*args):
        raise AssertionError("nothing is fetched before the folder is checked")

    monkeypatch.setattr(tool, "fetch_from_package", refuse)
    for split, name in (("test", "photo.png"), ("val", f"{scene}_0_0.png")):
        file = tmp_path / "out" / split / name  # the second is of another split
        file.write_text("mine")
        with pytest.raises(FileExistsError, match=f"{name} is no tile .* choose another --output"):
            tool.prepare(tmp_path / "out")
        file.unlink()
    (tmp_path / "out/test.json").write_text("{}")
    with pytest.raises(FileExistsError, match="test.json exists and was not made by mokd_det"):
        tool.prepare(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out/train").iterdir()} == tiles


def test_set_aside_takes_the_first_free_name(tmp_path):
    assert set_aside(tmp_path / "run") is None
    for name in ("run", "run.1", "run.3"):
        (tmp_path / name).mkdir()
    assert set_aside(tmp_path / "run") == tmp_path / "run.2"
    assert {p.name for p in tmp_path.iterdir()} == {"run.1", "run.2", "run.3"}


@pytest.mark.parametrize(
    "boxes, classes, right",
    [
        ([[0, 0, 10, 10]], [1], [True]),
        ([[0, 0, 10, 10]], [2], [False]),  # another class
        ([[0, 0, 10, 4]], [1], [False]),  # IoU 0.4
        ([[0, 0, 10, 9], [0, 0, 10, 10]], [1, 1], [True, False]),  # found twice
        ([[50, 50, 60, 60], [0, 0, 10, 10]], [2, 1], [True, True]),
        ([], [], []),
    ],
)
def test_which_predictions_are_right(boxes, classes, right):
    tool = visualizing

    def objects(boxes, classes):
        return tool.Objects(np.array(boxes, np.float32).reshape(-1, 4), np.array(classes, int))

    truth = objects([[0, 0, 10, 10], [50, 50, 60, 60]], [1, 2])
    assert tool.are_right(objects(boxes, classes), truth).tolist() == right
    assert not tool.are_right(objects(boxes, classes), objects([], [])).any()
    assert tool.model_column("a", [objects(boxes, classes)], [truth])[0] == f"a: {sum(right)} of 2"
