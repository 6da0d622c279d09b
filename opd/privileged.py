"""Privileged prompts: what only the teacher reads of a problem (data.teacher_prompt).

The student's prompt stays as it is. The teacher's has a text of the row's fields beside it, such as a reference
solution, through the same chat template. The response is the same ids for both, so nothing but the teacher's context
differs. Of a conversation with an environment the first prompt differs, and what follows is the same ids.

A prompt of the teacher is never cut.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd.benchmarks import LoadedBenchmark
from opd.cli import say
from opd.config import Config, DataSection
from opd.data import Prompt, apply_template
from opd.errors import InputError
from opd.models import LanguageModel

LACKS, LONG = "lacks", "long"  # why a teacher has no prompt of its own for a row
PLAIN = "the teacher reads the student's prompt there"


@dataclass(frozen=True)
class Template:
    """A text with places for fields of a row."""

    parts: tuple[tuple[str, str | None], ...]  # a literal text and the field behind it; None where none follows

    @property
    def fields(self) -> list[str]:
        return [name for _, name in self.parts if name is not None]

    def fill(self, row: Mapping[str, Any], where: str) -> str | None:
        """The text of a row; None for a row that lacks a field.

        A field that is null or blank counts as missing. Raises InputError that begins with `where` for one that is
        neither a text nor a number.
        """
        texts = []
        for literal, name in self.parts:
            value = "" if name is None else _text(row.get(name), name, where)
            if name is not None and not value.strip():
                return None
            texts.append(literal + value)
        return "".join(texts)


def read_template(text: str) -> Template:
    """The template of a text with `{field}` in it. Raises InputError for braces that name no field."""
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise InputError(
            f"data.teacher_prompt.template: {error}. A brace of the text itself is written twice."
        ) from None
    for _, name, spec, conversion in parsed:
        if name is not None and (not name.strip() or spec or conversion):
            got = f"{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
            raise InputError(
                f"data.teacher_prompt.template has {{{got[:80]}}}, expected the name of a field between the braces. A "
                "brace of the text itself is written twice."
            )
    return Template(tuple((literal, name) for literal, name, _, _ in parsed))


def _text(value: Any, name: str, where: str) -> str:
    if value is None:
        return ""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number and not isinstance(value, str):
        got = json.dumps(value, default=str)[:80]
        raise InputError(
            f"{where}: field {name[:80]!r} is {got}, expected a text or a number, because data.teacher_prompt.template "
            "names it."
        )
    return str(value)


def with_text(messages: Sequence[Mapping[str, Any]], text: str, role: str, where: str) -> list[dict[str, Any]]:
    """The messages with a privileged text, as data.teacher_prompt.role says.

    Raises InputError that begins with `where` where no message of the user takes it.
    """
    changed = [dict(message) for message in messages]
    if role == "system":
        if not changed or changed[0]["role"] != "system":
            return [{"role": "system", "content": text}, *changed]
        place = 0
    else:
        places = [i for i, message in enumerate(changed) if message["role"] == "user"]
        if not places:
            raise InputError(
                f"{where}: no message is of the role user, so data.teacher_prompt has no place in it. Set its role to "
                '"system".'
            )
        place = places[-1]
    changed[place]["content"] = (changed[place]["content"] or "") + text
    return changed


def for_training(
    prompts: Sequence[Prompt], config: Config, data: DataSection, student: LanguageModel, teacher: LanguageModel
) -> list[Prompt]:
    """Prompts to train on, with what the teacher reads; those that data.teacher_prompt drops are left out.

    Args:
        data: the section that made the student's prompts, which has the tools of an environment among its variables.
    Raises:
        InputError: a field is missing, or no prompt of the teacher differs from the student's.
    """
    if config.data.teacher_prompt is None:
        return list(prompts)
    source, reader = ", ".join(data.train), _Reader(data, student.tokenizer)
    limit = reader.limit(teacher, config.rollout.max_response_tokens)
    read = [reader.read(prompt, limit) for prompt in prompts]
    unknown = [name for name in reader.template.fields if all(name not in prompt.row for prompt in prompts)]
    if unknown:
        raise InputError(_missing(unknown[0], prompts[0].row, f"no row of {source} has it"))
    plain = data.teacher_prompt.missing == "plain"
    left = [prompt for prompt, fault in read if fault is None or (fault == LACKS and plain)]
    _tell(read, source, {LACKS: PLAIN if plain else "they are dropped", LONG: "they are dropped"}, limit)
    if not any(prompt.privileged_ids for prompt in left):
        raise InputError(
            f"{source}: {len(left)} prompts are left, and in none of them the teacher reads another one than the "
            "student. Check data.teacher_prompt: max_tokens, the fields of the template, and whether the chat template "
            f"shows a message of the role {data.teacher_prompt.role}."
        )
    return left


def for_benchmark(
    loaded: LoadedBenchmark, config: Config, student: LanguageModel, teacher: LanguageModel
) -> LoadedBenchmark:
    """A benchmark with what the teacher reads. None of its prompts is left out.

    Raises InputError for a missing field where data.teacher_prompt.missing is error.
    """
    if config.data.teacher_prompt is None:
        return loaded
    reader = _Reader(loaded.dialogue.data if loaded.dialogue else config.data, student.tokenizer)
    limit = reader.limit(teacher, loaded.benchmark.max_response_tokens)
    read = [reader.read(prompt, limit) for prompt in loaded.prompts]
    _tell(read, f"benchmark {loaded.name}", {LACKS: PLAIN, LONG: PLAIN}, limit)
    return replace(loaded, prompts=[prompt for prompt, _ in read])


def as_the_teacher_reads(loaded: LoadedBenchmark) -> LoadedBenchmark:
    """The benchmark of a teacher, whose prompts are the teacher's."""
    prompts = [replace(prompt, token_ids=prompt.teacher_ids, privileged_ids=None) for prompt in loaded.prompts]
    return replace(loaded, prompts=prompts)


