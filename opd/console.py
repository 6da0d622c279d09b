"""The console: messages, bars on a terminal, and never ten seconds of silence while work goes on.

Whoever does long work opens a row, which tells how far the work is. On a terminal the open rows stand as bars below the
messages. Elsewhere one line tells all of them, whenever nothing was said for SILENCE seconds. One thread looks after
both, from the first open row to the last. All of this goes to standard error, and of several processes the first one
alone speaks.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

SILENCE = 9.5  # seconds without a message after which a line tells where the work is, so that ten never pass
LOOK = 0.2  # seconds between two looks at the rows
PATIENCE = 1.0  # seconds after which a row below the first becomes a bar, so that short work does not flicker


class Row(Protocol):
    """Work that takes long."""

    label: str

    def fraction(self) -> float | None:
        """How much of it is done, from 0 to 1; None where nobody can tell."""
        ...

    def state(self) -> str:
        """Where it is, in a few words, the most important ones first."""
        ...


class Console:
    """What the user sees of this process.

    Args:
        clock: gives seconds.
        look_every: seconds between two looks of the thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, look_every: float = LOOK):
        self.clock, self.look_every = clock, look_every
        self.rows: dict[Row, float] = {}  # the open rows, the outermost first, with the time at which each was opened
        self.last_message = clock()
        self.bars: Any = None  # rich.progress.Progress, while rows are open on a terminal
        self.bar_of: dict[Row, int] = {}
        self.lock = threading.RLock()  # reentrant, because a signal's message may interrupt another message
        self.is_over = threading.Event()
        self.thread: threading.Thread | None = None

    def say(self, text: str) -> None:
        """Prints a message."""
        if not _speaks():
            return
        with self.lock:
            print(text, file=sys.stderr, flush=True)  # above the bars, which rich sees to
            self.last_message = self.clock()

    def tell(self) -> None:
        """Says where the work is, unless bars show it."""
        with self.lock:
            if self.rows and self.bars is None:
                self.say("; ".join(f"{row.label}: {row.state()}" for row in self.rows))

    @contextmanager
    def show(self, row: Row) -> Iterator[None]:
        """The row is open in this block."""
        self._open(row)
        try:
            yield
        finally:
            self._close(row)

    def look(self) -> None:
        """Brings the bars up to date, or breaks the silence."""
        with self.lock:
            if self.bars is None:
                if self.rows and self.clock() - self.last_message >= SILENCE:
                    self.tell()
                return
            for depth, (row, opened) in enumerate(self.rows.items()):
                fraction = row.fraction()
                self.bars.update(
                    self.bar_of[row],
                    total=None if fraction is None else 1.0,
                    completed=fraction or 0.0,
                    state=row.state(),
                    visible=depth == 0 or self.clock() - opened >= PATIENCE,
                )
            self.bars.refresh()

    def _open(self, row: Row) -> None:
        if not _speaks():
            return
        with self.lock:
            if not self.rows:
                self.bars = _bars() if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else None
                self.is_over = threading.Event()
                self.thread = threading.Thread(target=self._watch, args=(self.is_over,), daemon=True)
                self.thread.start()
            if self.bars is not None:
                label = f"  {row.label}" if self.rows else row.label
                self.bar_of[row] = self.bars.add_task(label, total=None, state="", visible=not self.rows)
            self.rows[row] = self.clock()

    def _close(self, row: Row) -> None:
        if row not in self.rows:
            return
        with self.lock:
            del self.rows[row]
            if self.bars is not None:
                self.bars.remove_task(self.bar_of.pop(row))
            if self.rows:
                return
            self.is_over.set()
            bars, self.bars = self.bars, None
        self.thread.join()
        if bars is not None:
            bars.stop()

    def _watch(self, is_over: threading.Event) -> None:
        with suppress(OSError):  # standard error is closed; the next message of the work itself ends the command
            while not is_over.wait(self.look_every):
                self.look()


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _bars() -> Any:
    """A started display of bars. Messages that are printed meanwhile appear above it."""
    from rich.console import Console as Screen  # rich takes a tenth of a second to import, and few commands need it
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    def text(words: str, **column: Any) -> TextColumn:
        return TextColumn(words, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", **column))

    bars = Progress(
        text("{task.description}"),
        BarColumn(bar_width=20),
        text("{task.fields[state]}", ratio=1),
        console=Screen(stderr=True, highlight=False),
        auto_refresh=False,
        transient=True,
        expand=True,
        redirect_stdout=False,  # standard output carries results alone
    )
    bars.start()
    return bars


def quiet_libraries() -> None:
    """Silences messages of libraries that a user can do nothing about, each by its name."""
    # matplotlib keeps a list of fonts for all installations of a user. It names each of its own fonts that is not in
    # the list of another installation, and draws the figures with DejaVu Sans all the same.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


CONSOLE = Console()
say = CONSOLE.say
