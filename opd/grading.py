"""Is a response right? The last \\boxed{...} of a response, compared with the reference answer.

Answers are compared as integers where both are, else as text after the spellings that mean the same are folded.
Expressions that are equal but written differently are *not* recognised here.
"""

import re
from dataclasses import dataclass

VERSION = "boxed-exact-2"  # written into every evaluation: a grader is part of what a number means


@dataclass(frozen=True)
class Verdict:
    extracted: str | None  # None: the response has no complete box
    correct: bool


def grade(response: str, answer: str) -> Verdict:
    """Grades what follows the thinking part; a response that is still thinking at its end has no answer."""
    thinking, _, rest = response.rpartition("</think>")
    said = rest if thinking or "<think>" not in rest else ""
    extracted = last_boxed(said)
    return Verdict(extracted, extracted is not None and same_answer(extracted, answer))


def last_boxed(text: str) -> str | None:
    """Content of the complete `\\boxed{...}` (or `\\fbox`) that starts last, braces nested; None when there is none.

    One pass: linear time in the length of the text, whatever is in it.
    """
    opened: list[int | None] = []  # for every open brace, where a box's content starts, or None for another brace
    best: tuple[int, int] | None = None
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\[{}\\]|[{}]", text):
        if token[0].endswith("{") and token[0] != "\\{":
            opened.append(token.end() if len(token[0]) > 1 else None)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
    return None if best is None else text[slice(*best)].strip()


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
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        return text.replace(",", "")
    return text
