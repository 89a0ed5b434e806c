# Copyright (c) The mokd_det authors.
"""Which checkpoint a run goes on from, and which runs can go on."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.engine import DefaultTrainer
from detectron2.utils.env import seed_all_rng

from mokd_det.commands import train as train_command
from mokd_det.commands import training
from mokd_det.engine import build_trainer, claim_folder, find_checkpoint, release_folder, validate
from mokd_det.engine.checkpoints import PeriodicCheckpointer, RunCheckpointer, checkpoints_in
from mokd_det.engine.folder import FolderBefore, output_errors, replacing_run
from mokd_det.engine.identity import RunIdentity
from mokd_det.files import TEMPORARY, save_checkpoint

from .helpers import train, train_and_stop


def save(folder, name, iteration, **entries):
    trainer = {"iteration": iteration}
    weights = {"w": torch.full((50,), float(iteration))}
    save_checkpoint({"model": weights, "trainer": trainer, **entries}, str(folder / name))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def empty(path):
    path.write_bytes(b"")


def older(path):
    """The run was extended and killed: an old end is beside newer checkpoints."""
    save(path.parent, path.name, 0)


def plain(path):
    torch.save({"model": {}}, path)


def of_another_trainer(path):
    torch.save({"model": {}, "trainer": {"epoch": 3}}, path)


@pytest.fixture
def run_folder(tmp_path):
    """Checkpoints of iterations 1, 3 and 5, of which the last is the final one."""
    for name, iteration in (("model_0000001", 1), ("model_0000003", 3), ("model_final", 5)):
        save(tmp_path, f"{name}.pth", iteration)
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    return tmp_path


FINAL, THIRD, FIRST = "model_final.pth", "model_0000003.pth", "model_0000001.pth"


@pytest.mark.parametrize(
    "last, damages, chosen, said",
    [
        (FINAL, {}, FINAL, None),
        (FIRST, {}, FIRST, None),  # chosen by hand
        (FINAL, {THIRD: flip}, FINAL, None),
        (FINAL, {FINAL: flip}, THIRD, "model_final.pth: its checksum does not match"),
        (FINAL, {FINAL: cut}, THIRD, "model_final.pth: it is cut off"),
        (FINAL, {FINAL: empty}, THIRD, "model_final.pth: it is empty"),
        (FINAL, {FINAL: Path.unlink}, THIRD, "model_final.pth: it does not exist"),
        (FINAL, {FINAL: plain}, THIRD, "model_final.pth: it has weights only"),
        (FINAL, {FINAL: of_another_trainer}, THIRD, "model_final.pth: it has weights only"),
        (FINAL, {FINAL: flip, THIRD: cut}, FIRST, "model_0000003.pth: it is cut off"),
        (None, {}, FINAL, "last_checkpoint: it is missing"),
        (None, {FINAL: older}, THIRD, "last_checkpoint: it is missing"),
        (None, {FINAL: flip}, THIRD, "model_final.pth: its checksum"),
        ("", {}, FINAL, "last_checkpoint: it is empty"),
        ("\0\0", {}, FINAL, "last_checkpoint: it has"),
        ("../other/model_final.pth", {}, FINAL, "last_checkpoint: it has '../other"),
        ("model_final.pkl", {}, FINAL, "instead of the name of a .pth file beside it"),
        ("/model_final.pth", {}, FINAL, "last_checkpoint: it has"),
    ],
)
def test_the_newest_whole_checkpoint_is_chosen(run_folder, caplog, last, damages, chosen, said):
    if last is None:
        (run_folder / "last_checkpoint").unlink()
    else:
        (run_folder / "last_checkpoint").write_text(last)
    for name, damage in damages.items():
        damage(run_folder / name)
    with caplog.at_level(logging.WARNING, "mokd_det"):
        assert find_checkpoint(str(run_folder)) == str(run_folder / chosen)
    if said is None:
        assert not caplog.records
    else:
        iteration = {FINAL: 5, THIRD: 3, FIRST: 1}[chosen]
        assert said in caplog.text
        assert f"goes on from {chosen}, at iteration {iteration + 1}" in caplog.text


def test_a_folder_without_a_whole_checkpoint(run_folder, tmp_path):
    for path in run_folder.glob("*.pth"):
        empty(path)
    with pytest.raises(ValueError, match="model_0000001.pth: it is empty.*start anew there with"):
        find_checkpoint(str(run_folder))
    for path in run_folder.glob("*.pth"):
        path.unlink()
    with pytest.raises(ValueError, match="model_final.pth: it does not exist"):
        find_checkpoint(str(run_folder))
    (run_folder / "last_checkpoint").write_text("")  # killed within its first save
    assert find_checkpoint(str(run_folder)) == ""
    assert find_checkpoint(str(tmp_path / "none")) == ""


@pytest.mark.parametrize(
    "last, is_said",
    [("/elsewhere/model_final.pth", True), ("\0", True), ("", False), (None, False)],
)
def test_a_run_does_not_start_anew_in_silence(tmp_path, caplog, last, is_said):
    if last is not None:
        (tmp_path / "last_checkpoint").write_text(last)
    with caplog.at_level(logging.WARNING, "mokd_det"):
        assert find_checkpoint(str(tmp_path)) == ""
    assert ("starts anew. last_checkpoint: it has" in caplog.text) == is_said
    assert len(caplog.records) == is_said


def test_a_new_run_does_not_mix_with_an_old_one(make_cfg, run_folder):
    cfg = make_cfg("faster_rcnn", ["OUTPUT_DIR", str(run_folder)])
    with pytest.raises(ValueError, match="model_0000001.pth.*--resume.*OUTPUT_DIR.*--overwrite"):
        claim_folder(cfg, resume=False)
    claim_folder(cfg, resume=True)
    metrics = run_folder / "metrics.json"
    metrics.write_text("{}")
    (run_folder / "results.json").write_text("{}")
    (run_folder / f"model_0000007.pth.1{TEMPORARY}").write_text("half")
    mine = {"notes.txt", "notes.tmp", "model_0000007.pth.tmp", "model_teacher.pth"}
    for name in mine:
        (run_folder / name).write_text("mine")
    claim_folder(cfg, resume=False, overwrite=True)
    (run_folder / "run").rmdir()  # of make_cfg
    before = {path.name for path in run_folder.iterdir()}
    assert before == mine | {".lock", "last_checkpoint", "results.json"} | {
        *("metrics.json", FINAL, THIRD, FIRST)
    }
    with pytest.raises(KeyError), replacing_run(cfg.OUTPUT_DIR, overwrite=True):
        raise KeyError("a teacher that does not fit")
    with replacing_run(cfg.OUTPUT_DIR, overwrite=False):
        pass
    assert {path.name for path in run_folder.iterdir()} == before
    with open(metrics, "a") as writer:
        with replacing_run(cfg.OUTPUT_DIR, overwrite=True):
            (run_folder / "events.out.tfevents.new").touch()
        writer.write("new")
    left = {path.name for path in run_folder.iterdir()}
    assert left == mine | {".lock", "metrics.json", "events.out.tfevents.new"}
    assert metrics.read_text() == "new"
    claim_folder(cfg, resume=False)
    release_folder(cfg.OUTPUT_DIR)


def test_a_failed_start_takes_back_what_it_wrote(tmp_path):
    """An error, also Ctrl-C, before the first step; what others wrote stays."""
    old, new = tmp_path / "old", tmp_path / "a" / "new"
    old.mkdir()
    (old / "config.yaml").write_text("old")
    (old / "log.txt").write_text("old\n")
    for folder, left in ((old, {"config.yaml", "log.txt", "mine.txt"}), (new, {"mine.txt"})):
        before = FolderBefore(str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        with pytest.raises(KeyboardInterrupt), before.restored_on_error():
            for name in (".lock", "config.yaml", "log.txt.rank1", "events.out.tfevents.1"):
                (folder / name).write_text("new")
            (folder / "mine.txt").touch()
            raise KeyboardInterrupt
        assert {path.name for path in folder.iterdir()} == left
    assert (old / "config.yaml").read_text() == "old"
    (new / "mine.txt").unlink()
    new.rmdir()
    new.parent.rmdir()
    before = FolderBefore(str(new))
    with pytest.raises(ValueError), before.restored_on_error():
        (new / "nothing").parent.mkdir(parents=True)
        raise ValueError
    assert not new.parent.exists() and tmp_path.exists()
    with before.restored_on_error():
        new.mkdir(parents=True)
        (new / "log.txt").touch()
    assert (new / "log.txt").exists()


@pytest.mark.parametrize("was_there", [True, False])
def test_an_evaluation_leaves_the_config_of_the_run(make_cfg, tmp_path, was_there):
    config = tmp_path / "config.yaml"
    if was_there:
        config.write_text("of the run")
    file = tmp_path / "evaluation.yaml"
    opts = ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", ("tests_trees_val",)]
    file.write_text(make_cfg("faster_rcnn", opts).dump())
    args = train_command.argument_parser().parse_args(["--config-file", str(file), "--eval-only"])
    training.setup(args)
    assert (config.read_text() == "of the run") == was_there


def test_a_failed_evaluation_leaves_the_files_of_a_run_that_is_at_work(tmp_path):
    before = FolderBefore(str(tmp_path))
    hold = "import fcntl, sys; f = open('.lock', 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print()"
    command = [sys.executable, "-c", f"{hold}; sys.stdout.flush(); sys.stdin.read()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as run:
        run.stdout.readline()
        (tmp_path / "metrics.json").write_text("its own")
        with pytest.raises(ValueError), before.restored_on_error():
            raise ValueError
        run.stdin.close()
    assert (tmp_path / "metrics.json").read_text() == "its own"


def test_a_run_that_is_refused_removes_nothing(make_cfg, run_folder):
    half = run_folder / f"model_0000007.pth.1{TEMPORARY}"
    half.touch()
    cfg = make_cfg("faster_rcnn", ["OUTPUT_DIR", str(run_folder)])
    with pytest.raises(ValueError, match="has checkpoints of an earlier run"):
        claim_folder(cfg, resume=False)
    assert half.exists()
    claim_folder(cfg, resume=True)
    assert not half.exists()
    release_folder(cfg.OUTPUT_DIR)


@pytest.mark.parametrize(
    "options",
    [
        ["MODEL.WEIGHTS"],
        ["MODEL.TORCHVISION.WEIGHTS"],
        ["MOKD.TEACHER.WEIGHTS"],
        ["MOKD.TEACHER.WEIGHTS", "", "MOKD.TEACHER.OPTS"],  # of the teacher's own config
    ],
)
def test_what_a_new_run_needs_is_not_overwritten(make_cfg, run_folder, monkeypatch, options):
    monkeypatch.setenv("HOME", str(run_folder.parent))
    path = str(run_folder / THIRD)
    if options[-1] == "MODEL.TORCHVISION.WEIGHTS":
        path = f"~/{run_folder.name}/{THIRD}"
    value = ["MODEL.WEIGHTS", path] if options[-1] == "MOKD.TEACHER.OPTS" else path
    cfg = make_cfg("mokd", ["OUTPUT_DIR", str(run_folder), *options, value])
    with pytest.raises(ValueError, match="--overwrite would remove '.*model_0000003.pth', which t"):
        claim_folder(cfg, resume=False, overwrite=True)
    assert (run_folder / THIRD).exists()
    release_folder(cfg.OUTPUT_DIR)


@pytest.mark.parametrize(
    "iteration, left",
    [
        (299, ["0000199", "0000299", "0000899", "final"]),  # of 899 before it was resumed from 199
        (899, ["0000299", "0000899", "final"]),
        (12345678, ["0000899", "12345678", "final"]),  # by number, not by letter
    ],
)
def test_the_newest_checkpoints_up_to_this_step_are_kept(tmp_path, iteration, left):
    run = RunCheckpointer(torch.nn.Linear(1, 1), str(tmp_path), run=torch.nn.Identity())
    for name in ("0000099", "0000199", "0000299", "0000899", "final"):
        save(tmp_path, f"model_{name}.pth", 0)
    PeriodicCheckpointer(run, 1, 2).step(iteration)
    assert checkpoints_in(str(tmp_path)) == sorted(f"model_{name}.pth" for name in left)
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{iteration:07d}.pth"


LOCKED = """
import fcntl, os, sys
f = open(sys.argv[1], "a+")
fcntl.lockf(f, fcntl.LOCK_EX)
f.write(f"process {os.getpid()} on here")
f.flush()
print("locked", flush=True)
sys.stdin.read()
"""


def test_two_runs_at_once_are_refused_until_the_first_is_dead(make_cfg, tmp_path):
    cfg = make_cfg("faster_rcnn")
    command = [sys.executable, "-c", LOCKED, f"{cfg.OUTPUT_DIR}/.lock"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        other.stdout.readline()
        for resume in (False, True):
            with pytest.raises(ValueError, match=f"in use .* .process {other.pid} on here.: wait"):
                claim_folder(cfg, resume)
        other.kill()
    claim_folder(cfg, resume=False)
    claim_folder(cfg, resume=False)  # its own
    with subprocess.Popen(command, **pipes) as other:
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.5)
        release_folder(cfg.OUTPUT_DIR)
        assert other.stdout.readline()
        other.kill()


def test_a_folder_that_cannot_be_written_is_one_message(make_cfg, tmp_path):
    (tmp_path / "file").write_text("")
    cfg = make_cfg("faster_rcnn", ["OUTPUT_DIR", str(tmp_path / "file/run")])
    with pytest.raises(ValueError, match="OUTPUT_DIR '.*file/run' cannot be written .Not a direct"):
        claim_folder(cfg, resume=False)


def test_errors_of_other_files_stay(tmp_path):
    with pytest.raises(FileNotFoundError), output_errors(str(tmp_path)):
        open("no/image.jpg")
    with pytest.raises(FileNotFoundError), output_errors(str(tmp_path)):
        open(tmp_path / "weights.pth")  # of a folder that is still there
    with pytest.raises(SystemExit, match="'.*a/b' could not be written .No such file.*--resume"):
        with output_errors(str(tmp_path / "a")):
            open(tmp_path / "a/b", "w")


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SOLVER.OPTIMIZER", "AdamW"], "SOLVER.OPTIMIZER was 'SGD' and is 'AdamW' now"),
        (["SOLVER.IMS_PER_BATCH", 4], "SOLVER.IMS_PER_BATCH was 8 and is 4 now"),
        (
            ["MODEL.CLASSIFIER.NAME", "mobilenet_v3_small"],
            "MODEL.CLASSIFIER.NAME was 'shufflenet_v2_x0_5' and is 'mobilenet_v3_small' now",
        ),
    ],
)
def test_another_run_cannot_be_resumed(make_digits_cfg, opts, message):
    before = RunIdentity(make_digits_cfg()).state_dict()
    with pytest.raises(ValueError, match=f"cannot go on: {message}.*Start a new run"):
        RunIdentity(make_digits_cfg(opts)).load_state_dict(before)
    with pytest.raises(ValueError, match=f"{message}.*differ: SOLVER.BASE_LR was 0.02 and is 0.5"):
        RunIdentity(make_digits_cfg([*opts, "SOLVER.BASE_LR", 0.5])).load_state_dict(before)


def test_another_teacher_cannot_be_resumed(make_digits_cfg, tmp_path):
    cfg = make_digits_cfg()
    before = RunIdentity(cfg).state_dict()
    path = tmp_path / "moved.pth"
    path.write_bytes(Path(cfg.MOKD.TEACHER.WEIGHTS).read_bytes())
    cfg.MOKD.TEACHER.WEIGHTS = str(path)
    RunIdentity(cfg).load_state_dict(before)
    save(tmp_path, "moved.pth", 0)
    with pytest.raises(ValueError, match="cannot go on: the teacher's weights are others"):
        RunIdentity(cfg).load_state_dict(before)


OTHERS = "cannot go on: the teacher's weights are others"


@pytest.mark.parametrize("config", ["mokd", "digits"])
def test_weights_that_the_teachers_config_names_are_compared(
    make_cfg, make_digits_cfg, tmp_path, config
):
    path = tmp_path / "own.pth"
    opts = ["MOKD.TEACHER.WEIGHTS", "", "MOKD.TEACHER.OPTS", ["MODEL.WEIGHTS", str(path)]]
    cfg = make_digits_cfg(opts) if config == "digits" else make_cfg(config, opts)
    save(tmp_path, "own.pth", 0)
    before = RunIdentity(cfg).state_dict()
    RunIdentity(cfg).load_state_dict(before)
    save(tmp_path, "own.pth", 1)
    with pytest.raises(ValueError, match=f"{OTHERS} .SHA-256"):
        RunIdentity(cfg).load_state_dict(before)


def test_networks_of_a_library_are_compared_by_name(make_digits_cfg):
    opts = ["MOKD.TEACHER.CONFIG_FILE", "", "MOKD.TEACHER.WEIGHTS", "DEFAULT"]
    before, now = (
        RunIdentity(make_digits_cfg([*opts, "MOKD.TEACHER.CLASSIFIER", name]))
        for name in ("resnet18", "resnet50")
    )
    before.load_state_dict(before.state_dict())
    with pytest.raises(ValueError, match=f"{OTHERS} .resnet18 DEFAULT before, resnet50 DEFAULT n"):
        now.load_state_dict(before.state_dict())


def test_other_classes_cannot_be_resumed(make_digits_cfg):
    before = RunIdentity(make_digits_cfg()).state_dict()
    assert before["class_names"] == [str(digit) for digit in range(10)]
    before["class_names"] = before["class_names"][::-1]
    with pytest.raises(ValueError, match="cannot go on: its classes were .'9', '8'.*Start a new"):
        RunIdentity(make_digits_cfg()).load_state_dict(before)


def test_what_changes_in_a_resumed_run_is_said(make_digits_cfg, caplog):
    before = RunIdentity(make_digits_cfg()).state_dict()
    free = ["SEED", 1, "OUTPUT_DIR", "x", "DATALOADER.NUM_WORKERS", 2, "TEST.EVAL_PERIOD", 9]
    RunIdentity(make_digits_cfg(free)).load_state_dict(before)
    assert not caplog.records
    RunIdentity(make_digits_cfg(["SOLVER.BASE_LR", 0.5])).load_state_dict(before)
    assert "SOLVER.BASE_LR was 0.02 and is 0.5 now" in caplog.text
    caplog.clear()
    RunIdentity(make_digits_cfg()).load_state_dict({**before, "world_size": 2})
    assert "had 2 processes and goes on with 1" in caplog.text
    caplog.clear()
    RunIdentity(make_digits_cfg()).load_state_dict({})
    assert "an earlier version wrote it" in caplog.text


DIGITS = ["SOLVER.MAX_ITER", 5, "DATASETS.TEST", (), "MOKD.FEATURES.DIM", 32]
DIGITS += ["INPUT.CLASSIFICATION.SIZE_TRAIN", 32, "SOLVER.CHECKPOINT_PERIOD", 1]


def test_a_run_that_was_killed_before_its_end_had_its_name(make_digits_cfg):
    cfg = make_digits_cfg(DIGITS)
    train(cfg)
    whole = final(cfg)
    folder = Path(cfg.OUTPUT_DIR)
    (folder / "model_final.pth").unlink()
    (folder / "last_checkpoint").write_text("model_0000004.pth")
    train(cfg, resume=True)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert all(torch.equal(v, final(cfg)["model"][k]) for k, v in whole["model"].items())
    assert final(cfg)["iteration"] == final(cfg)["trainer"]["iteration"] == 4


def final(cfg):
    return torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)


def assert_same_end(first, second):
    first, second = final(first), final(second)
    for key, value in first["model"].items():
        assert torch.equal(value, second["model"][key]), key


def test_a_run_goes_on_past_a_damaged_checkpoint(make_digits_cfg, caplog):
    whole = make_digits_cfg(DIGITS, "whole")
    train(whole)
    cfg = make_digits_cfg([*DIGITS, "SOLVER.KEEP_CHECKPOINTS", 2], "damaged")
    train_and_stop(cfg, 4)
    folder = Path(cfg.OUTPUT_DIR)
    kept = sorted(path.name for path in folder.glob("*.pth"))
    assert kept == ["model_0000002.pth", "model_0000003.pth"]
    flip(folder / "model_0000003.pth")
    seed_all_rng(0)
    assert train(cfg, resume=True).start_iter == 3
    assert "model_0000003.pth: its checksum does not match" in caplog.text
    assert_same_end(whole, cfg)
    kept = sorted(path.name for path in folder.glob("*.pth"))
    assert kept == ["model_0000003.pth", "model_0000004.pth", "model_final.pth"]
    with pytest.raises(ValueError, match="has checkpoints of an earlier run"):
        train(cfg)
    assert_same_end(whole, cfg)


def test_another_architecture_of_the_same_name_cannot_be_resumed(make_digits_cfg):
    cfg = make_digits_cfg([*DIGITS, "SOLVER.MAX_ITER", 1])
    train(cfg)
    state = final(cfg)
    del state["model"]["fc.bias"]
    state["model"]["fc.weight"] = state["model"]["fc.weight"][:5]
    save_checkpoint(state, f"{cfg.OUTPUT_DIR}/model_final.pth")
    trainer = build_trainer(cfg)
    with pytest.raises(
        ValueError, match="of another architecture: 2 weights are missing or differ"
    ):
        trainer.resume_or_load(True)


def test_damaged_weights_are_not_started_from(make_digits_cfg, tmp_path):
    save(tmp_path, "w.pth", 0)
    flip(tmp_path / "w.pth")
    trainer = build_trainer(make_digits_cfg([*DIGITS, "MODEL.WEIGHTS", str(tmp_path / "w.pth")]))
    with pytest.raises(ValueError, match="w.pth' is damaged .its checksum does not match"):
        trainer.resume_or_load(False)


def test_a_stock_run_has_whole_checkpoints_that_detectron2_resumes(make_cfg):
    opts = ["SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1]
    cfg = make_cfg("faster_rcnn", opts)
    trainer = train(cfg)
    flip(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    ours = build_trainer(cfg)
    ours.resume_or_load(True)  # the last step once more, as model_final.pth is none
    assert ours.start_iter == 2
    Path(cfg.OUTPUT_DIR, "last_checkpoint").write_text("model_0000001.pth")
    stock = DefaultTrainer(cfg)
    stock.resume_or_load(True)
    assert stock.start_iter == 2
    for other in (ours, stock):
        for key, value in trainer.model.state_dict().items():
            assert torch.equal(value, other.model.state_dict()[key]), key


@pytest.mark.parametrize("keep", [-1, 1.5])
def test_checkpoints_to_keep_out_of_range(make_cfg, keep):
    with pytest.raises(ValueError, match=f"SOLVER.KEEP_CHECKPOINTS is {keep}: expected an inte"):
        cfg = make_cfg("faster_rcnn")
        cfg.SOLVER.KEEP_CHECKPOINTS = keep
        validate(cfg)
