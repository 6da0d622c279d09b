"""Rollouts -> micro-batches. No other file makes masks or shifts.

The hidden state of a causal model at input index i predicts the token at index i + 1. So token t of a response to a
prompt of P tokens is predicted at index P + t - 1. The prompt's last token predicts the first response token, and
nothing is predicted from the last response token. Only what the model sampled is counted: where an environment spoke,
t has gaps, and the first token of a turn is predicted from the environment's last one.

Shapes: B rollouts of a micro-batch, T positions of the longest one, N counted response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd import distributed
from opd.data import Rollout
from opd.seeds import derive_seed

FACTS = ("sequence_id", "position", "turn", "token_id", "prompt_id", "length", "truncated")


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through a model together, padded on the right."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 on prompt and response; it alone says what is padding
    rows: Tensor  # (N,) int64, first index in (B, T) of the hidden state that predicts the token
    columns: Tensor  # (N,) int64, second index in (B, T) of that hidden state
    facts: dict[str, Tensor]  # (N,) int64 each: the columns of TokenStats that are known without a model
    rollouts: tuple[Rollout, ...]  # those that the tokens belong to

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
    facts = dict.fromkeys(FACTS, none)
    return MicroBatch(torch.full((1, 1), pad_id), torch.ones(1, 1, dtype=torch.long), none, none, facts, ())


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
    facts = [facts_of(rollout, counted[rollout.sequence_id]) for rollout in group]
    facts_N = {name: torch.cat([columns[name] for columns in facts]) for name in FACTS}
    rows_N = torch.arange(len(group)).repeat_interleave(counted_B)
    columns_N = prompt_lengths_B[rows_N] + facts_N["position"] - 1
    return MicroBatch(
        input_ids=input_ids_BT,
        attention_mask=attention_mask_BT,
        rows=rows_N,
        columns=columns_N,
        facts=facts_N,
        rollouts=tuple(group),
    )
