# Copyright (c) The mokd_det authors.
"""``mokd COMMAND ...``: finds the command, and runs it."""

import argparse
import difflib
import importlib
import sys

from .. import __version__
from ..command_line import EXIT_CODE, errors_as_messages, import_modules

# Each is a module of this folder (with "_" for "-") that has ``argument_parser()`` and
# ``run(args)``, which returns the exit code.
COMMANDS = {
    "doctor": "check the installation and, with a config, whether its training would run",
    "init": "write the configs of a distillation on your own data, ready to train",
    "train": "train or evaluate a model, with distillation if its config says so",
    "predict": "find objects in photos, or name their classes, with a trained model",
    "export": "write the plain student for deployment, and compare the file with it",
    "check-data": "check data sets before training",
    "visualize": "draw ground truth and predictions of several detectors side by side",
    "report": "write one HTML page on runs: results, curves, balance, pictures",
    "plot-balance": "draw conflict, dominance and weights of runs",
}


def main() -> None:
    """The console script: run the command that the first argument names."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="mokd",
        description="Knowledge distillation for Detectron2 and torchvision.",
        epilog="commands:\n"
        + "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
        + "\n\nmokd COMMAND --help has the arguments of each, with examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mokd_det {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of these")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    args = parser.parse_args()
    if args.command not in COMMANDS:
        close = difflib.get_close_matches(args.command, COMMANDS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(COMMANDS)}."
        print(f"mokd: there is no command '{args.command}': {hint}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    sys.argv = [f"mokd {args.command}", *args.arguments]  # the name is that of its messages, too
    call(args.command)


def call(name: str) -> None:
    """Run a command with the arguments of this process, and end with its exit code."""
    command = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    args = command.argument_parser().parse_args()
    with errors_as_messages(args.debug):
        if names := getattr(args, "imports", ()):
            from .. import compat  # noqa: F401  (first: they may import Detectron2)

            import_modules(names)
        code = command.run(args)
    sys.exit(code)
