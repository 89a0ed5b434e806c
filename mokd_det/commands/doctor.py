# Copyright (c) The mokd_det authors.
"""
Check the installation and, with a config, whether its training would run, what a step costs and how
long it would take. Nothing is written.

Examples:
  mokd doctor
  mokd doctor --config-file my_student.yaml
  mokd doctor --config-file my_student.yaml SOLVER.IMS_PER_BATCH 8

With a config a few steps are computed (learning rate 0): the student's own and, if it distils, the
whole one, in one process. Each thing that would stop the training is one line that begins with
"PROBLEM"; the exit code is 0 only if there is none.
"""

import argparse

from ..command_line import add_debug, add_imports


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="try its training, too")
    parser.add_argument("--trust", action="store_true", help="run the code in config files")
    add_imports(parser)
    add_debug(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    return parser


def run(args: argparse.Namespace) -> int:
    """Check; return 1 if there are problems."""
    from .installation import Findings, check_installation

    findings = Findings(args.debug)
    if check_installation(findings) and args.config_file:
        from ..config import trust_files
        from .dry_run import check_config

        trust_files(args.trust)
        check_config(args.config_file, args.opts, findings)
    print(f"{findings.problems or 'no'} problem{'s' * (findings.problems != 1)}")
    return int(findings.problems > 0)
