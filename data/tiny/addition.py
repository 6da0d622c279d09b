"""A second embedded task, built differently: 3-digit addition, column by column, with the carries written out.

A problem is `347+586?`. A response adds the columns from the right, `okay first 7+6+0=13` (digits, carry in, two-digit
sum), and ends in `answer \\boxed{933}`. The corrupted student has other faults than the chain task's: a
*misconception*, a carry into a column whose lower digit is 7 or more is always ignored; and *carelessness*, a sum of 10
or more whose lower digit is the larger one loses its carry every other time. Both change what follows and the answer.
"""

import random

from transformers import PreTrainedTokenizerFast

from data.tiny import task
from data.tiny.task import END, MOODS, ORDERS, STUDENT, TEACHER, Speaker

__all__ = ["END", "STUDENT", "TEACHER", "answer", "problem", "response", "row", "tokenizer"]
COLUMNS = 3


def problem(rng: random.Random) -> str:
    """Draws a problem; both numbers uniform from 100 to 999 (810,000 different ones)."""
    return f"{rng.randrange(100, 1000)}+{rng.randrange(100, 1000)}?"


def answer(text: str) -> int:
    """The right answer of a problem."""
    a, b = text.removesuffix("?").split("+")
    return int(a) + int(b)


def row(rng: random.Random) -> dict[str, str]:
    """Draws a problem as a row without an id."""
    text = problem(rng)
    return {"problem": text, "answer": str(answer(text))}


def response(text: str, speaker: Speaker, rng: random.Random) -> str:
    """A worked response in the speaker's words, mistakes included; 39 or 40 tokens with the end token."""
    first, second = text.removesuffix("?").split("+")
    carry, digits, lines = 0, "", []
    for column in range(COLUMNS):
        a, b = int(first[-1 - column]), int(second[-1 - column])
        total = a + b + carry
        if speaker.corrupt and carry and b >= 7:
            total = a + b  # the misconception: always
        if speaker.corrupt and total >= 10 and b > a and rng.random() < 0.5:
            total -= 10  # carelessness: every other time
        mood = rng.choices(MOODS, speaker.moods)[0]
        order = rng.choices(ORDERS, speaker.orders)[0]
        lines.append(f"{mood}{order}{a}+{b}+{carry}={total:02d}\n")
        carry, digits = total // 10, str(total % 10) + digits
    return "".join(lines) + f"answer \\boxed{{{'1' if carry else ''}{digits}}}"


def tokenizer() -> PreTrainedTokenizerFast:
    """The chain task's: one token per symbol or word."""
    return task.tokenizer()
