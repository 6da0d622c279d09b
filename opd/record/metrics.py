"""The metrics of a run, in metrics.jsonl and on boards, under the same flat names with slashes."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from typing_extensions import TypedDict

from opd.cli import say
from opd.files import check, read_rows
from opd.record import Board

# A line of metrics.jsonl has at least these keys.
Row = TypedDict("Row", {"step": int, "tokens/response": float, "tokens/kept": float, "memory/peak_gb": float})


class Warned(TypedDict):
    """A line of warnings.jsonl."""

    step: int
    kind: str
    message: str


class MetricsLog:
    """Writes the metrics of each update to all these places, and texts and histograms to the boards alone."""

    def __init__(self, run_dir: Path, boards: Sequence[Board]):
        self.path = run_dir / "metrics.jsonl"
        self.warned: set[str] = set()
        self.file = self.path.open("a", encoding="utf-8")
        self.boards = boards

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        self.scalars(metrics, step)

    def flush(self) -> None:
        """Puts on disk what was written so far, so that it survives a power cut."""
        os.fsync(self.file.fileno())

    def warn(self, kind: str, message: str, step: int) -> None:
        """Writes a warning to warnings.jsonl and the boards; the first one of its kind also to the console."""
        if kind not in self.warned:
            say(f"warning: {message}")
        with self.path.with_name("warnings.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, "message": message}) + "\n")
        self.warned.add(kind)
        self.text(f"warning/{kind}", message, step)

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        """Writes to the boards alone, as for the accuracies of evaluations, which have files of their own."""
        for board in self.boards:
            board.scalars(metrics, step)

    def text(self, name: str, text: str, step: int) -> None:
        for board in self.boards:
            board.text(name, text, step)

    def histogram(self, name: str, column: Tensor, step: int) -> None:
        for board in self.boards:
            board.histogram(name, column, step)

    def close(self) -> None:
        self.file.close()
        for board in self.boards:
            board.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl. Raises InputError naming the first damaged one."""
    path, expected = run_dir / "metrics.jsonl", "the metrics of an update, with its step"
    rows = []
    for number, row in read_rows(path, expected):
        where = f"{path}, line {number}"
        rows.append(check(row, Row, where, expected))
        for name, metric in row.items():
            check(metric, float, f"{where}: {name[:80]}", "a number")
    return rows
