# Copyright (c) The mokd_det authors.
"""``mokd doctor``: what is installed, and on what machine. Imports nothing that may be missing."""

import contextlib
import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from .. import __version__
from ..command_line import USER_ERRORS, message_of

GIB = 2**30
# Name of a module -> distributions that have it.
LIBRARIES = {
    "torch": ["torch"],
    "torchvision": ["torchvision"],
    "detectron2": ["detectron2", "pb1-detectron2"],
}


class Findings:
    """Prints what is found, a line each, and counts the problems."""

    def __init__(self, debug: bool = False):
        """``debug``: errors are raised, not printed."""
        self.problems = 0
        self._debug = debug

    def say(self, what: str, found: object) -> None:
        print(f"{what:12} {found}", flush=True)

    def problem(self, message: str) -> None:
        self.problems += 1
        self.say("PROBLEM", " ".join(message.split()))

    @contextlib.contextmanager
    def part(self, *others: type[Exception]) -> Iterator[None]:
        """Within it, an error of what the user gave, or one of ``others``, is a problem."""
        kinds: tuple[type[Exception], ...] = (*USER_ERRORS, *others)
        try:
            yield
        except kinds as error:
            if self._debug:
                raise
            self.problem(message_of(error))


def check_installation(findings: Findings) -> bool:
    """Say what is installed, and return whether it can be used."""
    before = findings.problems
    findings.say("mokd_det", f"{__version__} in {Path(__file__).resolve().parents[1]}")
    findings.say("python", f"{platform.python_version()} ({sys.executable})")
    for name, distributions in LIBRARIES.items():
        findings.say(name, _version(distributions))
        with findings.part(RuntimeError, AttributeError):  # libraries that do not fit each other
            if name == "detectron2":
                _import_detectron2(findings)
            else:
                _import(name)
    if findings.problems > before:
        return False
    _describe_machine(findings)
    _describe_data(findings)
    return True


def _version(distributions: list[str]) -> str:
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name) + (f" ({name})" * (len(distributions) > 1))
    return "not installed as a package"


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} cannot be imported ({error}): install it as docs/install.md says; torch and "
            "torchvision have to be of one release."
        ) from error


def _import_detectron2(findings: Findings) -> None:
    _import("detectron2")
    importlib.import_module("mokd_det.compat")
    is_compiled = hasattr(sys.modules.get("detectron2._C") or _compiled(), "__file__")
    operators = "loaded" if is_compiled else "not there (rotated boxes and deformable layers do"
    findings.say("", f"compiled operators: {operators}{'' if is_compiled else ' not work)'}")


def _compiled() -> object:
    _import("detectron2._C")
    return sys.modules["detectron2._C"]


def _describe_machine(findings: Findings) -> None:
    import torch

    findings.say("CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        findings.say(f"cuda:{index}", f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    if not torch.cuda.is_available():
        findings.say("GPU", "torch sees none: train with MODEL.DEVICE cpu")
    if "SC_AVPHYS_PAGES" in os.sysconf_names:  # not on macOS
        page = os.sysconf("SC_PAGE_SIZE")
        free, total = (page * os.sysconf(f"SC_{x}PHYS_PAGES") for x in ("AV", ""))
        findings.say("memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free")
    usage = shutil.disk_usage(".")
    findings.say("disk", f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free here")


def _describe_data(findings: Findings) -> None:
    from ..data import datasets_root

    root = datasets_root()
    given = "" if "DETECTRON2_DATASETS" in os.environ else " (DETECTRON2_DATASETS is not set)"
    if not root.is_dir():
        findings.say("data sets", f"no folder {root}{given}")
        return
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    more = f" and {len(names) - 20} more" * (len(names) > 20)
    findings.say("data sets", f"in {root}{given}: {', '.join(names[:20]) or 'none'}{more}")
