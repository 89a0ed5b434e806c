# Copyright (c) The mokd_det authors.
"""
Write one HTML file on one or several runs, side by side: results, speed and size, losses and
metrics, the balance of the objectives, options that differ, pictures on which predictions differ.

Examples:
  mokd report output/my_student
  mokd report output/my_student output/my_scratch output/my_teacher --output report.html

A RUN is the OUTPUT_DIR of a training. The file needs no network and no other file.
"""

import argparse

from ..command_line import add_debug, add_imports, import_modules


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="OUTPUT_DIR of a training")
    parser.add_argument("--output", default="report.html", help="file to write (%(default)s)")
    parser.add_argument(
        "--pictures", type=int, default=6, metavar="N", help="of each data set (%(default)s)"
    )
    parser.add_argument(
        "--score", type=float, default=0.5, help="least score of a detection shown (%(default)s)"
    )
    add_imports(parser)
    add_debug(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Write the page, and print its name."""
    from ..report import write_report

    import_modules(args.imports)
    write_report(args.runs, args.output, args.pictures, args.score)
    print(args.output)
