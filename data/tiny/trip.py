"""A task with tools and turns: plan a trip, and know its price.

A problem is `train dawn hotel gym meal curry in Dov near pier ?`: a wish of each kind, a city and a place. Every
problem has a small database of its own, in its row and never in its prompt. Three tools look it up: `call trains CITY
WISH `, `call hotels CITY WISH ` and `call meals PLACE WISH `. The answer is a name and a price, `p 5`, or `none `. The
teacher asks for one offer after the other and writes each down with the sum so far, `train dawn p 5sum 05`. It ends
with `plan train dawn p hotel gym f meal curry j 12`. A word of style opens every turn and changes nothing.

The corrupted student has two kinds of faults. A *misconception*, nine times in ten: it looks for `spa` when `pool` was
asked and for `thai` when `sushi` was, and for some places it looks for meals in the city, where there are none. And
*carelessness*: every other time it takes `dawn` for `noon` and `dusk` for `night`. The teacher's training text holds
planted mistakes of both kinds, which it does not learn and after which it learns to go on. So it is a teacher in the
student's contexts as well.

The student of the pair `planning_absolute` has misconceptions that show always: it gives the right call no probability.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerFast

from data.tiny.task import END, ORDERS, tokenizer_of
from opd.rollout.environment import Score

CITIES = ("Ava ", "Bo ", "Cy ", "Dov ")
PLACES = ("dam ", "zoo ", "inn ", "pier ", "hill ", "lake ")
NAMES = tuple(f"{letter} " for letter in "abcdefghijklmnop")
WISHES = {
    "train ": ("dawn ", "noon ", "dusk ", "night "),
    "hotel ": ("pool ", "spa ", "gym ", "bar "),
    "meal ": ("thai ", "sushi ", "pasta ", "curry "),
}
TOOLS = {"train ": "trains ", "hotel ": "hotels ", "meal ": "meals "}
DEAREST = 6
LOOKS, WRITES, PLANS, NOTHING = "call ", "sum ", "plan ", "none "
WORDS = (
    *"0123456789",
    "\n",
    "?",
    "in ",
    "near ",
    LOOKS,
    WRITES,
    PLANS,
    NOTHING,
    *ORDERS,
    *CITIES,
    *PLACES,
    *NAMES,
    *WISHES,
    *TOOLS.values(),
    *(wish for wishes in WISHES.values() for wish in wishes),
    "user",
    "assistant",
    "tool",
    "system",
)
CONTEXT = 256  # tokens
MISTAKEN = {"pool ": "spa ", "sushi ": "thai "}
WITHOUT_MEALS = ("zoo ", "pier ")  # there the student looks for meals in the city
CARELESS = {"dawn ": "noon ", "dusk ": "night "}
PARTS = ("train", "hotel", "meal", "total")


@dataclass(frozen=True)
class Speaker:
    """How one model's training text is drawn."""

    orders: tuple[float, ...]  # the probabilities of the words of style
    corrupt: bool  # with the student's faults
    planted: float  # the probability of a mistake, of either kind, before each call; it is not learnt from
    convinced: float = 0.9  # how often a misconception of a corrupt speaker shows


TEACHER = Speaker((0.30, 0.25, 0.15, 0.15, 0.10, 0.05), corrupt=False, planted=0.1)
STUDENT = Speaker((0.20, 0.20, 0.15, 0.20, 0.15, 0.10), corrupt=True, planted=0.0)
ABSOLUTE = replace(STUDENT, convinced=1.0)


def row(rng: random.Random) -> dict[str, Any]:
    """Draws a problem with its database, as a row without an id."""
    city, place = rng.choice(CITIES), rng.choice(PLACES)
    wishes = {kind: rng.choice(offered) for kind, offered in WISHES.items()}
    names = iter(rng.sample(NAMES, sum(map(len, WISHES.values()))))
    database = {
        TOOLS[kind]: {_where(kind, city, place): {wish: [next(names), rng.randint(1, DEAREST)] for wish in offered}}
        for kind, offered in WISHES.items()
    }
    wanted = "".join(kind + wish for kind, wish in wishes.items())
    text = f"{wanted}in {city}near {place}?"
    drawn = {"problem": text, "city": city, "place": place, "wishes": wishes, "database": database}
    return drawn | {"answer": plan(drawn)}


def _where(kind: str, city: str, place: str) -> str:
    """Meals are looked for near the place, everything else in the city."""
    return place if kind == "meal " else city


