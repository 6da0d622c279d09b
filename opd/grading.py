"""Is a response right? The last \\boxed{...} of a response, compared with the reference answer.

Answers are compared as integers where both are, else as text after the spellings that mean the same are folded.
Expressions that are equal but written differently are *not* recognised here.
"""

import re
from dataclasses import dataclass

VERSION = "boxed-exact-1"  # written into every evaluation: a grader is part of what a number means


@dataclass(frozen=True)
class Verdict:
    extracted: str | None  # None: the response has no complete box
    correct: bool


def grade(response: str, answer: str) -> Verdict:
    extracted = last_boxed(response.rpartition("</think>")[2])
    return Verdict(extracted, extracted is not None and same_answer(extracted, answer))


def last_boxed(text: str) -> str | None:
    """Content of the last complete `\\boxed{...}`, braces nested to any depth; None when there is none. Linear time."""
    for match in reversed(list(re.finditer(r"\\f?boxed\s*\{", text))):
        depth = 1
        for end in re.finditer(r"\\[{}\\]|[{}]", text[match.end() :]):
            depth += {"{": 1, "}": -1}.get(end[0], 0)
            if depth == 0:
                return text[match.end() : match.end() + end.start()].strip()
    return None


def same_answer(left: str, right: str) -> bool:
    a, b = _fold(left), _fold(right)
    if re.fullmatch(r"[+-]?\d{1,18}", a) and re.fullmatch(r"[+-]?\d{1,18}", b):
        return int(a) == int(b)
    return a == b


def _fold(text: str) -> str:
    text = text.strip().strip("$").removesuffix(".")
    text = re.sub(r"\\left|\\right|\\[,!;: ]|\s|\^\{?\\circ\}?|\\%|%", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
