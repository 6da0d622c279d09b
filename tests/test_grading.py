"""Answer extraction, exact comparison, and which answers vote together."""

import json
import os
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

from opd.grading import WORKER_BYTES, Grader, Verdict, extract, last_boxed, plainly_equal, votes


@pytest.mark.parametrize(
    "text,content",
    [
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
        (r"\boxed{5} and \boxed{6", "5"),
        ("7", None),
        ("", None),
        (r"\boxed{}", ""),
        (r"\boxed{ 8 }", "8"),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    "a,b,same",
    [
        ("7", "7", True),
        ("007", "7", True),
        ("+7", "7", True),
        ("7", "8", False),
        ("-7", "7", False),
        ("$7$", "7", True),
        ("x+1", "x+1", True),
        ("1,000", "1000", None),
        ("x+1", "1+x", None),
        ("", "7", False),
        ("9" * 30, "9" * 29, None),
    ],
)
def test_what_is_plain_and_what_takes_mathematics(a, b, same):
    assert plainly_equal(a, b) is same


def test_the_thinking_part_does_not_count():
    assert extract(r"<think> \boxed{1} </think> it is \boxed{2}") == "2"
    assert extract(r"<think> \boxed{2} </think> so") is None
    assert extract(r"<think> it must be \boxed{2}") is None  # cut off while thinking
    assert extract(r"no box") is None


def test_answer_lines_count_when_asked_for():
    text = "so\nAnswer: 5\nno\n**Answer:** \\frac{1}{2} \n"
    assert extract(text) is None and extract(text, answer_lines=True) == "\\frac{1}{2}"
    assert extract(text + r"\boxed{3}", answer_lines=True) == "3"
    assert extract("Answer:", answer_lines=True) is None


@pytest.fixture(scope="module")
def grader():
    with Grader(seconds=5, workers=2) as found:
        yield found


def test_grading_responses(grader):
    cases = [
        (r"\boxed{7}", "7", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{0.5}", r"\frac12", True),
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", True),
        (r"\boxed{90^\circ}", "90", True),
        (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"\boxed{8}", "7", False),
        (r"\boxed{(1,200)}", "1200", False),
        (r"\boxed{\$18}", "18", True),
        (r"\boxed{18}", r"\$18", True),
        (r"\boxed{\$18.90}", "18.9", True),
        (r"\boxed{32348}", r"\$32,\!348", True),
        (r"\boxed{\$1{,}000}", "1000", True),
        (r"\boxed{\$19}", "18", False),
        ("seven", "7", False),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
    ]
    verdicts = grader.grade([(response, answer) for response, answer, _ in cases])
    assert [v.correct for v in verdicts] == [right for *_, right in cases]
    assert verdicts[-2].extracted is None and verdicts[1].extracted == r"\frac{1}{2}"


@pytest.mark.skipif(not os.environ.get("OPD_TEST_DATA"), reason="OPD_TEST_DATA names no folder with math_equiv/")
def test_equivalence_on_the_collected_cases_of_nine_projects(grader):
    path = Path(os.environ["OPD_TEST_DATA"]) / "math_equiv/cases.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if not row["contested"]]
    verdicts = grader.equivalent([(row["pred"], row["gold"]) for row in rows])
    assert len(rows) == 394
    accepted = [r["id"] for r, v in zip(rows, verdicts, strict=True) if v and not r["equivalent"]]
    assert not accepted
    assert sum(v is r["equivalent"] for r, v in zip(rows, verdicts, strict=True)) >= 376


def test_plain_pairs_reach_no_worker():
    with Grader(workers=1) as idle:
        assert idle.equivalent([("7", "07"), ("7", "8"), ("", "8"), ("$x$", "x")]) == [True, False, False, True]
        assert votes([[Verdict(str(n), False) for n in range(16)]] * 20, idle) == [[str(n) for n in range(16)]] * 20
        assert not idle.workers


class ByValue:
    """A grader of fractions that gives up on pairs that hold 13; it keeps what it was asked, call by call."""

    def __init__(self):
        self.calls = []

    def equivalent(self, pairs):
        self.calls.append(list(pairs))
        bare = [(a.replace(" ", ""), b.replace(" ", "")) for a, b in pairs]
        return [None if "13" in pair else Fraction(pair[0]) == Fraction(pair[1]) for pair in bare]


def naive_votes(verdicts):
    """Answer by answer against every class so far; a list of [first text, members' texts, kind]."""
    classes, found = [], {}
    texts = {v.extracted.replace(" ", "") for v in verdicts if v.extracted}
    kinds = {
        text: {v.correct for v in verdicts if v.extracted and v.extracted.replace(" ", "") == text} for text in texts
    }
    for verdict in verdicts:
        text = (verdict.extracted or "").replace(" ", "")
        if not text or text in found:
            continue
        kind = True if True in kinds[text] else False if False in kinds[text] else None
        for first, first_kind in classes:
            both_right = kind is True and first_kind is True
            both_wrong = kind is False and first_kind is False
            if both_right or (both_wrong and "13" not in (text, first) and Fraction(text) == Fraction(first)):
                found[text] = first
                break
        else:
            classes.append((text, kind))
            found[text] = text
    return [found.get((v.extracted or "").replace(" ", "")) for v in verdicts]


def test_votes_equal_a_naive_grouping():
    rng = random.Random(0)
    pool = ["1/2", "0.5", "2/4", " 1/2", "1 /2", "3", "3.0", "6/2", "13", "26/2", "1 3", "5", "10/2", "", None]
    problems = []
    for _ in range(200):
        right = {Fraction(rng.choice(["1/2", "3", "7"]))}
        texts = rng.choices(pool, k=rng.randrange(1, 12))
        problems.append(
            [
                Verdict(t, False)
                if not t
                else Verdict(t, rng.choice([Fraction(t.replace(" ", "")) in right] * 4 + [None]))
                for t in texts
            ]
        )
    grader = ByValue()
    found = votes(problems, grader)
    unspaced = [[vote and vote.replace(" ", "") for vote in given] for given in found]
    assert unspaced == [naive_votes(verdicts) for verdicts in problems]
    written = [[v.extracted for v in verdicts] for verdicts in problems]
    assert all(vote is None or vote in texts for given, texts in zip(found, written, strict=True) for vote in given)
    assert len(grader.calls) <= 12  # of all problems at once


def test_only_different_wrong_answers_of_one_problem_are_compared_each_with_a_first_one():
    grader = ByValue()
    first = [
        Verdict(t, c)
        for t, c in (
            ("1/2", True),
            ("0.5", True),
            ("3", False),
            ("4", False),
            (" 3", False),
            ("6/2", False),
            ("8/2", False),
            ("9", None),
            ("9", None),
            ("", False),
            (None, False),
        )
    ]
    second = [Verdict("3", False), Verdict("5", False)]
    assert votes([first, second], grader) == [
        ["1/2", "1/2", "3", "4", "3", "3", "4", "9", "9", None, None],
        ["3", "5"],
    ]
    asked = [call for call in grader.calls if call]
    assert asked == [[("4", "3"), ("6/2", "3"), ("8/2", "3"), ("5", "3")], [("8/2", "4")]]


def test_mathematics_decides_which_wrong_answers_vote_together(grader):
    texts = [r"\frac{1}{2}", "8", "0.5", "1/2", "(x+1)^2", "x^2+2x+1", "08", r"\frac{1}{3}"]
    half, square = texts[0], texts[4]
    expected = [half, "8", half, half, square, square, "8", r"\frac{1}{3}"]
    assert votes([[Verdict(text, False) for text in texts]], grader) == [expected]


def hostile_texts():
    """At least 500 strings that break parsers."""
    rng = random.Random(0)
    pieces = [
        "\\boxed{",
        "{",
        "}",
        "\\frac{",
        "\\sqrt",
        "^",
        "^{",
        "_",
        "9" * 40,
        "!",
        "\\left(",
        "\\right)",
        "\\begin{pmatrix}",
        "&",
        "\\\\",
        "\x00",
        "\u202e",
        "$",
        "\\text{",
        "\\infty",
        "\\int",
        "\\sum_{",
        "0/0",
        "1/0",
        "**",
        "lambda x:",
        "\ud800",
        "__import__('os')",
        "\\cdot",
        "e",
        "π",
        "×",
        "，",
        "％",
        "\\ ",
        "\n",
        "=",
        "<",
        "\\cup",
        "\\%",
        "|",
        "∞" * 5,
    ]
    for _ in range(480):
        yield (
            "\\boxed{" + "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 25))) + rng.choice(["}", "", "}}}"])
        )
    yield from (
        "\\boxed{9^{9^{9^{9}}}}",
        "\\boxed{10^{10^{10}}}",
        "\\boxed{(10^9)!}",
        "\\boxed{2^{999999999}}",
        "\\boxed{1e999999999}",
        "\\boxed{" + "(" * 5000 + ")" * 5000 + "}",
        "\\boxed{" + "\\frac{1}{" * 2000 + "2" + "}" * 2000 + "}",
        "\\boxed{" * 5000,
        "\\boxed{" + "9" * 200_000 + "}",
        "\\boxed{" + "x+" * 20_000 + "x}",
        "\\boxed{" + "^" * 5000 + "}",
        "a" * 10_000_000,
        "\\boxed{" + "a" * 10_000_000,
        "\\boxed{" + "a " * 500_000 + "}",
        "{" * 10_000_000,
        "\\boxed{\\sum_{n=1}^{\\infty} \\sum_{m=1}^{\\infty} \\frac{1}{n^m m^n}}",
        "\\boxed{\\int_0^1 \\int_0^1 x^{x^{y^y}} dx dy}",
        "\\boxed{\\prod_{n=1}^{10^{9}} n}",
        "\\boxed{\\binom{10^{8}}{5 \\cdot 10^{7}}}",
        "\\boxed{\\sqrt[10^{9}]{10^{10^{9}}}}",
    )


