"""Acceptance in speculative decoding, against a simulation of it and against sums over all drafts."""

import itertools
import math
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from helpers import pair_of, random_lm, token_stats_of

from opd.batch import make_micro_batches
from opd.data import Prompt
from opd.rollout import Decoding
from opd.rollout.local import TransformersSampler
from opd.seeds import generator
from opd.speculative import NEEDS, acceptance, accepted_length
from opd.step import score_update

torch.set_num_threads(1)


def stats_of(p, q, draft):
    """Statistics of one draft; the distributions behind a prefix are p[prefix] and q[prefix]."""
    prefixes = [draft[:t] for t in range(len(draft))]
    log = lambda table: torch.tensor([math.log(table[pre][x]) for pre, x in zip(prefixes, draft, strict=True)])  # noqa: E731
    return token_stats_of(
        sequence_id=torch.zeros(len(draft), dtype=torch.int64),
        position=torch.arange(len(draft)),
        vocab_size=3,
        step=1,
        student_logprob=log(p),
        teacher_logprob=log(q),
        total_variation=torch.tensor(
            [0.5 * sum(abs(a - b) for a, b in zip(p[pre], q[pre], strict=True)) for pre in prefixes]
        ),
    )


def test_the_length_is_the_expectation_over_all_drafts():
    """Three ids, blocks of three: the estimate of each draft, weighed by its probability, is the exact expectation."""
    g = torch.Generator().manual_seed(0)
    prefixes = [prefix for n in range(3) for prefix in itertools.product(range(3), repeat=n)]
    p, q = ({pre: torch.rand(3, generator=g).softmax(-1).tolist() for pre in prefixes} for _ in range(2))
    exact = estimated = 0.0
    for draft in itertools.product(range(3), repeat=3):
        prob = math.prod(p[draft[:t]][draft[t]] for t in range(3))
        ratios = [min(1, q[draft[:t]][draft[t]] / p[draft[:t]][draft[t]]) for t in range(3)]
        exact += prob * sum(math.prod(ratios[: i + 1]) for i in range(3))
        stats = stats_of(p, q, draft)
        from_second = 2 * accepted_length(stats.rows(torch.tensor([1, 2])), 3)
        estimated += prob * (3 * accepted_length(stats, 3) - from_second)  # the block that begins at the first token
    assert estimated == pytest.approx(exact, abs=1e-6)


def test_a_block_ends_with_its_response_and_at_a_gap():
    stats = token_stats_of(
        sequence_id=torch.tensor([0, 0, 1, 1]),
        position=torch.tensor([0, 1, 0, 5]),
        vocab_size=9,
        step=1,
        student_logprob=torch.zeros(4),
        teacher_logprob=torch.zeros(4),
        total_variation=torch.zeros(4),
    )
    assert accepted_length(stats, 4) == pytest.approx((2 + 1 + 1 + 1) / 4)
    assert accepted_length(stats, 1) == acceptance(stats) == 1.0


def test_a_simulation_of_speculative_sampling_accepts_as_often():
    """Blocks are drafted anew at every place of the responses, and are verified token by token."""
    student, teacher, gamma, limit, count = random_lm(0, std=0.3), random_lm(0, std=0.3), 3, 10, 200
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            parameter += 0.12 * torch.randn_like(parameter)  # a teacher that accepts about half
    pair, sampler = pair_of(student, teacher), TransformersSampler(student, 512)
    prompts = [Prompt(str(i), (5 + i % 7, 9), None) for i in range(count)]
    rollouts = sampler.sample(prompts, Decoding(1.0, 1.0, limit), 35, [("r", i) for i in range(count)])
    stats = score_update(pair, make_micro_batches(rollouts, 512, 0, "keep"), NEEDS, 1)

    places = [(k, t) for k, rollout in enumerate(rollouts) for t in range(len(rollout.response_ids))]
    contexts = [Prompt("", (*prompts[k].token_ids, *rollouts[k].response_ids[:t]), None) for k, t in places]
    drafts = sampler.sample(contexts, Decoding(1.0, 1.0, gamma), 35, [("d", *place) for place in places])
    drafts = [
        replace(draft, response_ids=draft.response_ids[: limit - t])
        for draft, (_, t) in zip(drafts, places, strict=True)
    ]
    drafted = score_update(pair, make_micro_batches(drafts, 512, 0, "keep"), NEEDS, 1)
    ratio = (drafted.teacher_logprob - drafted.student_logprob).exp()
    accepted = torch.rand(len(ratio), generator=generator("verify")) < ratio
    lengths = [[] for _ in rollouts]
    for place, (k, _) in enumerate(places):
        lengths[k].append(int(accepted[drafted.sequence_id == place].int().cumprod(0).sum()))

    simulated = torch.tensor([fmean(column) for column in lengths])
    expected = torch.tensor([accepted_length(stats.rows(stats.sequence_id == k), gamma) for k in range(count)])
    difference = simulated - expected
    error = difference.std() / math.sqrt(count)
    assert error < 0.05 * expected.mean() and 0.3 < expected.mean() < 2.5
    assert difference.mean().abs() < 4 * error
    first = accepted[drafted.position == 0].double()
    assert abs(first.mean() - acceptance(stats)) < 4 * first.std() / math.sqrt(len(first))
