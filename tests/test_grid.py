"""Markdown tables that fit the width of a terminal."""

import io
import re

import pytest

from tip.results import grid as grid_module
from tip.results.grid import fitted, grid


class Terminal(io.StringIO):
    def isatty(self):
        return True


HEADER = ("arm", "greedy", "greedy - all 1.0", "tokens kept", "divergence covered", "peak GiB", "s")
ROWS = [
    ("step-0 student", "44.3 (2.2)", "", "", "", "", ""),
    ("soft_or 0.5", "97.5 (0.7)", "-0.2 [-0.6, +0.2] 0/1", "48.7 %", "99.8 %", "0.53", "9.4"),
]
TEXT = f"## a heading\n\n{grid(HEADER, ROWS)}\n\nA sentence that is longer than any terminal is wide. {'x' * 200}"


def test_a_table_that_fits_is_left_alone():
    assert fitted(TEXT, 200) == TEXT


@pytest.mark.parametrize("width", [105, 100, 90, 75, 60, 45, 35])
def test_a_table_is_as_wide_as_the_terminal_and_loses_the_cost_columns_first(width):
    table = [line for line in fitted(TEXT, width).splitlines() if line.startswith("|")]
    assert max(map(len, table)) <= width
    text = fitted(TEXT, width)
    gone = re.findall(r"\((.*): left out here", text)[0].split(", ")
    assert gone == ["s", "peak GiB", "divergence covered", "tokens kept"][: len(gone)]
    words = "".join(c for c in " ".join(table) if c not in "|- \n")
    assert all(number in words for number in ("44.3", "97.5"))  # a wrapped table keeps its cells
    assert TEXT.splitlines()[-1] in text and text.startswith("## a heading\n\n|")


def test_no_column_goes_without_need():
    widths = [len(re.findall(r"\((.*): left out here|$", fitted(TEXT, w))[0]) for w in range(40, 140)]
    assert widths == sorted(widths, reverse=True) and widths[-1] == 0


def test_cells_that_hold_the_sign_between_columns_are_not_taken_apart():
    text = grid(("arm", "s"), [("a | b" + "x" * 80, "1")])
    assert fitted(text, 40) == text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_standard_output_that_is_no_terminal_gets_the_whole_table(is_terminal, monkeypatch):
    out = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(grid_module.sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "90")
    grid_module.show(TEXT)
    assert out.getvalue() == f"{fitted(TEXT, 90) if is_terminal else TEXT}\n"
