"""Runs the jobs of a table in processes of their own, several at a time, and shows where each of them is."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from opd.console import CONSOLE, say
from opd.errors import Interrupted
from opd.progress import duration

TAIL = 4000  # bytes at the end of a log in which its last line and its last update are looked for
SHORT = 40  # characters of a job's state, so that several jobs fit into a line


@dataclass(frozen=True)
class Job:
    """What one process does: a seed with all of its arms, or one arm of it."""

    seed: int
    arm: str | None = None

    @property
    def label(self) -> str:
        return f"seed {self.seed}: {self.arm}" if self.arm else f"seed {self.seed}"

    @property
    def arguments(self) -> list[str]:
        return ["--only-seed", str(self.seed), *(["--only-arm", self.arm] if self.arm else [])]

    def log(self, folder: Path) -> Path:
        return folder / (f"seed_{self.seed}-{self.arm.replace(' ', '-')}.log" if self.arm else f"seed_{self.seed}.log")


@dataclass(eq=False)
class Running:
    """A job at work, as a row of the console. Its process tells where it is in its log."""

    job: Job
    child: subprocess.Popen
    gpu: str | None  # the one GPU that it sees; None: all that there are
    log: Path
    log_begin: int  # bytes that earlier processes have left in the log
    begin: float
    row: ExitStack = field(default_factory=ExitStack)

    @property
    def label(self) -> str:
        return self.job.label

    def fraction(self) -> float | None:
        updates = re.findall(r"\bupdate (\d+)/(\d+)", self._tail())
        return int(updates[-1][0]) / int(updates[-1][1]) if updates else None

    def state(self) -> str:
        last = next((line for line in reversed(self._tail().splitlines()) if line.strip()), "starting")
        last = last.removeprefix(f"{(self.job.arm or '').replace(' ', '-')}: ")
        return textwrap.shorten(last, SHORT, placeholder=" ...")

    def _tail(self) -> str:
        """The last lines that this job's process has written."""
        with self.log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self.log_begin, end - TAIL))
            return file.read().decode(errors="replace")


class AllJobs:
    """All jobs together, as the first row of the console.

    What is left is told once a job has ended: every other one takes as long as the longest until then.
    """

    label = "all runs"

    def __init__(self, count: int, at_once: int, clock: Callable[[], float] = time.monotonic):
        self.count, self.at_once, self.clock = count, at_once, clock
        self.running: list[Running] = []
        self.seconds: list[float] = []  # of the jobs that have ended

    def fraction(self) -> float | None:
        return (len(self.seconds) + sum(job.fraction() or 0.0 for job in tuple(self.running))) / self.count

    def left(self) -> float | None:
        """Seconds; None before a job has ended."""
        if not self.seconds:
            return None
        each, running = max(self.seconds), tuple(self.running)
        waiting = self.count - len(self.seconds) - len(running)
        rest = waiting * each + sum(max(0.0, each - (self.clock() - job.begin)) for job in running)
        return rest / max(1, min(self.at_once, waiting + len(running)))

    def state(self) -> str:
        left = self.left()
        done = f"{len(self.seconds)} of {self.count} have ended"
        return done if left is None else f"{done}, {duration(left)} left"


def run_jobs(arguments: Sequence[str], jobs: Sequence[Job], at_once: int, logs: Path) -> int:
    """Runs `tip.reproduce` with these arguments for every job, several `at_once`; returns how many failed.

    Where there are GPUs and several jobs at once, each process sees one GPU of its own. With engine.kind deepspeed a
    job is a group of processes on all GPUs. What a job says goes to a log of its own, and what it prints, such as the
    end of an arm, to our stderr. A signal is forwarded to all jobs, and no further job starts.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, failed = list(jobs), 0
    every = AllJobs(len(jobs), at_once)
    free = (_visible_gpus() if at_once > 1 else [])[:at_once] or [None] * at_once
    say(f"the messages of each job go to {logs}")
    with CONSOLE.show(every), _signals_forwarded(every) as signals:
        while every.running or (waiting and not signals):
            while waiting and free and not signals:
                started = _start(arguments, waiting.pop(0), free.pop(0), logs)
                every.running.append(started)
                started.row.enter_context(CONSOLE.show(started))
                say(f"{started.label} started")
            for ended in [running for running in every.running if _has_ended(running)]:
                every.running.remove(ended)
                every.seconds.append(time.monotonic() - ended.begin)
                ended.row.close()
                free.append(ended.gpu)
                if ended.child.returncode and not signals:
                    failed += 1
                    say(f"{ended.label} ended with exit code {ended.child.returncode}; see {ended.log}")
    if signals:
        raise Interrupted(signals[0])
    return failed


@contextmanager
def _signals_forwarded(every: AllJobs) -> Iterator[list[int]]:
    """Within it, SIGINT and SIGTERM go to all jobs at work; the list that it gives holds those that came."""
    signals: list[int] = []

    def forward(signum: int, frame: object) -> None:
        signals.append(signum)
        for running in every.running:
            running.child.send_signal(signum)

    previous = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        for running in every.running:  # an exception has ended the loop
            running.row.close()


def _has_ended(running: Running) -> bool:
    try:
        running.child.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return False
    return True


def _visible_gpus() -> list[str]:
    count = torch.cuda.device_count()
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",") if count else []


def _start(arguments: Sequence[str], job: Job, gpu: str | None, logs: Path) -> Running:
    path = job.log(logs)
    with path.open("a") as log:
        log_begin = os.fstat(log.fileno()).st_size
        child = subprocess.Popen(
            [sys.executable, "-m", "opd.launch", "tip.reproduce", *arguments, *job.arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env=os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}),
        )
    threading.Thread(target=_pass_on, args=(child,), daemon=True).start()
    return Running(job, child, gpu, path, log_begin, time.monotonic())


def _pass_on(child: subprocess.Popen) -> None:
    for line in child.stdout:
        say(line.rstrip())
