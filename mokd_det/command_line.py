# Copyright (c) The mokd_det authors.
"""
What all commands have in common: how they end for an error of what they were given, and numbers as
arguments. It imports nothing but Python's own.
"""

import argparse
import contextlib
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

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


def add_imports(parser: argparse.ArgumentParser) -> None:
    """Add the option of commands that read a config, for :func:`import_modules`."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import it first: a module or .py file that registers your data sets, models, rules "
        "(may be given several times)",
    )


def import_modules(names: Iterable[str]) -> None:
    """
    Import modules, also of the current folder, and ``.py`` files, each once. FileNotFoundError,
    ValueError: one is not there, or raises an error.
    """
    names = list(names)
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: nothing there hides an installed package
    for name in names:
        try:
            _import_file(name) if name.endswith(".py") else importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise ValueError(f"--import '{name}' failed: {error}.") from error
            raise ValueError(
                f"--import '{name}': there is no module '{error.name}' in '{os.getcwd()}' and in "
                "the environment. Give its name (my_package.my_module) or its file (my_file.py)."
            ) from error
        except FileNotFoundError:
            raise
        except Exception as error:  # whatever its code raises
            kind = type(error).__name__
            raise ValueError(f"--import '{name}' failed: {kind}: {error}") from error


def _import_file(path: str) -> None:
    name = Path(path).stem
    known = getattr(sys.modules.get(name), "__file__", None)
    if known is not None and os.path.samefile(known, path):
        return
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--import '{path}' does not exist.")
    if name in sys.modules:
        raise ValueError(f"there is another module '{name}' already: rename the file")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


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
