"""Token dumps: everything known about every token of some rollouts of an update, one JSON object per rollout.

    {"step", "sequence_id", "id", "vocab_size", "prompt", "teacher_prompt": None where the teacher reads the same,
     "answer", "response", "token_ids": [n], "tokens": [n texts],
     "turn": [n], "verdict": [n] where something judges the rollouts, null where it cannot, "weight": [n],
     "forward_share": [n], <TokenStats field>: [n], ..., <observer's column>: [n], ...,
     "student_top5": [n lists of [text, probability]], "teacher_top5": ...,
     "replies": {turn: what an environment said before it}}

n is the number of *counted* tokens of the response. Numbers are rounded to six digits; entropies and divergences are in
nats.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict

from opd.data import Rollout
from opd.errors import InputError
from opd.files import check, read_rows, write_whole
from opd.hooks import TokenStats, TokenWeights

MODELS = ("student", "teacher")
TOP5 = frozenset(f"{who}_top5_{what}" for who in MODELS for what in ("ids", "logprobs"))
DIVERGENCES = frozenset({"reverse_kl", "forward_kl", "total_variation"})
STATS = DIVERGENCES | {f"{who}_{what}" for who in MODELS for what in ("entropy", "logprob")}


def write(
    path: Path,
    rollouts: Sequence[Rollout],
    stats: TokenStats,
    weights: TokenWeights,
    columns: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Writes the dump of these rollouts, whole or not at all.

    Args:
        stats: statistics of all N tokens of the update, with the fields STATS and TOP5.
        columns: further columns by name, each (N,).
    """
    text = cache(lambda token: tokenizer.decode([token]))
    shown = {"turn": stats.turn, "weight": weights.weights, "forward_share": weights.forward_share}
    shown |= {name: vars(stats)[name] for name in sorted(STATS)} | dict(columns)
    lines = []
    for rollout in rollouts:
        rows = (stats.sequence_id == rollout.sequence_id).nonzero().squeeze(1)
        fields = vars(stats.rows(rows))
        ids = fields["token_id"].tolist()
        line = {
            "step": stats.step,
            "sequence_id": rollout.sequence_id,
            "id": rollout.prompt.id,
            "vocab_size": stats.vocab_size,
            "prompt": tokenizer.decode(rollout.prompt.token_ids),
            "teacher_prompt": rollout.prompt.privileged_ids and tokenizer.decode(rollout.prompt.privileged_ids),
            "answer": rollout.prompt.answer,
            "response": tokenizer.decode(rollout.response_ids),
            "token_ids": ids,
            "tokens": [text(i) for i in ids],
            **{name: _numbers(column[rows]) for name, column in shown.items() if column is not None},
            "replies": {str(turn): tokenizer.decode(reply) for turn, reply in _replies(rollout)},
        }
        for who in MODELS:
            top_ids, logprobs = (fields[f"{who}_top5_{what}"] for what in ("ids", "logprobs"))
            line[f"{who}_top5"] = [
                [[text(i), round(p, 6)] for i, p in zip(*likeliest, strict=True)]
                for likeliest in zip(top_ids.tolist(), logprobs.exp().tolist(), strict=True)
            ]
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(lines))


def _replies(rollout: Rollout) -> Iterator[tuple[int, tuple[int, ...]]]:
    """What an environment said before each turn of the model but the first, as token ids."""
    for turn, ((_, first), (end, _)) in enumerate(pairwise(rollout.turns), 1):
        yield turn, rollout.response_ids[first:end]


class Dump(TypedDict):
    """What `read` requires of a line; other statistics and the observer's columns may stand beside it."""

    step: int
    sequence_id: int
    id: str
    vocab_size: int
    prompt: str
    answer: str | None
    token_ids: list[int]
    tokens: list[str]
    weight: list[float]
    student_entropy: list[float]
    reverse_kl: list[float]
    forward_kl: list[float]
    student_top5: list[list[list[str | float]]]
    teacher_top5: list[list[list[str | float]]]


def read(path: Path) -> list[dict[str, Any]]:
    """The rollouts of a token dump. Raises InputError as `rows`."""
    return list(rows(path))


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rollouts of a token dump, one at a time, all with the same columns.

    Raises InputError naming the line that is wrong.
    """
    expected, columns = "a token dump", None
    for number, row in read_rows(path, expected):
        where = f"{path}, line {number}"
        check(row, Dump, where, expected)
        count = len(row["token_ids"])
        if uneven := [name for name, column in row.items() if isinstance(column, list) and len(column) != count]:
            raise InputError(f"{where}: {uneven[0]} is not as long as token_ids. Expected {expected}.")
        if row.keys() != (columns or row.keys()):
            raise InputError(f"{where}: it has other columns than the first line. Expected {expected}.")
        columns = row.keys()
        yield row


def _numbers(column: Tensor) -> list[float | None] | list[int]:
    if column.is_floating_point():
        return [None if math.isnan(number) else float(f"{number:.6g}") for number in column.tolist()]
    return column.int().tolist()
