"""Where numbers go: console, metrics.jsonl, TensorBoard. Names are flat with slashes, the same in all three."""

import datetime
import json
import os
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from typing_extensions import TypedDict

from opd import distributed
from opd.cli import say
from opd.files import check, read_rows

CONSOLE = (  # label, metric, format
    ("loss", "loss/divergence", ".4f"),
    ("kept", "tokens/kept", ".0f"),
    ("of", "tokens/response", ".0f"),
    ("length", "rollout/length_mean", ".1f"),
    ("correct", "rollout/accuracy", ".2f"),
    ("norm", "optim/grad_norm", ".3f"),
    ("lr", "optim/lr", ".1e"),
    ("s", "time/step", ".2f"),
)


# A line of metrics.jsonl holds at least these.
Row = TypedDict("Row", {"step": int, "tokens/response": float, "tokens/kept": float, "memory/peak_gb": float})


class Warned(TypedDict):
    """A line of warnings.jsonl."""

    step: int
    kind: str
    message: str


class Stopwatch:
    """Wall seconds of named phases, under `time/<phase>`; waits for the device at both ends."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self.times[f"time/{phase}"] = self.times.get(f"time/{phase}", 0.0) + time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_memory_gb(device: torch.device) -> float:
    """Peak since the last reset, in GiB: allocated by torch on a GPU; resident size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reset_peak_memory(device: torch.device) -> None:
    """From now on `peak_memory_gb` is the peak since now; where the system cannot do that, since the process began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the high-water mark of resident memory


class Progress:
    """A long phase, visibly: a bar with tokens/s and time left on a terminal, else a line at most every 30 seconds."""

    def __init__(self, label: str, total: int, unit: str = "responses"):
        self.label, self.total, self.unit = label, total, unit
        self.done = self.tokens = 0
        self.begin = self.said = time.monotonic()
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
        if self.bar.disable and now - self.said > 30:
            self.said = now
            left = f", {duration((now - self.begin) / self.done * (self.total - self.done))} left" if self.done else ""
            say(f"{self.label}: {self.done}/{self.total} {self.unit}, {self.tokens} tokens, {rate:.0f} tokens/s{left}")


def duration(seconds: float) -> str:
    """1:02:03"""
    return str(datetime.timedelta(seconds=round(seconds)))


class MetricsLog:
    """Appends one object per update to metrics.jsonl, mirrors it to TensorBoard, prints a line."""

    def __init__(self, run_dir: Path, total_steps: int, last_step: int):
        self.path = run_dir / "metrics.jsonl"
        self.total_steps = total_steps
        self.last_step = last_step
        self.warned: set[str] = set()
        self.seconds: deque[float] = deque(maxlen=20)  # of the latest updates
        self.file = self.path.open("a", encoding="utf-8")
        self.board = SummaryWriter(run_dir / "tensorboard", purge_step=last_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        shown = " ".join(f"{label} {metrics[name]:{form}}" for label, name, form in CONSOLE if name in metrics)
        self.seconds.append(metrics["time/step"])
        left = duration(statistics.median(self.seconds) * (self.total_steps - step))
        say(f"step {step}/{self.total_steps} {shown} left {left}")

    def flush(self) -> None:
        """Everything written so far is on the disk, whatever happens to the machine."""
        os.fsync(self.file.fileno())

    def text(self, tag: str, text: str, step: int) -> None:
        self.board.add_text(tag, text, step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        self.board.add_histogram(tag, values, step)

    def warn(self, kind: str, message: str, step: int) -> None:
        """On the console the first time; in warnings.jsonl and TensorBoard always."""
        if kind not in self.warned:
            say(f"warning: {message}")
        with (self.path.with_name("warnings.jsonl")).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, "message": message}) + "\n")
        self.warned.add(kind)
        self.board.add_text(f"warning/{kind}", message, step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """TensorBoard only: evaluations have files of their own."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        self.board.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl. Raises InputError naming the damaged one."""
    path, expected = run_dir / "metrics.jsonl", "the metrics of an update, with its step"
    rows = []
    for number, row in read_rows(path, expected):
        rows.append(check(row, Row, f"{path}, line {number}", expected))
        for name, value in row.items():
            check(value, float, f"{path}, line {number}: {name[:80]}", "a number")
    return rows
