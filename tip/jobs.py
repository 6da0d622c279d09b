"""Runs the parts of a table in processes of their own, several at a time."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from opd.cli import say
from opd.errors import Interrupted


@dataclass(frozen=True)
class Part:
    """What one process does: a seed with all of its arms, or one arm of it."""

    seed: int
    arm: str | None = None

    @property
    def arguments(self) -> list[str]:
        return ["--only-seed", str(self.seed), *(["--only-arm", self.arm] if self.arm else [])]

    def log(self, folder: Path) -> Path:
        return folder / (f"seed_{self.seed}-{self.arm.replace(' ', '-')}.log" if self.arm else f"seed_{self.seed}.log")


def run_parts(arguments: Sequence[str], parts: Sequence[Part], jobs: int, logs: Path) -> int:
    """Runs `tip.reproduce` with these arguments for every part, `jobs` at a time; returns how many failed.

    Where there are GPUs and several jobs, each process sees one GPU of its own. With engine.kind deepspeed a part is a
    group of processes on all GPUs. Progress lines go to our stderr, the rest to a log of each part. A signal is
    forwarded to all of them, and no further part starts.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, failed, stopped = list(parts), 0, 0
    running: dict[Part, tuple[subprocess.Popen, int]] = {}  # with the number of its place among the jobs
    places = list(range(jobs))
    gpus = _visible_gpus() if jobs > 1 else []

    def forward(signum: int, frame: object) -> None:
        nonlocal stopped
        stopped = signum
        for child, _ in running.values():
            child.send_signal(signum)

    previous = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        while running or (waiting and not stopped):
            while waiting and places and not stopped:
                part, place = waiting.pop(0), places.pop(0)
                running[part] = _start(arguments, part, part.log(logs), gpus[place] if gpus else None), place
                say(f"seed {part.seed}: {f'{part.arm} ' if part.arm else ''}started; log in {part.log(logs)}")
            for part, (child, place) in list(running.items()):
                try:
                    code = child.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
                del running[part]
                places.append(place)
                if code and not stopped:
                    failed += 1
                    say(f"seed {part.seed}: ended with exit code {code}; see {part.log(logs)}")
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if stopped:
        raise Interrupted(stopped)
    return failed


def _visible_gpus() -> list[str]:
    count = torch.cuda.device_count()
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",") if count else []


def _start(arguments: Sequence[str], part: Part, log: Path, gpu: str | None) -> subprocess.Popen:
    with log.open("a") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "opd.launch", "tip.reproduce", *arguments, *part.arguments],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
            env=os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}),
        )
    threading.Thread(target=_pass_on, args=(child,), daemon=True).start()
    return child


def _pass_on(child: subprocess.Popen) -> None:
    for line in child.stdout:
        say(line.rstrip())