@pytest.mark.slow
def test_hostile_texts_neither_hang_nor_crash_the_grader():
    texts = list(hostile_texts())
    assert len(texts) >= 500
    with Grader(seconds=2, workers=2) as grader:
        verdicts = grader.grade([(text, "7") for text in texts])
        assert len(verdicts) == len(texts) and not any(v.correct for v in verdicts)
        assert sum(v.correct is False for v in verdicts) > 300  # most are graded: wrong
        assert [v.correct for v in grader.grade([(r"\boxed{\frac{14}{2}}", "7")])] == [True]  # it still works


def test_what_hangs_or_crashes_a_worker_is_ungraded_and_the_next_is_graded():
    with Grader(seconds=5, workers=1) as grader:
        grader.grade([(r"\boxed{1/2}", "0.5")])  # the worker is up
        hang = r"\boxed{\binom{10^{8}}{5 \cdot 10^{7}}}"
        verdicts = grader.grade([(hang, "7"), (r"\boxed{2/4}", "0.5"), (r"\boxed{3}", "4")])
        assert [v.correct for v in verdicts] == [None, True, False] and verdicts[0].extracted
        grader.workers[0].process.kill()
        assert [v.correct for v in grader.grade([(r"\boxed{2/4}", "0.5")] * 2)] == [None, True]


