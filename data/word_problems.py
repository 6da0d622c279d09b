"""Word problems of two events, each with a rationale that leads to its answer, and a student's misconceptions of them.

A problem is `Tom has 18 balls, throws away 5, and throws away 9. How many balls does Tom have?`. A rationale is `Start:
18. Then throws away: 18-5=13. Now throws away: 13-9=4.` and, on a line of its own, `Answer: 4`. Its first words vary
and change nothing. The misled speaker adds what is given away or sold, and adds two where a number doubles. It does so
always and reckons rightly with it, so that each mistake is one operator.
"""

import random
from collections.abc import Set
from dataclasses import dataclass
from functools import cache
from typing import Any

NAMES = (
    *("Tom", "Mia", "Ben", "Ana", "Leo", "Eva", "Sam", "Zoe"),
    *("Max", "Lily", "Jack", "Emma", "Noah", "Ruth", "Omar", "Nina"),
)
THINGS = (
    *("apples", "pens", "books", "coins", "cards", "shells", "stamps", "marbles"),
    *("cookies", "stickers", "balls", "eggs", "keys", "cups", "hats", "toys"),
)
OPENINGS = ("Start: {}.", "At first {}.", "There are {}.", "We begin with {}.")
LINKS = ("Then", "Next", "Now", "So")
STARTS, AMOUNTS = (3, 19), (2, 9)
GAINED, LOST = 0.36, 0.44  # the probabilities of an event that adds and of one that takes away; the others double
MOST_DOUBLED = 25
TEST_SEED, TRAIN_SEED = 1_000_003, 1_000_033
TEST_PROBLEMS, TRAIN_PROBLEMS = 256, 2048


@dataclass(frozen=True)
class Verb:
    told: str  # in the problem, with the amount
    named: str  # in the rationale
    operator: str
    misread: str | None = None  # the operator that the misled speaker takes; None: the right one


GAINS = (
    Verb("buys {} more", "buys", "+"),
    Verb("finds {}", "finds", "+"),
    Verb("gets {} from a friend", "gets", "+"),
    Verb("picks up {}", "picks up", "+"),
)
LOSSES = (
    Verb("loses {}", "loses", "-"),
    Verb("gives {} to a friend", "gives", "-", "+"),
    Verb("sells {}", "sells", "-", "+"),
    Verb("throws away {}", "throws away", "-"),
)
DOUBLINGS = (Verb("doubles the number", "doubles", "*", "+"), Verb("then has twice as many", "twice", "*", "+"))


@dataclass(frozen=True)
class Problem:
    name: str
    thing: str
    start: int
    events: tuple[tuple[Verb, int], ...]  # what happens, and the amount

    @property
    def text(self) -> str:
        first, second = (verb.told.format(amount) for verb, amount in self.events)
        return (
            f"{self.name} has {self.start} {self.thing}, {first}, and {second}. "
            f"How many {self.thing} does {self.name} have?"
        )

    @property
    def answer(self) -> int:
        value = self.start
        for verb, amount in self.events:
            value = reckon(value, verb.operator, amount)
        return value


def reckon(value: int, operator: str, amount: int) -> int:
    return {"+": value + amount, "-": value - amount, "*": value * amount}[operator]


def draw(rng: random.Random) -> Problem:
    """Draws a problem. No number falls below 1."""
    start = value = rng.randint(*STARTS)
    events = []
    for _ in range(2):
        kind = rng.random()
        if GAINED <= kind < GAINED + LOST and value > AMOUNTS[0] + 1:
            amount, verb = rng.randint(AMOUNTS[0], min(AMOUNTS[1], value - 1)), rng.choice(LOSSES)
        elif kind >= GAINED and value <= MOST_DOUBLED:
            amount, verb = 2, rng.choice(DOUBLINGS)
        else:
            amount, verb = rng.randint(*AMOUNTS), rng.choice(GAINS)
        value = reckon(value, verb.operator, amount)
        events.append((verb, amount))
    return Problem(rng.choice(NAMES), rng.choice(THINGS), start, tuple(events))


def rationale(problem: Problem, misled: bool, rng: random.Random) -> str:
    """A worked response, right or with the misconceptions, in words that are drawn."""
    value = problem.start
    parts = [rng.choice(OPENINGS).format(value)]
    for verb, amount in problem.events:
        operator = verb.misread or verb.operator if misled else verb.operator
        result = reckon(value, operator, amount)
        parts.append(f"{rng.choice(LINKS)} {verb.named}: {value}{operator}{amount}={result}.")
        value = result
    return " ".join(parts) + f"\nAnswer: {value}"


def problems(count: int, seed: int, without: Set[str] = frozenset()) -> list[Problem]:
    """Draws `count` problems of different texts, none of which is in `without`."""
    rng, drawn = random.Random(seed), {}
    while len(drawn) < count:
        problem = draw(rng)
        if problem.text not in without:
            drawn[problem.text] = problem
    return list(drawn.values())


@cache
def held_out() -> frozenset[str]:
    """The texts of the test problems, which nobody trains on."""
    return frozenset(problem.text for problem in problems(TEST_PROBLEMS, TEST_SEED))


def rows(split: str) -> list[dict[str, Any]]:
    """The problems of `train` or `test` as lines of a problem file. No text is in both."""
    test = split == "test"
    drawn = problems(TEST_PROBLEMS, TEST_SEED) if test else problems(TRAIN_PROBLEMS, TRAIN_SEED, held_out())
    return [{"id": f"{split}-{i}", "problem": p.text, "answer": str(p.answer)} for i, p in enumerate(drawn)]
