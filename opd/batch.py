"""Rollouts -> micro-batches. No other file makes masks or shifts.

The hidden state of a causal model at input index i predicts the token at index i + 1. So token t of a response to a
prompt of P tokens is predicted at index P + t - 1. The prompt's last token predicts the first response token, and
nothing is predicted from the last response token. Only what the model sampled is counted: where an environment spoke,
t has gaps, and the first token of a turn is predicted from the environment's last one.

A row of a micro-batch holds one sequence, or several one after the other. Each of these sees only itself: positions
begin at 0 again where a sequence begins, and by that a model knows them apart. What a row lacks at its end is padding.
It needs no mask, because a causal model never looks ahead.

Where the teacher reads other prompts, it has micro-batches of its own, with the same sequences in the same rows. Its
hidden states line up with the student's token by token, wherever the two stand in their rows.

Shapes: B rows of a micro-batch, T positions of the longest sequence, S sequences, N counted response tokens.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd import distributed
from opd.data import Prompt, Rollout
from opd.seeds import derive_seed

FACTS = ("sequence_id", "position", "turn", "token_id", "prompt_id", "length", "truncated")


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through a model together, padded on the right."""

    input_ids: Tensor  # (B, T) int64
    position_ids: Tensor | None  # (B, T) int64, 0 where a sequence begins; None where each row holds one sequence
    rows: Tensor  # (N,) int64, first index in (B, T) of the hidden state that predicts the token
    columns: Tensor  # (N,) int64, second index in (B, T) of that hidden state
    facts: dict[str, Tensor]  # (N,) int64 each: the columns of TokenStats that are known without a model
    rollouts: tuple[Rollout, ...]  # those that the tokens belong to
    privileged: "MicroBatch | None" = None  # the same tokens behind the teacher's prompts; None: it reads the same ones

    @property
    def for_teacher(self) -> "MicroBatch":
        """What the teacher reads. Its hidden states are those of this micro-batch's tokens, in their order."""
        return self if self.privileged is None else self.privileged

    @property
    def token_ids(self) -> Tensor:
        """The predicted response tokens."""
        return self.facts["token_id"]

    @property
    def sequence_id(self) -> Tensor:
        """The rollouts that the tokens belong to."""
        return self.facts["sequence_id"]

    @property
    def position(self) -> Tensor:
        """The places of the tokens in their responses, from 0."""
        return self.facts["position"]

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """What a model of transformers is called with.

        Of a row with several sequences, sdpa and eager make their mask from the positions, and only without an
        attention mask. The kernels of flash attention read where sequences begin in the rows laid end to end.
        """
        inputs = {"input_ids": self.input_ids.to(device)}
        if self.position_ids is None:
            return inputs
        begins = (self.position_ids.flatten() == 0).nonzero().squeeze(1)
        bounds = torch.cat([begins, torch.tensor([self.position_ids.numel()])]).int()
        longest = int(bounds.diff().max())
        bounds = bounds.to(device)
        return inputs | {
            "position_ids": self.position_ids.to(device),
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def counted_tokens(rollout: Rollout, truncated: str) -> int:
    """How many of the tokens that the model sampled, from the first one, take part in the loss.

    `truncated` is the configuration's rollout.truncated and decides about responses that were cut at a limit. Of a
    conversation that an environment broke, none take part.
    """
    if rollout.finish_reason == "error":
        return 0
    length = rollout.model_tokens
    if not rollout.is_cut or truncated == "keep":
        return length
    first, end = rollout.turns[-1]
    return 0 if truncated == "drop" else length - repeated_tail(rollout.response_ids[first:end])


def facts_of(rollout: Rollout, count: int) -> dict[str, Tensor]:
    """The facts of the first `count` tokens that the model sampled, (count,) int64 each."""
    position = torch.cat([torch.arange(first, end) for first, end in rollout.turns])[:count]
    turns = torch.arange(len(rollout.turns))
    same = {
        "sequence_id": rollout.sequence_id,
        "prompt_id": derive_seed(rollout.prompt.id, *rollout.prompt.token_ids),
        "length": rollout.model_tokens,
        "truncated": int(rollout.is_cut),
    }
    return {
        **{name: torch.full((count,), fact) for name, fact in same.items()},
        "position": position,
        "turn": turns.repeat_interleave(torch.tensor([end - first for first, end in rollout.turns]))[:count],
        "token_id": torch.tensor(rollout.response_ids)[position],
    }


def repeated_tail(ids: Sequence[int]) -> int:
    """How many tokens at the end only repeat what stands before them.

    A repetition counts from three rounds on, and its first round is not part of the result: `a b c x y x y x y` ends
    with three rounds of `x y`, so the result is 4.

    The Z-function of the reversed text finds the repetition in linear time. If the last z tokens equal the z tokens
    that end p places earlier, then the last z + p tokens have period p. The result is the largest z with z >= 2 p.
    """
    text = ids[::-1]
    z = [0] * len(text)
    left = right = longest = 0
    for p in range(1, len(text)):
        if p < right:
            z[p] = min(right - p, z[p - left])
        while p + z[p] < len(text) and text[z[p]] == text[p + z[p]]:
            z[p] += 1
        if p + z[p] > right:
            left, right = p, p + z[p]
        if z[p] >= 2 * p:
            longest = max(longest, z[p])
    return longest


def make_micro_batches(
    rollouts: Sequence[Rollout], max_tokens: int, pad_id: int, truncated: str, packed_row: int = 0
) -> list[MicroBatch]:
    """Cuts rollouts, longest first, into micro-batches whose B * T stays within `max_tokens`; a longer one goes alone.

    Rollouts without a counted token are left out. Where the longest sequence of a micro-batch has at most `packed_row`
    tokens, shorter ones share rows. A sequence is as long as the longer of what student and teacher read, so both stay
    within these limits. The layout changes neither loss nor gradient.
    """
    counted = {rollout.sequence_id: counted_tokens(rollout, truncated) for rollout in rollouts}
    left = _longest_first([r for r in rollouts if counted[r.sequence_id]])
    batches = []
    while left:
        rows = _take_rows(left, max_tokens, packed_row)
        batch = _collate(rows, counted, pad_id, _students_ids)
        if any(rollout.prompt.privileged_ids is not None for rollout in batch.rollouts):
            batch = replace(batch, privileged=_collate(rows, counted, pad_id, _teachers_ids))
        batches.append(batch)
    return batches


def _take_rows(left: list[Rollout], max_tokens: int, packed_row: int) -> list[list[Rollout]]:
    """Takes the rows of one micro-batch out of `left`, which is sorted longest first.

    A row begins with the longest rollout that is left. If rows are shared, the longest one that fits follows, and so
    on: this is first fit by decreasing length.
    """
    width = _length(left[0])
    rows: list[list[Rollout]] = []
    while left and (not rows or (len(rows) + 1) * width <= max_tokens):
        row = [left.pop(0)]
        free = width - _length(row[0])
        while width <= packed_row:
            place = bisect_left(left, -free, key=lambda rollout: -_length(rollout))
            if place == len(left):
                break
            row.append(left.pop(place))
            free -= _length(row[-1])
        rows.append(row)
    return rows


def share_of_rank(rollouts: Sequence[Rollout], rank: int, ranks: int) -> list[Rollout]:
    """The rollouts that one of several processes trains on: equally many, and about equally many tokens, for each.

    The rollouts are dealt longest first, forwards and then backwards: 0 1 2 2 1 0 0 1 2. So the micro-batches that
    processes run at the same time are of about the same length, and the processes wait little for each other.
    """
    rounds = range(-(-len(rollouts) // ranks))
    places = (n * ranks + (rank if n % 2 == 0 else ranks - 1 - rank) for n in rounds)
    order = _longest_first(rollouts)
    return [order[place] for place in places if place < len(order)]


def equally_many(batches: Sequence[MicroBatch], pad_id: int) -> list[MicroBatch]:
    """The micro-batches of this process, filled up with empty ones to as many as any process has, and at least one.

    A model that is split over the processes runs on all of them or on none. An empty micro-batch gives the columns of
    an update without tokens their names, dtypes and widths.
    """
    missing = max(1, int(distributed.largest(len(batches)))) - len(batches)
    return [*batches, *[empty_micro_batch(pad_id)] * missing]


def empty_micro_batch(pad_id: int) -> MicroBatch:
    """A micro-batch of one padded token that predicts nothing."""
    none = torch.zeros(0, dtype=torch.long)
    facts = dict.fromkeys(FACTS, none)
    return MicroBatch(torch.full((1, 1), pad_id), None, none, none, facts, ())


def _students_ids(prompt: Prompt) -> tuple[int, ...]:
    return prompt.token_ids


def _teachers_ids(prompt: Prompt) -> tuple[int, ...]:
    return prompt.teacher_ids


def _length(rollout: Rollout) -> int:
    """Tokens of prompt and response, with the longer one of the two prompts."""
    return max(len(rollout.prompt.token_ids), len(rollout.prompt.teacher_ids)) + len(rollout.response_ids)


def _longest_first(rollouts: Sequence[Rollout]) -> list[Rollout]:
    return sorted(rollouts, key=lambda rollout: (-_length(rollout), rollout.sequence_id))


def _collate(
    rows: Sequence[Sequence[Rollout]],
    counted: dict[int, int],
    pad_id: int,
    prompt_ids: Callable[[Prompt], tuple[int, ...]],
) -> MicroBatch:
    """One micro-batch of rows of rollouts; `counted` maps a sequence id to the number of its counted tokens.

    `prompt_ids` gives the prompt that is read, of the student or of the teacher.
    """
    read = [[(rollout, prompt_ids(rollout.prompt)) for rollout in row] for row in rows]
    width = max(sum(len(prompt) + len(rollout.response_ids) for rollout, prompt in row) for row in read)
    input_ids_BT = torch.full((len(rows), width), pad_id)
    position_ids_BT = torch.arange(width).repeat(len(rows), 1)  # padding goes on as the sequence before it
    places: list[tuple[int, int, Rollout]] = []  # row, its column that predicts the first response token, and whose
    for number, row in enumerate(read):
        begin = 0
        for rollout, prompt in row:
            end = begin + len(prompt) + len(rollout.response_ids)
            input_ids_BT[number, begin:end] = torch.tensor(prompt + rollout.response_ids)
            position_ids_BT[number, begin:] = torch.arange(width - begin)
            places.append((number, begin + len(prompt) - 1, rollout))
            begin = end
    counted_S = torch.tensor([counted[rollout.sequence_id] for _, _, rollout in places])
    facts = [facts_of(rollout, counted[rollout.sequence_id]) for _, _, rollout in places]
    facts_N = {name: torch.cat([columns[name] for columns in facts]) for name in FACTS}
    first_S = torch.tensor([first for _, first, _ in places])
    return MicroBatch(
        input_ids=input_ids_BT,
        position_ids=position_ids_BT if len(places) > len(rows) else None,
        rows=torch.tensor([number for number, _, _ in places]).repeat_interleave(counted_S),
        columns=first_S.repeat_interleave(counted_S) + facts_N["position"],
        facts=facts_N,
        rollouts=tuple(rollout for _, _, rollout in places),
    )
