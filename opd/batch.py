"""Rollouts -> micro-batches. No other file makes masks or shifts.

The hidden state of a causal model at input index i predicts the token at index i + 1. So token t of a response to a
prompt of P tokens is predicted at index P + t - 1. The prompt's last token predicts the first response token, and
nothing is predicted from the last response token.

Shapes: B rollouts of a micro-batch, T positions of the longest one, N counted response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd import distributed
from opd.data import Rollout
from opd.seeds import derive_seed


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through a model together, padded on the right."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 on prompt and response; it alone says what is padding
    rows: Tensor  # (N,) int64, first index in (B, T) of the hidden state that predicts the token
    columns: Tensor  # (N,) int64, second index in (B, T) of that hidden state
    token_ids: Tensor  # (N,) int64, the predicted response tokens
    sequence_id: Tensor  # (N,) int64, the rollout that the token belongs to
    position: Tensor  # (N,) int64, place of the token in its response, from 0
    rollouts: tuple[Rollout, ...]  # those that the tokens belong to


def counted_tokens(rollout: Rollout, truncated: str) -> int:
    """How many tokens of a response, from its first one, take part in the loss.

    `truncated` is the configuration's rollout.truncated and decides about responses that were cut at the length limit.
    """
    length = len(rollout.response_ids)
    if rollout.finish_reason == "stop" or truncated == "keep":
        return length
    return 0 if truncated == "drop" else length - repeated_tail(rollout.response_ids)


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


def make_micro_batches(rollouts: Sequence[Rollout], max_tokens: int, pad_id: int, truncated: str) -> list[MicroBatch]:
    """Packs rollouts, longest first, so that B * T stays within `max_tokens`; a longer rollout goes alone.

    Rollouts without a counted token are left out. The packing changes neither loss nor gradient.
    """
    counted = {rollout.sequence_id: counted_tokens(rollout, truncated) for rollout in rollouts}
    groups: list[list[Rollout]] = []
    for rollout in _longest_first([r for r in rollouts if counted[r.sequence_id]]):
        if groups and (len(groups[-1]) + 1) * _length(groups[-1][0]) <= max_tokens:
            groups[-1].append(rollout)
        else:
            groups.append([rollout])
    return [_collate(group, counted, pad_id) for group in groups]


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
    return MicroBatch(torch.full((1, 1), pad_id), torch.ones(1, 1, dtype=torch.long), none, none, none, none, none, ())


def known_columns(batch: MicroBatch) -> dict[str, Tensor]:
    """The (N,) columns of TokenStats that are known before a model runs, by name. No verdict is known yet."""
    by_id = {rollout.sequence_id: rollout for rollout in batch.rollouts}
    ids, which_N = batch.sequence_id.unique(return_inverse=True)
    rollouts = [by_id[i] for i in ids.tolist()]
    prompts = [derive_seed(*rollout.prompt.token_ids) for rollout in rollouts]
    return {
        "sequence_id": batch.sequence_id,
        "position": batch.position,
        "token_id": batch.token_ids,
        "prompt_id": torch.tensor(prompts, dtype=torch.long)[which_N],
        "turn": torch.zeros_like(batch.position),
        "length": torch.tensor([len(r.response_ids) for r in rollouts], dtype=torch.long)[which_N],
        "truncated": torch.tensor([r.finish_reason == "length" for r in rollouts], dtype=torch.long)[which_N],
        "verdict": torch.full(batch.position.shape, torch.nan),
    }


def _length(rollout: Rollout) -> int:
    """Tokens of prompt and response."""
    return len(rollout.prompt.token_ids) + len(rollout.response_ids)


def _longest_first(rollouts: Sequence[Rollout]) -> list[Rollout]:
    return sorted(rollouts, key=lambda rollout: (-_length(rollout), rollout.sequence_id))


def _collate(group: Sequence[Rollout], counted: dict[int, int], pad_id: int) -> MicroBatch:
    """One micro-batch of a group of rollouts; `counted` maps a sequence id to the number of its counted tokens."""
    sequences = [rollout.prompt.token_ids + rollout.response_ids for rollout in group]
    input_ids_BT = torch.full((len(group), max(map(len, sequences))), pad_id)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    for row, ids in enumerate(sequences):
        input_ids_BT[row, : len(ids)] = torch.tensor(ids)
        attention_mask_BT[row, : len(ids)] = 1
    counted_B = torch.tensor([counted[rollout.sequence_id] for rollout in group])
    prompt_lengths_B = torch.tensor([len(rollout.prompt.token_ids) for rollout in group])
    sequence_ids_B = torch.tensor([rollout.sequence_id for rollout in group])
    rows_N = torch.arange(len(group)).repeat_interleave(counted_B)
    position_N = torch.cat([torch.arange(count) for count in counted_B.tolist()])
    columns_N = prompt_lengths_B[rows_N] + position_N - 1
    return MicroBatch(
        input_ids=input_ids_BT,
        attention_mask=attention_mask_BT,
        rows=rows_N,
        columns=columns_N,
        token_ids=input_ids_BT[rows_N, columns_N + 1],
        sequence_id=sequence_ids_B[rows_N],
        position=position_N,
        rollouts=tuple(group),
    )
