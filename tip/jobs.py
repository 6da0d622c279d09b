"""Runs the parts of a table in processes of their own, several at a time, and shows where each of them is."""

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
SHORT = 40  # characters of a part's state, so that several parts fit into a line


@dataclass(frozen=True)
class Part:
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
    """A part at work, as a row of the console. Its process tells where it is in its log."""

    part: Part
    child: subprocess.Popen
    place: int  # its number among the jobs
    log: Path
    log_begin: int  # bytes that earlier processes have left in the log
    begin: float
    row: ExitStack = field(default_factory=ExitStack)

    @property
    def label(self) -> str:
        return self.part.label

    def share(self) -> float | None:
        updates = re.findall(r"\bupdate (\d+)/(\d+)", self._tail())
        return int(updates[-1][0]) / int(updates[-1][1]) if updates else None

    def state(self) -> str:
        last = next((line for line in reversed(self._tail().splitlines()) if line.strip()), "starting")
        last = last.removeprefix(f"{(self.part.arm or '').replace(' ', '-')}: ")
        return textwrap.shorten(last, SHORT, placeholder=" ...")

    def _tail(self) -> str:
        """The last lines that this part's process has written."""
        with self.log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self.log_begin, end - TAIL))
            return file.read().decode(errors="replace")


class AllParts:
    """All parts together, as the first row of the console.

    What is left is told once a part has ended: every other one takes as long as the longest until then.
    """

    label = "all runs"

    def __init__(self, count: int, jobs: int, clock: Callable[[], float] = time.monotonic):
        self.count, self.jobs, self.clock = count, jobs, clock
        self.running: list[Running] = []
        self.seconds: list[float] = []  # of the parts that have ended

    def share(self) -> float | None:
        return (len(self.seconds) + sum(part.share() or 0.0 for part in tuple(self.running))) / self.count

    def left(self) -> float | None:
        """Seconds; None before a part has ended."""
        if not self.seconds:
            return None
        each, running = max(self.seconds), tuple(self.running)
        waiting = self.count - len(self.seconds) - len(running)
        rest = waiting * each + sum(max(0.0, each - (self.clock() - part.begin)) for part in running)
        return rest / max(1, min(self.jobs, waiting + len(running)))

    def state(self) -> str:
        left = self.left()
        done = f"{len(self.seconds)} of {self.count} have ended"
        return done if left is None else f"{done}, {duration(left)} left"


def run_parts(arguments: Sequence[str], parts: Sequence[Part], jobs: int, logs: Path) -> int:
    """Runs `tip.reproduce` with these arguments for every part, `jobs` at a time; returns how many failed.

    Where there are GPUs and several jobs, each process sees one GPU of its own. With engine.kind deepspeed a part is a
    group of processes on all GPUs. What a part says goes to a log of its own, and what it prints, such as the end of an
    arm, to our stderr. A signal is forwarded to all parts, and no further part starts.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, failed = list(parts), 0
    every = AllParts(len(parts), jobs)
    places = list(range(jobs))
    gpus = _visible_gpus() if jobs > 1 else []
    say(f"the messages of each part go to {logs}")
    with CONSOLE.show(every), _signals_forwarded(every) as signals:
        while every.running or (waiting and not signals):
            while waiting and places and not signals:
                place = places.pop(0)
                started = _start(arguments, waiting.pop(0), place, logs, gpus[place] if gpus else None)
                every.running.append(started)
                started.row.enter_context(CONSOLE.show(started))
                say(f"{started.label} started")
            for ended in [running for running in every.running if _has_ended(running)]:
                every.running.remove(ended)
                every.seconds.append(time.monotonic() - ended.begin)
                ended.row.close()
                places.append(ended.place)
                if ended.child.returncode and not signals:
                    failed += 1
                    say(f"{ended.label} ended with exit code {ended.child.returncode}; see {ended.log}")
    if signals:
        raise Interrupted(signals[0])
    return failed


@contextmanager
def _signals_forwarded(every: AllParts) -> Iterator[list[int]]:
    """Within it, SIGINT and SIGTERM go to all parts at work; the list that it gives holds those that came."""
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


def _start(arguments: Sequence[str], part: Part, place: int, logs: Path, gpu: str | None) -> Running:
    path = part.log(logs)
    with path.open("a") as log:
        log_begin = os.fstat(log.fileno()).st_size
        child = subprocess.Popen(
            [sys.executable, "-m", "opd.launch", "tip.reproduce", *arguments, *part.arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env=os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}),
        )
    threading.Thread(target=_pass_on, args=(child,), daemon=True).start()
    return Running(part, child, place, path, log_begin, time.monotonic())


def _pass_on(child: subprocess.Popen) -> None:
    for line in child.stdout:
        say(line.rstrip())