def look_up(row: Mapping[str, Any], tool: str, where: str, wish: str) -> list[Any] | None:
    """Name and price of an offer; None where there is none."""
    return row["database"].get(tool, {}).get(where, {}).get(wish)


def plan(row: Mapping[str, Any]) -> str:
    """The right answer: the offer for every wish, and their price in two digits."""
    text, total = "", 0
    for kind, wish in row["wishes"].items():
        name, price = look_up(row, TOOLS[kind], _where(kind, row["city"], row["place"]), wish)
        text, total = f"{text}{kind}{wish}{name}", total + price
    return f"{text}{total:02d}"


@dataclass(frozen=True)
class Piece:
    """A piece of a training text."""

    text: str
    learnt: bool


def conversation(row: Mapping[str, Any], speaker: Speaker, rng: random.Random) -> Iterator[list[Piece] | str]:
    """A conversation in the speaker's words: the pieces of a turn, what the tools say to it, and so on."""
    written, total, opening = "", 0, [Piece(_style(speaker, rng), True)]
    for kind, wish in row["wishes"].items():
        tool = TOOLS[kind]
        where, asked = _where(kind, row["city"], row["place"]), wish
        elsewhere = row["place"] if where == row["city"] else row["city"]
        if speaker.corrupt:
            where, asked = _with_faults(kind, where, elsewhere, asked, speaker.convinced, rng)
        if rng.random() < speaker.planted:  # looks in the wrong place, and then again
            yield [*opening, Piece(f"{LOOKS}{tool}", True), Piece(elsewhere, False), Piece(asked + END, True)]
            yield NOTHING
            opening = [Piece(_style(speaker, rng), True)]
        planted = rng.random() < speaker.planted  # looks for something else, and goes on with what it has got
        asked = rng.choice(WISHES[kind]) if planted else asked
        yield [*opening, Piece(f"{LOOKS}{tool}{where}", True), Piece(asked, not planted), Piece(END, True)]
        found = look_up(row, tool, where, asked)
        yield _told(found)
        name, price = found or (NOTHING, 0)
        total += price
        written += f"{kind}{asked}{name}"
        line = f"{_style(speaker, rng)}{kind}{asked}{name}{price if found else ''}{WRITES}{total:02d}\n"
        opening = [Piece(line, True)]
    yield [*opening, Piece(f"{PLANS}{written}{total:02d}{END}", True)]


def _style(speaker: Speaker, rng: random.Random) -> str:
    return rng.choices(ORDERS, speaker.orders)[0]


def _with_faults(
    kind: str, where: str, elsewhere: str, wish: str, convinced: float, rng: random.Random
) -> tuple[str, str]:
    """Where the student looks, and for what."""
    if kind == "meal " and where in WITHOUT_MEALS and rng.random() < convinced:
        where = elsewhere
    if wish in MISTAKEN and rng.random() < convinced:
        wish = MISTAKEN[wish]
    elif wish in CARELESS and rng.random() < 0.5:
        wish = CARELESS[wish]
    return where, wish


def _told(found: Sequence[Any] | None) -> str:
    return NOTHING if found is None else f"{found[0]}{found[1]}"


class Trip:
    """The environment: it looks offers up in the problem's database, and compares the plan with the right one."""

    version = "trip-1"
    tools = ()  # the models know the calls from their training; their prompts need not describe them

    def reply(self, problem: Mapping[str, Any], turns: Sequence[str]) -> list[dict[str, str]] | None:
        """The offer that the last turn asks for; None where it asks for nothing, which ends the conversation."""
        _, call, arguments = turns[-1].rpartition(LOOKS)
        if not call:
            return None
        words = [f"{word} " for word in arguments.split(" ")]
        found = look_up(problem, *words[:3]) if len(words) > 3 else None  # the last word is what follows the space
        return [{"role": "tool", "content": _told(found)}]

    def score(self, problem: Mapping[str, Any], turns: Sequence[str]) -> Score:
        """Which of train, hotel, meal and total the plan of the last turn has right."""
        _, planned, text = turns[-1].rpartition(PLANS)
        right, said = problem["answer"].split(" "), text.split(" ")
        said += [""] * len(right)
        parts = {part: bool(planned) and said[i] == right[i] for part, i in zip(PARTS, (2, 5, 8, 9), strict=True)}
        return Score(all(parts.values()), sum(parts.values()) / len(parts), text if planned else None, parts)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per symbol or word, 76 ids."""
    return tokenizer_of(WORDS, CONTEXT)
