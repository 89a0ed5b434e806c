# Copyright (c) The mokd_det authors.
"""Starting one process or several, as Detectron2 and under torchrun; and how a start fails."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm

from ..config import load_config
from ..untrusted import printable

T = TypeVar("T")


@contextlib.contextmanager
def errors_as_messages(debug: bool) -> Iterator[None]:
    """
    Within it, an error of what the user gave ends the program with its message alone, exit code 1;
    with ``debug`` the traceback stays.
    """
    try:
        yield
    except (ValueError, FileNotFoundError, ImportError) as error:
        if debug:
            raise
        # Parts of it may come from a file: no control characters for the terminal.
        text = "\n".join(map(printable, str(error).splitlines()))
        sys.exit(f"{os.path.basename(sys.argv[0])}: {text}\n(--debug shows where)")


def launch(main: Callable[[Any], Any], args: argparse.Namespace) -> Any:
    """
    Run ``main(args)``, of Detectron2's ``default_argument_parser``, in every process.

    Under ``torchrun`` the processes exist already (the only way for several on the CPU, since
    Detectron2's own launcher insists on CUDA); else Detectron2's launcher starts them.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        machines = args.num_machines, args.machine_rank, args.dist_url
        return detectron2_launch(main, args.num_gpus, *machines, args=(args,))
    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    with errors_as_messages(getattr(args, "debug", False)):
        device = load_config(args.config_file, args.opts).MODEL.DEVICE
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()  # if there is none: main's
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        _create_local_process_group(local_ranks)
        return main(args)
    finally:
        dist.destroy_process_group()


def _create_local_process_group(local_ranks):
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(local_ranks)
        return
    # Detectron2 0.6 has this inside its launcher only.
    for first in range(0, dist.get_world_size(), local_ranks):
        ranks = list(range(first, first + local_ranks))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def on_main_process(function: Callable[..., T], *args: Any) -> T:
    """
    Return ``function(*args)`` of the main process, to be called by all. A ValueError or
    FileNotFoundError that it raises there is raised in all of them: none waits for the others.
    """
    result, error = None, None
    if comm.is_main_process():
        try:
            result = function(*args)
        except (ValueError, FileNotFoundError) as raised:
            error = raised
    result, error = comm.all_gather((result, error))[0]
    if error is not None:
        raise error
    return result
