"""Rollouts -> micro-batches. The only file that makes masks and shifts.

A causal model's state at input index i predicts the token at i + 1, so response token t of a prompt of P tokens is
predicted at index P + t - 1: from the prompt's last token for the first one, and nothing is predicted from the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.data import Rollout


@dataclass(frozen=True)
class MicroBatch:
    """What goes through a model at once: B right-padded sequences of T tokens, with N counted response tokens."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 on prompt and response; the pad id itself means nothing
    rows: Tensor  # (N,) int64: where in (B, T) the state stands that predicts the token
    columns: Tensor  # (N,) int64
    token_ids: Tensor  # (N,) int64, the predicted response tokens
    sequence_id: Tensor  # (N,) int64
    position: Tensor  # (N,) int64, 0-based in the response


def counted_tokens(rollout: Rollout, truncated: str) -> int:
    """How many of a response's tokens, from its first, take part in the loss (config rollout.truncated)."""
    length = len(rollout.response_ids)
    if rollout.finish_reason == "stop" or truncated == "keep":
        return length
    return 0 if truncated == "drop" else length - repeated_tail(rollout.response_ids)


def repeated_tail(ids: Sequence[int]) -> int:
    """Tokens at the end that only repeat what stands before them: a loop of at least three rounds, less its first.

    `a b c x y x y x y` has the loop `x y` three times, so 4. Found by the Z-function of the reversed text: the last z
    tokens equal those p earlier, so the last z + p tokens have period p; the longest z counts. Linear time.
    """
    text = list(reversed(ids))
    z = [0] * len(text)
    left = right = best = 0
    for p in range(1, len(text)):
        if p < right:
            z[p] = min(right - p, z[p - left])
        while p + z[p] < len(text) and text[z[p]] == text[p + z[p]]:
            z[p] += 1
        if p + z[p] > right:
            left, right = p, p + z[p]
        if z[p] >= 2 * p:
            best = max(best, z[p])
    return best


def make_micro_batches(rollouts: Sequence[Rollout], max_tokens: int, pad_id: int, truncated: str) -> list[MicroBatch]:
    """Packs rollouts, longest first, so that B * T stays within `max_tokens`; a longer rollout goes alone.

    Rollouts with no counted token are left out. How they are packed does not change loss or gradient.
    """
    counted = {r.sequence_id: counted_tokens(r, truncated) for r in rollouts}
    order = sorted(
        (r for r in rollouts if counted[r.sequence_id]),
        key=lambda r: (-len(r.prompt.token_ids) - len(r.response_ids), r.sequence_id),
    )
    groups: list[list[Rollout]] = []
    for rollout in order:
        longest = len(groups[-1][0].prompt.token_ids) + len(groups[-1][0].response_ids) if groups else 0
        if groups and (len(groups[-1]) + 1) * longest <= max_tokens:
            groups[-1].append(rollout)
        else:
            groups.append([rollout])
    return [_collate(group, counted, pad_id) for group in groups]


def share_of_rank(rollouts: Sequence[Rollout], rank: int, ranks: int) -> list[Rollout]:
    """This rank's part of an update: every rank gets as many rollouts and about as many tokens, whoever sampled them.

    Dealt longest first, forwards and then backwards (0 1 2 2 1 0 0 ...), so that micro-batches of the same number,
    which wait for each other, are also of about the same length.
    """
    order = sorted(rollouts, key=lambda r: (-len(r.prompt.token_ids) - len(r.response_ids), r.sequence_id))
    rounds = range(-(-len(order) // ranks))
    places = (n * ranks + (rank if n % 2 == 0 else ranks - 1 - rank) for n in rounds)
    return [order[place] for place in places if place < len(order)]


def empty_micro_batch(pad_id: int) -> MicroBatch:
    """One padded token and nothing to predict, for a rank that has to run a model although it has no tokens left."""
    none = torch.zeros(0, dtype=torch.long)
    return MicroBatch(torch.full((1, 1), pad_id), torch.ones(1, 1, dtype=torch.long), none, none, none, none, none)


def _collate(group: Sequence[Rollout], counted: dict[int, int], pad_id: int) -> MicroBatch:
    sequences = [r.prompt.token_ids + r.response_ids for r in group]
    input_ids = torch.full((len(group), max(map(len, sequences))), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    lengths = torch.tensor([counted[r.sequence_id] for r in group])
    prompt_lengths = torch.tensor([len(r.prompt.token_ids) for r in group])
    rows = torch.arange(len(group)).repeat_interleave(lengths)
    position = torch.cat([torch.arange(n) for n in lengths.tolist()])
    columns = prompt_lengths[rows] + position - 1
    return MicroBatch(
        input_ids,
        attention_mask,
        rows,
        columns,
        input_ids[rows, columns + 1],
        torch.tensor([r.sequence_id for r in group])[rows],
        position,
    )
