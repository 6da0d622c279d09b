"""Seconds by phase, peak memory, and how far long work is."""

import datetime
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from opd.console import CONSOLE

LINE_EVERY = 10  # updates
AVERAGED = 20  # the latest updates, whose mean tells how long the others take
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
    """Counted work as a row of the console, open within a `with` block.

    Args:
        total: how many units the work has; None where nobody can tell.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = "responses",
        clock: Callable[[], float] = time.monotonic,
    ):
        self.label, self.total, self.unit, self.clock = label, total, unit, clock
        self.done = self.tokens = 0
        self.begin = self.latest = clock()  # of the work, and of its latest unit
        self.shown = CONSOLE.show(self)

    def __enter__(self) -> "Progress":
        self.shown.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.shown.__exit__(*error)

    def advance(self, units: int, tokens: int = 0) -> None:
        self.tokens += tokens
        if units:
            self.done += units
            self.latest = self.clock()

    def fraction(self) -> float | None:
        return self.done / self.total if self.total else None

    def state(self) -> str:
        now = self.clock()
        seconds = max(now - self.begin, 1e-9)
        if self.total is None:
            return f"for {duration(seconds)}"
        words = [f"{self.done}/{self.total} {self.unit}"]
        if self.tokens:
            words.append(f"{self.tokens} tokens, {self.tokens / seconds:.0f} tokens/s")
        if self.done:
            left = (self.latest - self.begin) / self.done * (self.total - self.done) - (now - self.latest)
            words.append(f"{duration(max(0.0, left))} left")
        return ", ".join(words)


class RunProgress:
    """How far a run is, as a row of the console: its updates, its evaluations and the teacher's.

    What is left is told once each kind of work that is left has been timed: every update takes as long as the latest
    ones on average, checkpoints included, and every evaluation of the student as long as the latest one.

    Args:
        evaluated_after: the numbers of the updates after which the student is evaluated; 0 is before the first.
    """

    def __init__(
        self,
        label: str,
        updates: int,
        evaluated_after: Collection[int],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.label, self.updates, self.evaluated_after, self.clock = label, updates, evaluated_after, clock
        self.step = 0  # the last update that is done
        self.of_update = ""  # what is told of it
        self.evaluating = ""  # the model that is evaluated at present, if any
        self.evaluations_left = len(evaluated_after)
        self.latest: deque[float] = deque(maxlen=AVERAGED)  # seconds of the latest updates
        self.per_update: float | None = None  # seconds
        self.per_evaluation: float | None = None
        self.teacher = 0.0  # seconds that its evaluation took
        self.begin = clock()  # of what goes on at present

    def continue_after(self, step: int, per_evaluation: float | None) -> None:
        """The run goes on after update `step`; `per_evaluation` are the seconds of its first evaluation, if known."""
        self.step, self.per_evaluation, self.begin = step, per_evaluation, self.clock()
        self.evaluations_left = sum(number >= step for number in self.evaluated_after)

    def evaluates(self, who: str) -> None:
        """An evaluation begins."""
        self.evaluating, self.begin = who, self.clock()

    def evaluated(self, seconds: float, is_teacher: bool) -> None:
        """It is done. It counts with the seconds that it took, also when another run has made it."""
        self.evaluating, self.begin = "", self.clock()
        if is_teacher:
            self.teacher = seconds
        else:
            self.per_evaluation = seconds
            self.evaluations_left -= 1

    def updated(self, step: int, about: str) -> None:
        """An update is done. Where no bars show it, every tenth one has a line; `about` is what to tell of it."""
        now = self.clock()
        self.latest.append(now - self.begin)
        self.step, self.of_update, self.begin = step, about, now
        self.per_update = statistics.fmean(self.latest)
        if due(step, LINE_EVERY) or step == self.updates:
            CONSOLE.tell()

    def left(self) -> float | None:
        """Seconds; None before each kind of work has been timed."""
        work = ((self.updates - self.step, self.per_update), (self.evaluations_left, self.per_evaluation))
        ahead = [(count, seconds) for count, seconds in work if count > 0]
        if any(seconds is None for _, seconds in ahead):
            return None
        present = (self.per_evaluation if self.evaluating else self.per_update) or 0.0
        return sum(count * seconds for count, seconds in ahead) - min(self.clock() - self.begin, present)

    def fraction(self) -> float | None:
        left = self.left()
        if left is None:
            return None
        evaluations = len(self.evaluated_after) - self.evaluations_left
        done = self.teacher + self.step * (self.per_update or 0.0) + evaluations * (self.per_evaluation or 0.0)
        return done / max(done + left, 1e-9)

    def state(self) -> str:
        left = self.left()
        present = f"evaluating the {self.evaluating}" if self.evaluating else self.of_update
        words = [f"update {self.step}/{self.updates}", "" if left is None else f"{duration(left)} left", present]
        return ", ".join(filter(None, words))


def duration(seconds: float) -> str:
    """A number of seconds for people to read, such as 1:02:03."""
    return str(datetime.timedelta(seconds=round(seconds)))


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many updates happens after this one. With `every` 0 it never does."""
    return every > 0 and step % every == 0
