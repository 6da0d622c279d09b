"""Markdown tables that are aligned in plain text, and fitted to the width of a terminal."""

import io
import shutil
import sys
from collections.abc import Sequence

from opd.accuracy import Interval

FIRST_TO_GO = ("run folder", "s", "peak GiB", "divergence covered", "tokens kept")  # costs, and then what was kept


def grid(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of cells; every row is as long as the header."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def difference_cell(interval: Interval | None) -> str:
    """A difference in points with its interval, and on how many of the seeds it is above 0; empty without one."""
    if interval is None:
        return ""
    mean, low, high = interval.points
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] {interval.wins}/{len(interval.by_seed)}"


def show(text: str) -> None:
    """Prints a Markdown text. On a terminal its tables are fitted to the width; elsewhere they are whole."""
    print(fitted(text, shutil.get_terminal_size().columns) if sys.stdout.isatty() else text)


def fitted(text: str, width: int) -> str:
    """A Markdown text whose tables of `grid` are at most so many characters wide.

    The columns of FIRST_TO_GO go one after another, as far as necessary, and a line says which. A table that is still
    too wide keeps its columns, and their cells are wrapped.
    """
    blocks: list[list[str]] = []
    for line in text.split("\n"):
        is_row = line.startswith("| ") or line.startswith("|-")
        if is_row and blocks and blocks[-1][0].startswith("|"):
            blocks[-1].append(line)
        else:
            blocks.append([line])
    return "\n".join(_fitted(block, width) if block[0].startswith("|") else block[0] for block in blocks)


def _fitted(lines: Sequence[str], width: int) -> str:
    """One table, given by its lines."""
    if max(map(len, lines)) <= width:
        return "\n".join(lines)
    rows = [tuple(cell.strip() for cell in line[1:-1].split(" | ")) for line in (lines[0], *lines[2:])]
    if len({*map(len, rows)}) > 1:
        return "\n".join(lines)  # a cell holds the sign between the columns, so it is not clear where the columns are
    gone = []
    for name in FIRST_TO_GO:
        if name in rows[0] and len(_aligned(rows).partition("\n")[0]) > width:
            place = rows[0].index(name)
            rows = [row[:place] + row[place + 1 :] for row in rows]
            gone.append(name)
    table = _aligned(rows)
    if len(table.partition("\n")[0]) > width:
        table = _wrapped(rows, width)
    return f"{table}\n({', '.join(gone)}: left out here; a file or a wider terminal shows them)" if gone else table


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    return grid(rows[0], list(rows[1:]))


def _wrapped(rows: Sequence[tuple[str, ...]], width: int) -> str:
    """The table with cells of several lines."""
    from rich import box  # rich takes a while to import, and only a table that is too wide needs it
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.MARKDOWN, show_lines=False)
    for i, name in enumerate(rows[0]):
        table.add_column(Text(name), overflow="fold", no_wrap=i == 0)
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    screen = Console(file=io.StringIO(), width=width, color_system=None)
    screen.print(table)
    lines = (line.rstrip() for line in screen.file.getvalue().split("\n"))
    return "\n".join(filter(None, lines))  # rich leaves an empty line where other boxes have a border
