# Copyright (c) The mokd_det authors.
"""
What all commands have in common: how they end for an error of what they were given, and numbers as
arguments. It imports nothing but Python's own.
"""

import argparse
import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator

# What the code of mokd_det raises for what a user gave, and Python for files and memory of theirs.
# Everything else is a bug, and keeps its traceback.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)
EXIT_CODE = 2  # as argparse's
TIMEOUT = 10.0
QUIET, USUAL, VERBOSE = -1, 0, 1  # what a console shows


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Add the option that every command has."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """Add the option of :func:`mokd_det.engine.launch`."""
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="MINUTES",
        help="of several processes: end when one has not answered for so long (%(default)s)",
    )


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add ``-v`` and ``-q``, which set ``args.verbosity``."""
    group = parser.add_mutually_exclusive_group()
    for flags, value, what in (
        (("-v", "--verbose"), VERBOSE, "print all that log.txt has: config, models, weights"),
        (("-q", "--quiet"), QUIET, "print warnings and results only"),
    ):
        group.add_argument(
            *flags, action="store_const", dest="verbosity", const=value, default=USUAL, help=what
        )


def positive(text: str) -> int:
    """The type of an argument that counts something."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


@contextlib.contextmanager
def errors_as_messages(debug: bool) -> Iterator[None]:
    """
    Within it, an error of what the user gave ends the program with its message alone on stderr,
    exit code 2. With ``debug`` the traceback stays. What several processes find alike is said once.
    """
    with contextlib.nullcontext() if debug else _quiet_consoles():
        try:
            yield
        except USER_ERRORS as error:
            if debug:
                raise
            _log_traceback()
            text = message_of(error)
            with contextlib.suppress(ImportError):  # of torch, which is what the error is about
                from .untrusted import printable

                # Parts of it may come from a file: no control characters for the terminal.
                text = "\n".join(map(printable, text.splitlines()))
            if _is_first_to_say(text):
                who = os.path.basename(sys.argv[0])
                print(f"{who}: {text}\n(--debug shows where)", file=sys.stderr, flush=True)
            sys.exit(EXIT_CODE)


def message_of(error: BaseException) -> str:
    """Return an error's own message: torch's data loaders put a worker's traceback around it."""
    text = str(error)
    if not re.match(r"Caught \w+ in DataLoader worker process", text):
        return text or type(error).__name__
    # The last line of the traceback that begins with the error's name, and what follows.
    start = rf"^(?:\w+\.)*{type(error).__name__}(?:: |$)"
    *_, last = re.finditer(start, text, re.MULTILINE)
    return text[last.end() :].strip() or type(error).__name__


def _log_traceback() -> None:
    """Write that of the error which is being handled to log.txt, if there is one."""
    shows = logging.raiseExceptions
    logging.raiseExceptions = False  # a log that cannot be written is not what is to be said
    try:
        with _quiet_consoles():  # those that have come meanwhile, too
            logging.getLogger("mokd_det").debug("An error:", exc_info=True)
    finally:
        logging.raiseExceptions = shows


def _is_first_to_say(text: str) -> bool:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        # Of what processes find before they are connected each machine's have the same.
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        store = distributed.distributed_c10d._get_default_store()
        return store.add(f"said: {text}", 1) == 1
    except RuntimeError:  # the process that keeps the store is gone, whatever it said
        return True


def console_handlers() -> set[logging.Handler]:
    """Return the handlers of all loggers that print."""
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    return {
        handler
        for logger in loggers
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and not _writes_file(handler)
    }


@contextlib.contextmanager
def _quiet_consoles() -> Iterator[None]:
    """
    Within it, loggers write tracebacks to files only: Detectron2's trainer logs that of any error,
    which is printed again if it is a bug.
    """
    consoles = console_handlers()
    for handler in consoles:
        handler.addFilter(_has_no_traceback)
    try:
        yield
    finally:
        for handler in consoles:
            handler.removeFilter(_has_no_traceback)


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


def _writes_file(handler: logging.StreamHandler) -> bool:
    # Detectron2's log.txt is a stream, opened by iopath.
    return handler.stream not in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
