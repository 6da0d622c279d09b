"""Markdown tables that are aligned in plain text."""


def grid(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of cells; every row is as long as the header."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])
