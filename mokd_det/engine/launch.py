# Copyright (c) The mokd_det authors.
"""Starting one process or several, as Detectron2 and under torchrun; and how they end together."""

import argparse
import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch.distributed.rendezvous import rendezvous

from ..command_line import errors_as_messages
from ..config import load_config

T = TypeVar("T")

RESTARTS = "TORCHELASTIC_RESTART_COUNT"
MOST_MINUTES = 1_000_000
# Of gloo and NCCL, where another process is dead or silent.
LOST = ("Timed out waiting", "timed out", "Connection closed by peer", "Connection reset by peer")


def launch(main: Callable[[Any], Any], args: argparse.Namespace, device: str | None = None) -> Any:
    """
    Run ``main(args)``, of Detectron2's ``default_argument_parser`` with ``timeout``, in every
    process. If one dies or hangs, all end: at once, or after ``args.timeout`` minutes. ``device``:
    default MODEL.DEVICE of the config.

    Under ``torchrun`` the processes exist already (the only way for several on the CPU, since
    Detectron2's own launcher insists on CUDA); else Detectron2's launcher starts them.
    """
    debug = getattr(args, "debug", False)
    is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    with errors_as_messages(debug):
        _check_arguments(args, is_torchrun)
        device = device or load_config(args.config_file, args.opts).MODEL.DEVICE
    timeout = datetime.timedelta(minutes=args.timeout)
    if not is_torchrun:
        machines = args.num_machines, args.machine_rank, args.dist_url
        try:
            return detectron2_launch(main, args.num_gpus, *machines, args=(args,), timeout=timeout)
        except mp.ProcessExitedException as error:  # it has said why
            sys.exit(error.exit_code if error.exit_code > 0 else 1)
    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()  # if there is none: main's
    if on_gpu:
        torch.cuda.set_device(local_rank)
    store, rank, ranks = next(rendezvous("env://", timeout=timeout))
    # torchrun without --rdzv-backend keeps the store when it restarts the processes, and with it
    # the addresses of the dead ones.
    store = dist.PrefixStore(f"start_{os.environ[RESTARTS]}", store)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    try:
        with _lost_processes_named(args.timeout, debug):
            _create_local_process_group(local_ranks, timeout)
            return main(args)
    finally:
        dist.destroy_process_group()


def _check_arguments(args: argparse.Namespace, is_torchrun: bool) -> None:
    for name, least in (("num_gpus", 0), ("num_machines", 1), ("machine_rank", 0)):
        if (value := getattr(args, name)) < least:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {value}: expected {least} or more.")
    if not 0 < args.timeout < MOST_MINUTES:
        raise ValueError(
            f"--timeout is {args.timeout}: expected minutes above 0, and below {MOST_MINUTES}."
        )
    if args.machine_rank >= args.num_machines:
        raise ValueError(
            f"--machine-rank is {args.machine_rank}: expected less than --num-machines "
            f"({args.num_machines})."
        )
    if not is_torchrun and args.num_gpus > max(torch.cuda.device_count(), 1):
        raise ValueError(
            f"--num-gpus is {args.num_gpus}, but torch sees {torch.cuda.device_count()} GPUs: give "
            "no more. Several processes on the CPU are torchrun's: torchrun --nproc-per-node 2 ..."
        )
    restarts = os.environ.get(RESTARTS, "0")
    if restarts != "0" and not (getattr(args, "resume", True) or args.eval_only):
        raise ValueError(
            f"torchrun has restarted this job (restart {restarts}, --max-restarts), and without "
            "--resume it would begin anew: add --resume, also to its first start."
        )


@contextlib.contextmanager
def _lost_processes_named(minutes: float, debug: bool) -> Iterator[None]:
    """What gloo and NCCL say of a process that is gone, as one message."""
    try:
        yield
    except RuntimeError as error:
        if debug or not any(words in str(error) for words in LOST):
            raise
        print(
            f"{os.path.basename(sys.argv[0])} (process {dist.get_rank()}): another process has "
            f"died, or has not answered for {minutes:g} minutes (--timeout). Its own message, if "
            f"it had one, is above; --resume goes on from the last checkpoint.\n({error})",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)


def _create_local_process_group(local_ranks: int, timeout: datetime.timedelta) -> None:
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(local_ranks)
        return
    # Detectron2 0.6 has this inside its launcher only.
    for first in range(0, dist.get_world_size(), local_ranks):
        ranks = list(range(first, first + local_ranks))
        group = dist.new_group(ranks, timeout=timeout)
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
