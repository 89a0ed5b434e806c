# Copyright (c) The mokd_det authors.
"""How commands end for what they were given: one message on stderr, exit code 2, no traceback."""

import contextlib
import io
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mokd_det.command_line import errors_as_messages, import_modules, message_of

from .conftest import CONFIGS, ROOT, TREE_OPTS
from .test_tools import refused, run

CPU = ["MODEL.DEVICE", "cpu"]
TEACHER = ["--config-file", CONFIGS["teacher"], *CPU, "MODEL.TORCHVISION.WEIGHTS", ""]


class Bad(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 2

    def __getitem__(self, index):
        try:
            raise KeyError("the cause")
        except KeyError as error:
            raise self.error from error


@pytest.mark.parametrize(
    "error",
    [ValueError("a.jpg is broken:\nValueError is no name"), OSError("a.jpg is truncated")],
    ids=["two lines", "one line"],
)
def test_a_workers_error_is_said_without_its_traceback(error):
    with pytest.raises(type(error)) as raised:
        list(DataLoader(Bad(error), num_workers=1))
    assert "Traceback" in str(raised.value)
    assert message_of(raised.value) == str(error)
    assert message_of(error) == str(error)


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError("x"), ImportError("x")])
def test_errors_of_users_are_messages(error, capsys):
    with pytest.raises(SystemExit) as stopped, errors_as_messages(debug=False):
        raise error
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(": x\n(--debug shows where)\n")
    with pytest.raises(type(error)), errors_as_messages(debug=True):
        raise error


def test_an_error_about_torch_needs_none(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mokd_det.untrusted", None)
    with pytest.raises(SystemExit), errors_as_messages(debug=False):
        raise ImportError("No module named 'torch'")
    assert capsys.readouterr().err.endswith(": No module named 'torch'\n(--debug shows where)\n")


def test_bugs_keep_their_traceback():
    with pytest.raises(KeyError), errors_as_messages(debug=False):
        raise KeyError("x")


def test_before_they_are_connected_one_process_of_a_machine_speaks(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(SystemExit) as stopped, errors_as_messages(debug=False):
        raise ValueError("x")
    assert stopped.value.code == 2 and not capsys.readouterr().err


def test_loggers_write_tracebacks_to_files_only(tmp_path, monkeypatch):
    logger = logging.getLogger("mokd_det")
    console, log = logging.StreamHandler(sys.stdout), logging.FileHandler(tmp_path / "log.txt")
    monkeypatch.setattr(console, "stream", said := io.StringIO())
    monkeypatch.setattr(sys, "stdout", said)
    monkeypatch.setattr(logger, "handlers", [console, log])
    monkeypatch.setattr(logger, "isEnabledFor", lambda level: True)
    with contextlib.suppress(SystemExit), errors_as_messages(debug=False):
        logger.info("hello")
        raise ValueError("the cause")
    log.close()
    assert said.getvalue() == "hello\n"
    assert "Traceback" in (text := (tmp_path / "log.txt").read_text()) and "the cause" in text
    assert not console.filters


def test_a_log_that_cannot_be_written_is_not_what_is_said(monkeypatch, capsys):
    logger = logging.getLogger("mokd_det")
    (closed := io.StringIO()).close()
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(closed)])
    monkeypatch.setattr(logger, "isEnabledFor", lambda level: True)
    monkeypatch.setattr(logging, "raiseExceptions", True)  # off in every other test
    with pytest.raises(SystemExit), errors_as_messages(debug=False):
        raise ValueError("x")
    assert capsys.readouterr().err.endswith(": x\n(--debug shows where)\n")
    assert logging.raiseExceptions


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """A folder to stand in, with modules by their content."""

    def write(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.chdir(tmp_path)

    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["tests_own", "tests_own.py", "./tests_own.py"])
def test_modules_of_users_are_imported_once(own_modules, name):
    own_modules(tests_own="import tests_helper; tests_helper.count += 1", tests_helper="count = 0")
    import_modules([name, name])
    import_modules([name])
    assert sys.modules["tests_helper"].count == 1


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name, message",
    [
        ("tests_absent", "--import 'tests_absent': there is no module 'tests_absent' in '"),
        ("tests_own.x", "'tests_own' is not a package|there is no module 'tests_own.x'"),
        ("absent.py", "--import 'absent.py' does not exist"),
        ("tests_own", "--import 'tests_own' failed: No module named 'tests_missing'."),
        ("tests_wrong.py", "--import 'tests_wrong.py' failed: SyntaxError: "),
        ("tests_bad", "--import 'tests_bad' failed: ZeroDivisionError: division by zero"),
        ("json.py", "another module 'json'"),
    ],
)
def test_modules_that_cannot_be_imported(own_modules, name, message):
    own_modules(tests_own="import tests_missing", tests_wrong="(", tests_bad="1 / 0", json="")
    if name == "tests_own.x":
        own_modules(tests_own="")
    for _ in range(2):  # nothing half-imported is left
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            import_modules([name])


@pytest.mark.slow
def test_a_data_set_that_a_module_registers(tmp_path):
    (tmp_path / "tests_my_data.py").write_text(
        "from detectron2.data.datasets import register_coco_instances\n"
        f"register_coco_instances('tests_mine', {{}}, '{ROOT}/tests/data/trees/train.json', "
        f"'{ROOT}/tests/data/trees/train')\n"
    )
    args = ["--import", tmp_path / "tests_my_data.py", *TEACHER, *TREE_OPTS]
    args += ["DATASETS.TRAIN", ("tests_mine",), "DATASETS.TEST", (), "SOLVER.MAX_ITER", 1]
    done = run("tools/train_net.py", *args, "OUTPUT_DIR", tmp_path / "run")
    assert "data       tests_mine, 6 images" in done.stdout


