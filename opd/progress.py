"""Seconds by phase, peak memory and progress bars."""

import datetime
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from opd import distributed
from opd.cli import say

RESIDENCE = {"score": "update", "sync": "update"}  # phase of an update -> phase of opd.phases, if it has another name


class Watch:
    """Measures the phases of an update in wall seconds, as metrics `time/<phase>`.

    It waits for the device at both ends of a phase, because a GPU works on while Python goes on.

    Args:
        enter: called before each phase with the name of the phase of opd.phases in which the models must lie. Its own
            seconds are the metric `time/move`.
        advance: the update calls it with the number of micro-batches and of tokens that it has just done.
    """

    def __init__(
        self,
        device: torch.device,
        enter: Callable[[str], None] = lambda phase: None,
        advance: Callable[[int, int], None] = lambda batches, tokens: None,
    ):
        self.device, self.enter, self.advance = device, enter, advance
        self.times: dict[str, float] = {"time/move": 0.0}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with self._timed("move"):
            self.enter(RESIDENCE.get(phase, phase))
        with self._timed(phase):
            yield

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self.times[f"time/{name}"] = self.times.get(f"time/{name}", 0.0) + time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory since the last reset, in GiB: torch's allocations on a GPU, the process's resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reset_peak_memory(device: torch.device) -> None:
    """Starts the peak of `peak_memory_gb` anew. A system that cannot do that keeps the peak of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # on Linux this resets the peak of resident memory


class Progress:
    """Shows how far long work is: a progress bar on a terminal, else a line at most every 30 seconds."""

    def __init__(self, label: str, total: int, unit: str = "responses"):
        self.label, self.total, self.unit = label, total, unit
        self.done = self.tokens = 0
        self.begin = self.last_line = time.monotonic()
        visible = sys.stderr.isatty() and distributed.is_first()
        self.bar = tqdm(total=total, desc=label, unit=" " + unit, leave=False, disable=not visible)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def advance(self, responses: int, tokens: int) -> None:
        self.done += responses
        self.tokens += tokens
        now = time.monotonic()
        rate = self.tokens / max(now - self.begin, 1e-9)
        self.bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self.bar.update(responses)
        if self.bar.disable and now - self.last_line > 30:
            self.last_line = now
            left = f", {duration((now - self.begin) / self.done * (self.total - self.done))} left" if self.done else ""
            say(f"{self.label}: {self.done}/{self.total} {self.unit}, {self.tokens} tokens, {rate:.0f} tokens/s{left}")


def duration(seconds: float) -> str:
    """A number of seconds for people to read, such as 1:02:03."""
    return str(datetime.timedelta(seconds=round(seconds)))


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many updates happens after this one. With `every` 0 it never does."""
    return every > 0 and step % every == 0
