# Copyright (c) The mokd_det authors.
"""What the demos share: stages of commands, a line for each, that go on where they were stopped."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mokd_det.logs import read_json_lines

ROOT = Path(__file__).resolve().parent.parent
NOT_OVERRIDDEN = ("OUTPUT_DIR", "MODEL.WEIGHTS")
SAVING = 20  # seconds that a training may take to save itself


def check_overrides(configs: Iterable[str], overrides: Sequence[str]) -> None:
    """Raise ValueError for overrides that do not fit the configs, or are not the user's to give."""
    import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)

    from mokd_det.config import load_config

    for option in NOT_OVERRIDDEN:
        if option in overrides[::2]:
            raise ValueError(
                f"{option} cannot be an override: each run of the demo has its own. Leave it out."
            )
    for config in configs:
        load_config(str(ROOT / config), list(overrides))


@contextlib.contextmanager
def stoppable(folder: str) -> Iterator[None]:
    """
    Within it Ctrl-C, SIGTERM and SIGHUP end a demo that writes into ``folder``: a sentence that
    says how to go on, exit code 130.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print(
            "Stopped. To go on, give the same command again: what is done is kept. To start "
            f"anew, remove {folder} first.",
            flush=True,
        )
        raise SystemExit(130) from None


class Stage(NamedTuple):
    """
    Attributes:
        label: what is done.
        commands: arguments of the Python interpreter by a name, run side by side.
        seconds: the usual time on two idle cores.
        runs: OUTPUT_DIR of each command that trains, relative to the repository.
    """

    label: str
    commands: dict[str, list[str]]
    seconds: float
    runs: dict[str, str] = {}


class Demo:
    """
    A demo that writes into a folder and remembers there which commands are done.

    Args:
        folder: relative to the repository. What an earlier demo left there is renamed, unless that
            one was stopped and had the same options: then it goes on.
        options: of the command line.
    """

    def __init__(self, folder: str, options: list[str]) -> None:
        self.folder = ROOT / folder
        self._state: dict[str, Any] = {"options": options, "done": [], "seconds": 0.0}
        if self.folder.exists():
            file = self.folder / "stages.json"
            before = json.loads(file.read_text()) if file.is_file() else {}
            if before.get("options") == options and not (self.folder / "results.json").exists():
                print(f"Going on with the demo in {folder}.", flush=True)
                self._state = before
            else:
                from mokd_det.evaluation.results import set_aside  # here, because it needs torch

                moved = set_aside(self.folder).relative_to(ROOT)
                print(f"What was in {folder} is now in {moved}.", flush=True)
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self._save()

    def run(self, stages: list[Stage]) -> float:
        """
        Run the commands that are not done; return the seconds of all. SystemExit: one failed, and
        the others were stopped.
        """
        todo = []
        for number, stage in enumerate(stages, 1):
            commands = {n: c for n, c in stage.commands.items() if n not in self._state["done"]}
            if commands:
                label = f"[{number}/{len(stages)}] {stage.label}"
                todo.append(stage._replace(label=label, commands=commands))
        progress = Progress(todo)
        for stage in todo:
            self._run_stage(stage, progress)
        return self._state["seconds"]

    def finish(self, results: dict[str, Any]) -> None:
        """Write results.json, with which the demo is complete."""
        (self.folder / "results.json").write_text(json.dumps(results, indent=2))

    def _run_stage(self, stage: Stage, progress: "Progress") -> None:
        start = time.time()
        running: dict[str, subprocess.Popen] = {}
        progress.begin(stage)
        try:
            for name, command in stage.commands.items():
                running[name] = _start(command, self._log(name))
            while running:
                time.sleep(0.2)
                for name in [n for n, process in running.items() if process.poll() is not None]:
                    if running[name].returncode != 0:
                        end = self._log(name).read_text(errors="replace")[-2000:]
                        log = self._log(name).relative_to(ROOT)
                        raise SystemExit(f"\n{stage.label} failed. The end of {log}:\n{end}")
                    del running[name]
                    self._state["done"].append(name)
                    self._save()
                progress.show(min((_share(stage, name, start) for name in running), default=1.0))
        except KeyboardInterrupt:
            print("\nStopping: trainings save what they have.", flush=True)
            raise
        finally:
            _stop(running.values())
            self._state["seconds"] += time.time() - start
            self._save()
        progress.end()

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _save(self) -> None:
        (self.folder / "stages.json").write_text(json.dumps(self._state, indent=2))


class Progress:
    """A line for each stage, with the time that is left in all; a terminal's is kept up to date."""

    def __init__(self, stages: list[Stage]) -> None:
        self._start = time.time()
        self._total = sum(stage.seconds for stage in stages)
        self._done = 0.0  # of the total, in completed stages

    def begin(self, stage: Stage) -> None:
        self._stage, self._began = stage, time.time()
        self._print(f"about {self._left(0.0)} left", "" if sys.stdout.isatty() else "\n")

    def show(self, share: float) -> None:
        """Renew the line when a share of the stage is done."""
        if sys.stdout.isatty():
            self._print(f"{share:.0%}, about {self._left(share)} left")

    def end(self) -> None:
        self._done += self._stage.seconds
        if sys.stdout.isatty():
            self._print(f"done in {time.time() - self._began:.0f} s", "\n")

    def _left(self, share: float) -> str:
        done = self._done + share * self._stage.seconds
        left = self._total - done
        if done > 0.1 * self._total:  # how fast this machine is, is known
            left *= (time.time() - self._start) / done
        return f"{left / 60:.1f} min"

    def _print(self, text: str, end: str = "") -> None:
        back = "\r\x1b[K" if sys.stdout.isatty() else ""
        print(f"{back}{self._stage.label}: {text}", end=end, flush=True)


def _start(command: list[str], log: Path) -> subprocess.Popen:
    # One thread each: commands share the cores, and sums come out the same on any machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C comes to the demo only, which stops all
        )


def _stop(processes: Iterable[subprocess.Popen]) -> None:
    """Stop commands and all that they started. A training saves itself first."""
    processes = list(processes)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            for process in processes:
                process.wait(SAVING)


def _share(stage: Stage, name: str, start: float) -> float:
    """Return which share of a command is done, by what a training logs or by the usual time."""
    spent = time.time() - start
    left = max(stage.seconds - spent, 0.1 * stage.seconds)
    metrics = ROOT / stage.runs[name] / "metrics.json" if name in stage.runs else Path()
    if metrics.is_file() and metrics.stat().st_mtime > start:
        records = [r for r in read_json_lines(str(metrics)) if "eta_seconds" in r]
        left = records[-1]["eta_seconds"] if records else left
    return spent / (spent + left)
