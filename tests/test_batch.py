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


@pytest.mark.parametrize("packed_row", [0, 12, 1000])
@pytest.mark.parametrize("budget", [1, 20, 33, 64, 1000])
def test_every_response_token_is_in_exactly_one_micro_batch_within_the_budget(budget, packed_row):
    rollouts = random_rollouts(random_lm(1), count=15)
    batches = make_micro_batches(rollouts, budget, 0, "keep", packed_row)
    seen = sorted(
        (int(i), int(p), int(t))
        for b in batches
        for i, p, t in zip(b.sequence_id, b.position, b.token_ids, strict=True)
    )
    assert seen == sorted((r.sequence_id, t, token) for r in rollouts for t, token in enumerate(r.response_ids))
    for b in batches:
        assert b.input_ids.numel() <= budget or len(b.input_ids) == 1
        assert torch.equal(b.input_ids[b.rows, b.columns + 1], b.token_ids)
        assert (b.position_ids is None) == (len(b.sequence_id.unique()) == len(b.input_ids))
        for r in rollouts:
            here = b.sequence_id == r.sequence_id
            if here.any():  # the whole rollout lies in one row, and positions begin where it begins
                (row,), begin = b.rows[here].unique().tolist(), int(b.columns[here][0]) - len(r.prompt.token_ids) + 1
                end = begin + len(r.prompt.token_ids) + len(r.response_ids)
                assert b.input_ids[row, begin:end].tolist() == [*r.prompt.token_ids, *r.response_ids]
                positions = torch.arange(b.input_ids.shape[1]) if b.position_ids is None else b.position_ids[row]
                assert positions[begin:end].tolist() == list(range(end - begin))


def test_short_rollouts_share_rows_that_are_as_long_as_the_longest():
    rollouts = [rollout([5] * (n - 2), "stop", n) for n in (12, 7, 6, 5, 4, 3)]
    (batch,) = make_micro_batches(rollouts, 48, 0, "keep", 12)
    rows = dict(zip(batch.sequence_id.tolist(), batch.rows.tolist(), strict=True))
    assert batch.input_ids.shape == (4, 12) and rows == {12: 0, 7: 1, 5: 1, 6: 2, 4: 2, 3: 3}
    assert batch.position_ids[1].tolist() == [*range(7), *range(5)]
    assert batch.position_ids[2].tolist() == [*range(6), *range(6)]  # padding goes on as the last sequence
    assert batch.position_ids[3].tolist() == list(range(12)) == batch.position_ids[0].tolist()
    inputs = batch.inputs(torch.device("cpu"))
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 12, 19, 24, 30, 36, 48]
    assert inputs["max_length_q"] == inputs["max_length_k"] == 12
    two = make_micro_batches(rollouts, 24, 0, "keep", 12)  # the budget holds two rows
    assert [b.input_ids.shape for b in two] == [(2, 12), (3, 6)]
    assert [b.sequence_id.unique().tolist() for b in two] == [[5, 7, 12], [3, 4, 6]]
    longer = make_micro_batches(rollouts, 24, 0, "keep", 11)  # a row of 12 may hold one sequence only
    assert [b.input_ids.shape for b in longer] == [(2, 12), (4, 6)]
    assert longer[0].position_ids is None and longer[0].inputs(torch.device("cpu")).keys() == {"input_ids"}


def test_nearly_nothing_is_padding_where_rows_are_shared():
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(64, generator=generator).exp() * 100).clamp(4, 800).int().tolist()
    rollouts = [rollout([5] * (n - 2), "stop", i) for i, n in enumerate(lengths)]
    shares = {}
    for packed_row in (0, 10**6):
        batches = make_micro_batches(rollouts, 4096, 0, "keep", packed_row)
        shares[packed_row] = 1 - sum(lengths) / sum(b.input_ids.numel() for b in batches)
        assert all(b.input_ids.numel() <= 4096 for b in batches)
    assert shares[0] > 0.25 and shares[10**6] < 0.1


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
