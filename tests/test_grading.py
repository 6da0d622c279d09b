"""Answer extraction and exact comparison."""

import time

import pytest

from opd.grading import grade, last_boxed, same_answer


@pytest.mark.parametrize("text,content", [
    (r"so \boxed{7}", "7"),
    (r"\boxed{1} no, \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed {3}", "3"),
    (r"\fbox{4}", "4"),
    (r"\boxed{1 \boxed{2}}", "2"),
    (r"\boxed{1 \boxed{2}", "2"),
    (r"} \boxed{3}", "3"),
    (r"\boxed{{a}{b{c}}}", "{a}{b{c}}"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{5", None),
    (r"\boxed{5} and \boxed{6", "5"), ("7", None), ("", None), (r"\boxed{}", ""), (r"\boxed{ 8 }", "8"),
])  # fmt: skip
def test_last_boxed(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize("a,b,same", [
    ("7", "7", True),
    ("007", "7", True),
    ("+7", "7", True),
    ("7", "8", False),
    ("-7", "7", False),
    ("1,000", "1000", True),
    (r"\dfrac{1}{2}", r"\frac{1}{2}", True), (r"90^\circ", "90", True), (r"50\%", "50", True), ("$x+1$", "x + 1", True),
    (r"\text{Evelyn}", "Evelyn", True),
    (r"\left(1,2\right)", "(1, 2)", True),
    ("0.5", r"\frac12", False),
    ("7.", "7", True),
    ("(1,200)", "(1, 200)", True),
    ("(1,200)", "(1200)", False),
    ("1,2", "12", False),
    ("12,345.5", "12345.5", True),
    ("9" * 30, "9" * 30, True),
    ("9" * 30, "9" * 29, False),
])  # fmt: skip
def test_same_answer(a, b, same):
    assert same_answer(a, b) is same


def test_the_thinking_part_does_not_count():
    assert grade(r"<think> \boxed{1} </think> it is \boxed{2}", "2").correct
    assert grade(r"<think> \boxed{2} </think> so", "2").extracted is None
    assert grade(r"<think> it must be \boxed{2}", "2").extracted is None  # cut off while thinking
    assert grade(r"no box", "2").correct is False


def test_extraction_is_linear_in_whatever_is_in_the_text():
    for text in (
        "\\boxed{" * 200_000,
        "{" * 1_000_000,
        "}" * 1_000_000,
        "\\boxed{" * 100_000 + "}" * 100_000,
        "\\" * 999_999,
    ):
        begin = time.perf_counter()
        last_boxed(text)
        assert time.perf_counter() - begin < 5
