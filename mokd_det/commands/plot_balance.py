# Copyright (c) The mokd_det authors.
"""
Draw conflict, dominance, weights and shares of one or several runs, side by side, as one PNG.

Example:
  mokd plot-balance output/quick_start/student_mokd --output balance.png
  mokd plot-balance output/loss_ratio output/min_norm --output both.png

Reads balance.json of each run. Thin lines are its values, means of 20 steps; thick ones their
running median. "seen" is what the rule saw, where that is not the batch: smoothed. Axes of weights
and dominance are logarithmic, and linear near zero. Each title counts the steps in which the rule
was not asked.
"""

import argparse

from ..command_line import add_debug


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--output", default="balance.png", help="PNG to write (%(default)s)")
    add_debug(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Draw, and print the name of the file."""
    from ..report import plot_balance

    plot_balance(args.run_dirs, args.output)
    print(args.output)
