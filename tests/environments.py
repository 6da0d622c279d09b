"""Environments for the tests, which configurations name as environments:CLASS, and a sampler of random turns."""

import os

import torch

from data.tiny import trip
from data.tiny.task import tokenizer_of
from opd.config import EnvironmentSection
from opd.data import Rollout
from opd.rollout.environment import Score
from opd.seeds import generator

SHOP = tokenizer_of(
    (
        "add",
        "drop",
        "pay",
        "paid",
        "total",
        "pen",
        "cup",
        "no",
        "such",
        "call",
        " ",
        "\n",
        *"0123456789",
        "user",
        "assistant",
        "tool",
    ),
    256,
)
LETTERS = tokenizer_of(("a", "b", "ab", " ", "\n", "?", "user", "assistant", "tool"), 256)  # "ab" has two spellings


class Echo:
    """Answers every turn with words that depend on all turns so far; some conversations are over earlier."""

    version = "echo-1"
    tools = ()

    def __init__(self, rounds=3, role="tool"):
        self.rounds, self.role = rounds, role

    def reply(self, problem, turns):
        if len(turns) > self.rounds or len("".join(turns)) % 7 == 0:
            return None
        words = [trip.NAMES[len(turn) % len(trip.NAMES)] for turn in turns]
        return [{"role": self.role, "content": "".join(words)}]

    def score(self, problem, turns):
        delivered = turns[-1] if len(turns) > 1 else None
        return Score(delivered is not None, min(len(turns) / 4, 1.0), delivered, {"spoke": bool(turns[-1])})


class Says(Echo):
    """Says the same again and again."""

    def __init__(self, contents, rounds=3, role="tool"):
        super().__init__(rounds, role)
        self.contents = contents

    def reply(self, problem, turns):
        return [{"role": self.role, "content": text} for text in self.contents] if len(turns) <= self.rounds else None


class Returns(Echo):
    """Returns something that is no reply, or raises it."""

    def __init__(self, said):
        self.said = said

    def reply(self, problem, turns):
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


class Judges(Echo):
    """Gives a verdict that is none, or raises it."""

    def __init__(self, verdict):
        super().__init__()
        self.verdict = verdict

    def score(self, problem, turns):
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict


class ByProcess(Echo):
    """Is not deterministic: its words depend on the process that asks."""

    def reply(self, problem, turns):
        return [{"role": "tool", "content": trip.NAMES[os.getpid() % 16]}] if len(turns) <= self.rounds else None


class WithTools(Echo):
    """Has tools that the prompt describes."""

    tools = ({"type": "function", "function": {"name": "trains", "parameters": {"type": "object"}}},)


class Cart(Echo):
    """A cart that the model fills by `add NAME NUMBER`, `drop NAME` and `pay`.

    A tool set with state keeps none: it replays the calls of all turns.
    """

    def reply(self, problem, turns):
        _, told = self._replayed(problem["prices"], turns)
        return None if told == "paid" else [{"role": "tool", "content": told}]

    def score(self, problem, turns):
        bought, told = self._replayed(problem["prices"], turns)
        parts = {name: bought.get(name, 0) == count for name, count in problem["wanted"].items()}
        parts["paid"] = told == "paid"
        return Score(all(parts.values()), sum(parts.values()) / len(parts), "paid" if parts["paid"] else None, parts)

    def _replayed(self, prices, turns):
        """The cart after these calls, and what the last one is answered with."""
        bought, told = {}, ""
        for call in turns:
            told = self._call(call, prices, bought)
        return bought, told

    def _call(self, call, prices, bought):
        """What a call is answered with. It changes the cart `bought`, from a name to a number."""
        match call.split(" "):
            case ["add", name, number] if name in prices and number.isdecimal():
                bought[name] = bought.get(name, 0) + int(number)
            case ["drop", name] if name in bought:
                del bought[name]
            case ["pay"]:
                return "paid"
            case _:
                return "no such call"
        return f"total {sum(prices[name] * count for name, count in bought.items())}"


class Unfinished:
    version = "1"

    def reply(self, problem, turns):
        return None


class Unnamed(Echo):
    version = ""


class Toolless(Echo):
    tools = ({"name": {1, 2}},)


class Broken:
    def __init__(self, file="none"):
        raise FileNotFoundError(f"there is no {file}")


class Scripted:
    """Draws random turns, which depend on seed and context; the share `end` of them ends with the EOS token."""

    def __init__(self, lm, end=0.8, ids=range(4, 60)):
        self.lm, self.end, self.ids = lm, end, tuple(ids)
        self.drawn, self.asked = [], []  # every call's responses, and its prompts, decoding and seeds

    def sample(self, prompts, decoding, vocab_size, seeds, advance=lambda responses, tokens: None):
        self.asked.append((list(prompts), decoding, list(seeds)))
        responses = [
            self._turn(prompt, seed, decoding, i) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        self.drawn.append(responses)
        advance(len(responses), sum(len(r.response_ids) for r in responses))
        return responses

    def _turn(self, prompt, seed, decoding, place):
        rng = generator(*seed, len(prompt.token_ids), sum(prompt.token_ids))
        draw = lambda high: int(torch.randint(high, (1,), generator=rng))  # noqa: E731
        most = decoding.max_response_tokens
        length = 1 + draw(most)
        ids = tuple(self.ids[draw(len(self.ids))] for _ in range(length))
        if draw(1000) < 1000 * self.end:
            return Rollout(place, prompt, (*ids[: most - 1], self.lm.eos_ids[0]), "stop")
        return Rollout(place, prompt, (ids * most)[:most], "length")


def section(name="environments:Echo", settings=None, turns=8, turn=6, reply=24):
    return EnvironmentSection(
        name=name, settings=settings or {}, max_turns=turns, max_turn_tokens=turn, max_reply_tokens=reply
    )
