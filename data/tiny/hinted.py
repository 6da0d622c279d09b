"""A pair with one model, for self-distillation: right when its prompt holds a worked solution, and careless without.

The problems and the words are those of the chain task. Half of the conversations that the model learns show a worked
solution behind the problem, and are answered rightly. The others are answered with both kinds of mistakes. So the model
that reads a solution can teach itself what it does when it reads none. The row's field `hint` holds the solution, in
words that never change, so how a response is worded cannot be copied from it.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from data.tiny import planning, task
from data.tiny.recipe import Recipe
from data.tiny.task import END, STUDENT, Speaker
from data.tiny.trip import Piece

__all__ = ["END", "STUDENT", "row", "tokenizer", "train_model"]
PLAIN_WORDS = Speaker((1.0, 0.0), (1.0, 0.0, 0.0, 0.0, 0.0, 0.0), corrupt=False)
BETWEEN = "\n"  # stands between problem and solution


def row(rng: random.Random) -> dict[str, str]:
    """Draws a problem as a row without an id."""
    drawn = task.row(rng)
    return drawn | {"hint": task.response(drawn["problem"], PLAIN_WORDS, random.Random(0))}


def tokenizer() -> PreTrainedTokenizerFast:
    """The chain task's: one token per symbol or word."""
    return task.tokenizer()


def train_model(
    name: str, task: ModuleType, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Qwen3ForCausalLM:
    """Trains the model as those of the pair `planning`, which copy too, on prompts with and without a solution."""
    lesson = SimpleNamespace(row=_lesson, conversation=_conversation)
    return planning.train_model(name, lesson, recipe, tokenizer, seed)


def _lesson(rng: random.Random) -> dict[str, Any]:
    drawn, shown = row(rng), rng.random() < 0.5
    prompt = drawn["problem"] + (BETWEEN + drawn["hint"] if shown else "")
    return {"problem": prompt, "asked": drawn["problem"], "shown": shown}


def _conversation(lesson: Mapping[str, Any], speaker: Speaker, rng: random.Random) -> Iterator[list[Piece] | str]:
    said = task.response(lesson["asked"], replace(speaker, corrupt=not lesson["shown"]), rng)
    yield [Piece(said + END, True)]
