"""Problems -> tokenised prompts. The chat template is applied here, and in opd/rollout/replies.py for what comes later.

Problem, Prompt and Rollout are declared here; they flow through a run before any tensor does.
"""

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from opd.cli import say
from opd.config import DataSection
from opd.errors import InputError
from opd.messages import read_messages
from opd.seeds import generator
from opd.sources import EXPECTED, read_source


@dataclass(frozen=True)
class Problem:
    """A row of a source."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    answer: str | None
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)  # all its fields
    where: str = field(default="", compare=False)  # the file and the line, for messages


@dataclass(frozen=True)
class Prompt:
    """A problem ready for a model."""

    id: str
    token_ids: tuple[int, ...]
    answer: str | None
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)  # the problem's fields, for an environment
    where: str = field(default="", compare=False)  # the file and the line, for messages
    messages: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)  # what the template made the prompt of
    privileged_ids: tuple[int, ...] | None = None  # what the teacher reads instead; None: it reads the same

    @property
    def teacher_ids(self) -> tuple[int, ...]:
        """The teacher's prompt."""
        return self.token_ids if self.privileged_ids is None else self.privileged_ids


@dataclass(frozen=True)
class Rollout:
    """A prompt and one sampled response, which is one turn, or a conversation with an environment.

    A conversation that was cut at the limit of its turns ends by "turns", at any other limit by "length". With "error"
    the environment could not answer; then nothing is learnt.
    """

    sequence_id: int  # place in its update or evaluation
    prompt: Prompt
    response_ids: tuple[int, ...]  # with the EOS id that ended it, and with what an environment said in between
    finish_reason: Literal["stop", "length", "turns", "error"]
    turns: tuple[tuple[int, int], ...] = ()  # [first, end) of what the model sampled; a single turn is all
    limit: str | None = None  # the setting that cut a conversation
    neutralised: int = 0  # texts of control tokens in what the environment said

    def __post_init__(self) -> None:
        if len(self.turns) < 2:
            object.__setattr__(self, "turns", ((0, len(self.response_ids)),))

    @property
    def model_tokens(self) -> int:
        """How many tokens the model sampled."""
        return sum(end - first for first, end in self.turns)

    @property
    def is_cut(self) -> bool:
        """Whether a limit ended it."""
        return self.finish_reason in ("length", "turns")


def read_problems(source: str | Path, prompt_field: str, answer_field: str | None) -> list[Problem]:
    """The problems of a source, as in opd.sources.read_source; an `answer_field` of None reads no answers.

    Raises InputError that names file and line or row for a row that lacks a field, and for a source without rows.
    """
    problems = []
    for row in read_source(source):
        messages = read_messages(_field(row.fields, prompt_field, row.where), prompt_field, row.where)
        answer = None
        if answer_field is not None:
            answer = _answer(_field(row.fields, answer_field, row.where), answer_field, row.where)
        ids = (row.fields.get("id"), row.fields.get("unique_id"), row.name)
        name = str(next(name for name in ids if name is not None))
        problems.append(Problem(name, messages, answer, row.fields, row.where))
    if not problems:
        raise InputError(f"{source}: no problems in it. Expected {EXPECTED}.")
    return problems


