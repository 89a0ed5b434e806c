# Copyright (c) The mokd_det authors.
"""The ``mokd`` command, and the doors to it in tools/."""

import subprocess
import sys

import pytest

from mokd_det.commands import export, main, train

from ..conftest import ROOT

# Every help text in one process of its own: which of them imported torch?
ASK_FOR_HELP = """
import contextlib, io, runpy, sys
sys.path.insert(0, "tools")  # as for a script there
for argv in {commands!r}:
    sys.argv, said = list(argv), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_path(argv[0], run_name="__main__")
    assert said.getvalue().startswith("usage: "), argv
    for heavy in ("torch", "detectron2", "cv2", "matplotlib", "numpy"):
        assert heavy not in sys.modules, (argv, heavy)
"""
MOKD = "mokd_det/__main__.py"
SCRIPTS = [p for p in (ROOT / "tools").glob("*.py") if p.read_text().startswith("#!")]
TOOLS = sorted(map(str, SCRIPTS))


def test_help_waits_for_no_library():
    commands = [[MOKD, "--help"], *([MOKD, name, "--help"] for name in main.COMMANDS)]
    commands += [[path, "--help"] for path in TOOLS]
    code = ASK_FOR_HELP.format(commands=commands)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def mokd(monkeypatch, *args):
    """Call it; its exit code."""
    monkeypatch.setattr(sys, "argv", ["mokd", *args])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    return stopped.value.code


@pytest.mark.parametrize(
    "args, message",
    [
        (["trian"], "there is no command 'trian': did you mean 'train'?"),
        (["xyz"], "there is no command 'xyz': there are "),
        ([], "the following arguments are required: COMMAND"),
        (["train", "--config-file", "no.yaml"], "mokd train: --config-file 'no.yaml' does not"),
        (["export", "--output", "x"], "arguments are required: --config-file"),
    ],
)
def test_what_is_wrong_is_one_message(monkeypatch, capsys, args, message):
    assert mokd(monkeypatch, *args) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", main.COMMANDS)
def test_each_has_help_with_an_example(monkeypatch, capsys, name):
    assert mokd(monkeypatch, name, "--help") == 0
    assert f"\n  mokd {name} " in capsys.readouterr().out


def test_the_help_names_each_command(monkeypatch, capsys):
    assert mokd(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said and what in said for name, what in main.COMMANDS.items())


def test_arguments_of_training_begin_with_detectron2s():
    from detectron2.engine import default_argument_parser

    theirs, ours = (
        vars(p.parse_args(["A", "B"])) for p in (default_argument_parser(), train.argument_parser())
    )
    assert theirs.items() <= ours.items()


def test_choices_of_export_are_those_there_are():
    from mokd_det.export import DEFAULT_TOLERANCE, FORMATS, METHODS, PIXELS

    assert set(export.FORMATS) == set(FORMATS) and set(export.METHODS) == set(METHODS)
    assert (export.DEFAULT_TOLERANCE, export.PIXELS) == (DEFAULT_TOLERANCE, PIXELS)