def test_a_worker_has_a_limit_on_its_memory(grader):
    grader.equivalent([("1/2", "0.5")])
    limits = Path(f"/proc/{grader.workers[0].process.pid}/limits").read_text().splitlines()
    (address_space,) = [line.split() for line in limits if line.startswith("Max address space")]
    assert address_space[-3:] == [str(WORKER_BYTES), str(WORKER_BYTES), "bytes"]


def test_extraction_is_linear_in_whatever_is_in_the_text():
    """Seconds of work where it is linear, hours where it is not: the limit only keeps the test from hanging."""
    code = r"""
from opd.grading import extract, last_boxed
nested = "\\boxed{" * 100_000 + "}" * 100_000
for text in ("\\boxed{" * 200_000, "{" * 1_000_000, "}" * 1_000_000, nested, "\\" * 999_999):
    last_boxed(text)
assert extract("Answer: x" + " " * 5_000_000 + "y", answer_lines=True)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_workers_do_not_outlive_a_killed_parent():
    code = (
        "from opd.grading import Grader; import os, signal; g = Grader(workers=1); g.grade([('\\\\boxed{1/2}', "
        "'0.5')]);print(g.workers[0].process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    worker = Path(f"/proc/{int(found.stdout)}/stat")
    deadline = time.monotonic() + 20
    while worker.exists() and worker.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not worker.exists() or worker.read_text().split()[2] == "Z"