def _field(fields: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in fields:
        names = str(sorted(fields))[:300]
        raise InputError(f"{where}: no field {name[:80]!r}; it has {names}. Set the field's name in the config.")
    return fields[name]


def _answer(value: Any, field: str, where: str) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return format(Decimal(repr(value)), "f").removesuffix(".0")  # 42.0 of a column of floats is 42; no exponent
    if isinstance(value, bool) or not isinstance(value, str | int):
        got = json.dumps(value, default=str)[:80]
        raise InputError(f"{where}: field {field!r} is {got}, expected a string or a number.")
    return str(value)


def make_prompts(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    data: DataSection,
    source: str,
    instruction: str = "",
) -> list[Prompt]:
    """The prompts of problems, in order, without those that are longer than data.max_prompt_tokens.

    The chat template makes a prompt of the system prompt and the messages. `instruction` is appended to the last one.

    Args:
        source: where the problems are from, for messages.
    Raises:
        InputError: no prompt is short enough, or the chat template refuses the messages.
    """
    prompts = []
    for problem in problems:
        messages = [dict(message) for message in problem.messages]
        if instruction:
            messages[-1]["content"] = (messages[-1]["content"] or "") + instruction
        if data.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": data.system_prompt})
        ids = apply_template(messages, tokenizer, data, f"{source}, problem {problem.id}")
        if len(ids) <= data.max_prompt_tokens:
            prompts.append(Prompt(problem.id, ids, problem.answer, problem.row, problem.where, tuple(messages)))
    dropped = len(problems) - len(prompts)
    if not prompts:
        tools = ", in which the descriptions of the tools count" if "tools" in data.chat_template_args else ""
        raise InputError(
            f"{source}: all {dropped} prompts are longer than data.max_prompt_tokens = "
            f"{data.max_prompt_tokens}{tools}. Raise it, or use shorter problems."
        )
    if dropped:
        say(f"{source}: {dropped} of {len(problems)} prompts dropped, longer than {data.max_prompt_tokens} tokens")
    return prompts


def apply_template(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, data: DataSection, where: str
) -> tuple[int, ...]:
    """The ids of a prompt, by the chat template. Raises InputError that begins with `where` if it refuses them."""
    reserved = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"tools", "documents", "kwargs"}
    if misused := sorted(reserved & data.chat_template_args.keys()):
        raise InputError(
            f"data.chat_template_args sets {misused[0]!r}, which is no variable of the chat template but decides "
            "how it is applied. Remove it."
        )
    try:
        return tuple(
            tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False, **data.chat_template_args
            )
        )
    except Exception as error:  # a template is a program of the checkpoint's author: it can raise anything
        raise InputError(
            f"{where}: the chat template refuses it ({error}). Check data.system_prompt, data.chat_template_args, the "
            "messages' roles, and the template itself."
        ) from error


def read_training_prompts(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, in the order of the files, and the held-out ones. Raises InputError."""
    prompts = []
    for path in data.train:
        prompts += make_prompts(read_problems(path, data.prompt_field, data.answer_field), tokenizer, data, path)
    if data.validation >= len(prompts):
        raise InputError(
            f"data.validation is {data.validation} of {len(prompts)} prompts: none would be left to train on."
        )
    order = torch.randperm(len(prompts), generator=generator(seed, "validation")).tolist()
    held_out = set(order[: data.validation])
    validation = [replace(prompts[i], id=f"validation-{i}") for i in sorted(held_out)]
    return [p for i, p in enumerate(prompts) if i not in held_out], validation


def prompts_of_step(prompts: Sequence[Prompt], step: int, per_step: int, shuffle: bool, seed: int) -> list[Prompt]:
    """The prompts of update `step`, which counts from 1.

    One epoch follows another, each in an order of its own, and an update may span two epochs. The function depends on
    its arguments alone, so a resumed run needs no saved iterator.
    """
    chosen = []
    for index in range((step - 1) * per_step, step * per_step):
        epoch, place = divmod(index, len(prompts))
        chosen.append(prompts[_order(len(prompts), epoch, seed)[place] if shuffle else place])
    return chosen


@lru_cache(maxsize=2)
def _order(count: int, epoch: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, "order", epoch)).tolist()


def count_steps(prompts: Sequence[Any], per_step: int, epochs: int | None, steps: int | None) -> int:
    """How many updates a run makes: `steps`, or where that is None the whole updates that fit into `epochs` passes.

    Raises InputError if there is not one.
    """
    total = steps if steps is not None else len(prompts) * epochs // per_step
    if total == 0:
        raise InputError(
            f"{len(prompts)} prompts x {epochs} epochs are fewer than rollout.prompts_per_step = "
            f"{per_step}: not one update. Lower rollout.prompts_per_step or raise data.epochs."
        )
    return total