def test_it_needs_nothing_but_python():
    code = "import sys, mokd_det.command_line; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Arguments of each command, and what its message has to hold.
WRONG = [
    ("tools/train_net.py", ["--config-file", "no.yaml"], "'no.yaml' does not exist"),
    ("tools/train_net.py", [*TEACHER, "SOLVER.IMS_PER_BATCH", 0], "SOLVER.IMS_PER_BATCH is 0"),
    ("tools/train_net.py", [*TEACHER, "SOLVER.MAX_ITER"], "pairs KEY VALUE"),
    ("tools/train_net.py", ["--num-gpus", -1, *TEACHER], "--num-gpus is -1"),
    ("tools/train_net.py", ["--num-gpus", 99, *TEACHER], "--num-gpus is 99"),
    ("tools/train_net.py", ["--num-machines", 0, *TEACHER], "--num-machines is 0"),
    ("tools/train_net.py", ["--machine-rank", 1, *TEACHER], "--machine-rank is 1"),
    ("tools/train_net.py", ["--timeout", 0, *TEACHER], "--timeout is 0"),
    ("tools/train_net.py", ["--timeout", "nan", *TEACHER], "--timeout is nan"),
    ("tools/export_model.py", ["--output", "x", *TEACHER, "INPUT.FORMAT", "RBG"], "INPUT.FORMAT"),
    ("tools/export_model.py", ["--output", "x", "--tolerance", "nan", *TEACHER], "--tolerance"),
    ("tools/benchmark.py", ["--config-file", "no.yaml"], "'no.yaml' does not exist"),
    ("tools/benchmark.py", ["--rounds", 1, *TEACHER], "--rounds is 1"),
    ("tools/benchmark_classification.py", TEACHER, "must be of a classifier"),
    ("tools/plot_balance.py", ["no"], "no/balance.json does not exist"),
    ("tools/report.py", ["no"], "has no config.yaml"),
    ("tools/run_exported.py", ["no.ts", "no.jpg"], "'no.ts' does not exist"),
    ("tools/run_exported.py", ["setup.cfg", "setup.cfg", "--score", 2], "--score is 2"),
    ("tools/quick_start.py", ["SOLVER.MAX_ITERS", 5], "no option SOLVER.MAX_ITERS"),
    ("tools/quick_start_classification.py", ["SEED", "x"], "SEED"),
    (
        "tools/visualize_predictions.py",
        ["--dataset", "x", "--output", "x.png", "--count", 0, "--model", "a", "b", "c"],
        "--count is 0",
    ),
    ("studies/run.py", ["no.yaml", "--run"], "no.yaml"),
    ("studies/run.py", ["setup.cfg", "--run"], "setup.cfg is no plain YAML"),
    ("studies/run.py", ["studies/mnist.yaml", "--run", "--jobs", 0], "--jobs"),
    ("studies/run.py", ["studies/mnist.yaml", "--run", "--only", "x"], "--only"),
    ("datasets/prepare_voc.py", ["--root", "no", "--name", "x"], "no"),
    ("datasets/prepare_fashion_mnist.py", ["--source", "no", "--output", "no"], "does not exist"),
    ("datasets/prepare_aerial_digits.py", ["--output", "setup.cfg"], "setup.cfg"),
    ("datasets/prepare_neon_trees.py", ["--size", 0], "--size"),
    ("datasets/prepare_neon_trees.py", ["--min-visible", 2, "--output", "no"], "--min-visible"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize("script, args, message", WRONG, ids=lambda x: str(x))
def test_every_command(script, args, message):
    assert message in refused(*args, script=script)
    assert not (ROOT / "no").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["tools/train_net.py", "studies/run.py", "tools/run_exported.py"]
)
def test_as_a_process(script):
    args, message = next((args, message) for name, args, message in WRONG if name == script)
    done = run(script, *args, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert message in done.stderr


@pytest.mark.slow
@pytest.mark.bad_input
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_data_in_training(tmp_path, workers):
    """An image is truncated after the checks: one message; the traceback is in log.txt."""
    (tmp_path / "images").mkdir()
    tiles = os.listdir(ROOT / "tests/data/trees/train")
    for name in tiles:
        content = (ROOT / "tests/data/trees/train" / name).read_bytes()
        (tmp_path / "images" / name).write_bytes(content[:-200])
    sets = [["tests_cut", "tests/data/trees/train.json", str(tmp_path / "images")]]
    opts = [*TREE_OPTS, "DATASETS.COCO", sets, "DATASETS.TRAIN", ("tests_cut",)]
    opts += ["DATASETS.TEST", (), "DATALOADER.NUM_WORKERS", workers]
    opts += ["OUTPUT_DIR", tmp_path / "run"]
    args = ["--config-file", CONFIGS["faster_rcnn"], *CPU, *opts]
    done = run("tools/train_net.py", *args, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert "train_net.py: " in done.stderr.splitlines()[-2]
    assert "truncated" in done.stderr
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
def test_a_config_error_of_several_processes_is_said_once(tmp_path):
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "3", "tools/train_net.py"]
    args = [sys.executable, *start, *map(str, [*TEACHER, "SOLVER.MAX_ITER", 0])]
    args += ["OUTPUT_DIR", str(tmp_path)]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(args, cwd=ROOT, env=threads, capture_output=True, text=True)
    assert done.returncode and done.stderr.count("SOLVER.MAX_ITER is 0: expected") == 1