class _Reader:
    """Makes the teacher's prompts. Raises InputError for a template that cannot be read."""

    def __init__(self, data: DataSection, tokenizer: PreTrainedTokenizerBase):
        self.data, self.tokenizer, self.template = data, tokenizer, read_template(data.teacher_prompt.template)

    def limit(self, teacher: LanguageModel, response: int) -> int:
        """Tokens of the longest prompt that fits into the teacher's context with a response of so many tokens."""
        most = self.data.teacher_prompt.max_tokens
        return most if teacher.context is None else min(most, teacher.context - response)

    def read(self, prompt: Prompt, limit: int) -> tuple[Prompt, str | None]:
        """The prompt with what the teacher reads, or as it is with the fault LACKS or LONG.

        Raises InputError for a missing field where data.teacher_prompt.missing is error.
        """
        where = prompt.where or f"prompt {prompt.id}"
        text = self.template.fill(prompt.row, where)
        if text is None:
            if self.data.teacher_prompt.missing == "error":
                lacking = next(n for n in self.template.fields if not _text(prompt.row.get(n), n, where).strip())
                raise InputError(_missing(lacking, prompt.row, f"{where} lacks it, or it is empty there"))
            return prompt, LACKS
        messages = with_text(prompt.messages, text, self.data.teacher_prompt.role, where)
        ids = apply_template(messages, self.tokenizer, self.data, where)
        if len(ids) > limit:
            return prompt, LONG
        return replace(prompt, privileged_ids=None if ids == prompt.token_ids else ids), None


def _missing(name: str, row: Mapping[str, Any], what: str) -> str:
    return (
        f"data.teacher_prompt.template names the field {name[:80]!r}: {what}. There are {str(sorted(row))[:300]}. Name "
        'one of them, or set data.teacher_prompt.missing to "drop" or "plain".'
    )


def _tell(read: Sequence[tuple[Prompt, str | None]], source: str, then: Mapping[str, str], limit: int) -> None:
    """Says how many prompts have a fault, what follows, and in how many rows student and teacher read the same."""
    counts = Counter(fault for _, fault in read)
    if counts[LACKS]:
        say(f"{source}: {counts[LACKS]} of {len(read)} rows lack a field of data.teacher_prompt; {then[LACKS]}")
    if counts[LONG]:
        say(f"{source}: {counts[LONG]} of {len(read)} teacher prompts are longer than {limit} tokens; {then[LONG]}")
    same = sum(prompt.privileged_ids is None for prompt, fault in read if then.get(fault, PLAIN) == PLAIN)
    if same:
        say(f"warning: {source}: student and teacher read the same prompt in {same} of {len(read)} rows")
