"""Micro-batches: token budget, shift, and what a cut response contributes."""

import pytest
import torch
from helpers import random_lm, random_rollouts

from opd.batch import counted_tokens, empty_micro_batch, make_micro_batches, repeated_tail, share_of_rank
from opd.data import Prompt, Rollout


def rollout(response, reason="length", i=0):
    return Rollout(i, Prompt("p", (1, 2), "0"), tuple(response), reason)


@pytest.mark.parametrize(
    "text,tail",
    [
        ("abcxyxyxy", 4),
        ("aaaa", 3),
        ("aaa", 2),
        ("aa", 0),
        ("abab", 0),
        ("ababab", 4),
        ("abcabcab", 0),
        ("abcabcabc", 6),
        ("abcd", 0),
        ("", 0),
        ("xaaabaaabaaab", 8),
        ("zababababa", 7),
    ],
)
def test_repeated_tail_by_hand(text, tail):
    assert repeated_tail([ord(c) for c in text]) == tail


def test_repeated_tail_equals_brute_force_and_is_linear():
    def brute(ids):
        best = 0
        for p in range(1, len(ids) // 3 + 1):
            z = 0
            while z + p < len(ids) and ids[-1 - z] == ids[-1 - z - p]:
                z += 1
            if z >= 2 * p:
                best = max(best, z)
        return best

    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        ids = torch.randint(0, 2, (int(torch.randint(1, 20, (1,), generator=g)),), generator=g).tolist()
        assert repeated_tail(ids) == brute(ids)
    assert repeated_tail([1] * 100_000) == 99_999


def test_what_a_cut_response_contributes():
    loop = rollout([7, 8, 9, 8, 9, 8, 9])
    assert [counted_tokens(loop, mode) for mode in ("keep", "drop", "mask_tail")] == [7, 0, 3]
    ended = rollout([8, 9, 8, 9, 8, 9], "stop")
    assert [counted_tokens(ended, mode) for mode in ("keep", "drop", "mask_tail")] == [6, 6, 6]
    (batch,) = make_micro_batches([loop, rollout([5], "stop", 1)], 100, 0, "mask_tail")
    assert batch.token_ids.tolist() == [7, 8, 9, 5]
    (batch,) = make_micro_batches([loop, rollout([5], "stop", 1)], 100, 0, "drop")
    assert batch.sequence_id.tolist() == [1]
    assert make_micro_batches([loop], 100, 0, "drop") == []


@pytest.mark.parametrize("budget", [1, 20, 33, 64, 1000])
def test_every_response_token_is_in_exactly_one_micro_batch_within_the_budget(budget):
    rollouts = random_rollouts(random_lm(1), count=15)
    batches = make_micro_batches(rollouts, budget, 0, "keep")
    seen = sorted(
        (int(i), int(p), int(t))
        for b in batches
        for i, p, t in zip(b.sequence_id, b.position, b.token_ids, strict=True)
    )
    assert seen == sorted((r.sequence_id, t, token) for r in rollouts for t, token in enumerate(r.response_ids))
    for b in batches:
        assert b.input_ids.numel() <= budget or len(b.input_ids) == 1
        assert torch.equal(b.input_ids[b.rows, b.columns + 1], b.token_ids)
        assert b.attention_mask.sum() == sum(
            len(r.prompt.token_ids) + len(r.response_ids) for r in rollouts if r.sequence_id in b.sequence_id
        )


@pytest.mark.parametrize(("count", "ranks"), [(7, 2), (8, 3), (1, 4), (0, 2), (32, 8), (5, 1)])
def test_ranks_share_rollouts_and_tokens(count, ranks):
    rollouts = random_rollouts(random_lm(0), count=count, seed=3)
    shares = [share_of_rank(rollouts, rank, ranks) for rank in range(ranks)]
    dealt = [r.sequence_id for share in shares for r in share]
    assert sorted(dealt) == list(range(count))  # everyone exactly once
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    lengths = [[len(r.prompt.token_ids) + len(r.response_ids) for r in share] for share in shares]
    assert all(own == sorted(own, reverse=True) for own in lengths)
    longest = max((len(r.prompt.token_ids) + len(r.response_ids) for r in rollouts), default=0)
    totals = [sum(own) for own in lengths]
    assert max(totals) - min(totals) <= longest  # at most one rollout apart, however many there are
    assert shares[0] == share_of_rank(list(reversed(rollouts)), 0, ranks)  # whoever sampled them


def test_ranks_are_dealt_forwards_and_backwards():
    rollouts = [rollout([5] * n, i=n) for n in range(1, 9)]  # 2 prompt tokens and n of response
    assert [[r.sequence_id for r in share_of_rank(rollouts, rank, 2)] for rank in (0, 1)] == [
        [8, 5, 4, 1],
        [7, 6, 3, 2],
    ]


def test_an_empty_micro_batch_runs_a_model_and_predicts_nothing():
    lm = random_lm(0)
    batch = empty_micro_batch(lm.eos_ids[0])
    states = lm.hidden_states(batch, torch.arange(len(batch.token_ids)))
    assert states.shape == (0, 32) and states.requires_grad
    states.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for n, p in lm.model.named_parameters() if "embed" not in n)
