"""Selections worked out by hand on ten typed numbers, for every rule; the sampling mechanic against its formula."""

import itertools
import math

import pytest
import torch

from opd.hooks import TokenStats
from tip import scores, select, taxonomy
from tip.config import TipConfig
from tip.weighter import RULES, TipWeighter

# two rollouts: six tokens and four; a vocabulary of 7, so h = H / ln 7
SEQUENCE = torch.tensor([0] * 6 + [1] * 4)
POSITION = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3])
H = torch.tensor([0.9, 0.1, 0.5, 0.1, 0.0, 0.3, 0.2, 0.8, 0.0, 0.4])  # normalised
D = torch.tensor([0.0, 2.0, 1.0, 0.0, 0.5, 0.2, 4.0, 0.1, 0.0, 1.0])  # nats


def stats(h=H, d=D, sequence=SEQUENCE, position=POSITION):
    return TokenStats(sequence_id=sequence, position=position, vocab_size=7, step=1,
                      student_entropy=h * math.log(7), reverse_kl=d)  # fmt: skip


def kept(rule, retention, generator=None, **options):
    weighter = TipWeighter(TipConfig(rule=rule, retention=retention, **options))
    weights = weighter(stats(), generator or torch.Generator().manual_seed(0)).weights
    return torch.nonzero(weights).flatten().tolist()


def test_all_keeps_everything_whatever_the_retention():
    assert kept("all", 0.1) == list(range(10))


def test_entropy_topk_by_hand():
    # rollout 0: .9 .5 .3 of six; rollout 1: .8 .4 of four
    assert kept("entropy_topk", 0.5) == [0, 2, 5, 7, 9]
    # floor(0.2 * 6) = 1, floor(0.2 * 4) = 0
    assert kept("entropy_topk", 0.2) == [0]
    # equal entropies 0.1 at tokens 1 and 3: floor(0.7 * 6) = 4 takes the earlier; floor(2.8) = 2
    assert kept("entropy_topk", 0.7) == [0, 1, 2, 5, 7, 9]


def test_soft_or_by_hand():
    # no clip: h^ = h / 0.9, d^ = d / 4; s = h^ + d^ - h^ d^
    by_hand = [1.0, 1 - (8 / 9) * 0.5, 1 - (4 / 9) * 0.75, 1 / 9, 0.125, 1 - (2 / 3) * 0.95, 1.0, 1 - (1 / 9) * 0.975,
               0.0, 1 - (5 / 9) * 0.75]  # fmt: skip
    config = TipConfig(entropy_clip_quantile=None)
    torch.testing.assert_close(
        RULES["soft_or"].score(stats(), config), torch.tensor(by_hand, dtype=torch.float64), rtol=1e-6, atol=1e-7)  # fmt: skip
    # rollout 0: 1, .667, .556; rollout 1: 1, .892
    assert kept("soft_or", 0.5, entropy_clip_quantile=None) == [0, 1, 2, 6, 7]
    # of the whole update the two ones, and no longer one per rollout
    assert kept("soft_or", 0.2, entropy_clip_quantile=None, budget="per_update") == [0, 6]
    # of the whole update: 1, 1, .892, .667 and .583, which is token 9 and not token 1
    assert kept("soft_or", 0.5, entropy_clip_quantile=None, budget="per_update") == [0, 2, 6, 7, 9]


def test_entropy_clip_by_hand():
    # sorted h: 0 0 .1 .1 .2 .3 .4 .5 .8 .9; quantile 2/3 of nine gaps: exactly the seventh, 0.4
    clipped = scores.entropy_axis(stats(), 2 / 3)
    torch.testing.assert_close(clipped, H.clamp(max=0.4))
    # now tokens 0 and 2 tie at h^ = 1; token 2 has d and still scores 1: ties go to the earlier token
    assert kept("soft_or", 0.17, entropy_clip_quantile=2 / 3) == [0]
    # linear interpolation: quantile 0.98 lies 0.82 of the way from 0.8 to 0.9
    assert scores.quantile(H, 0.98) == pytest.approx(0.882, abs=1e-6)


def test_divergence_clip_by_hand():
    # cap d at 2: tokens 1 and 6 tie on the axis
    axis = scores.divergence_axis(stats(), 8 / 9)
    torch.testing.assert_close(axis, D.clamp(max=2.0))


def test_equal_values_normalise_to_zero():
    assert scores.min_max(torch.full((4,), 3.0)).tolist() == [0] * 4
    assert scores.min_max(torch.zeros(0)).tolist() == []


def test_floor_of_the_retained_count():
    ones, one_rollout = torch.ones(10), torch.zeros(10, dtype=torch.int64)
    for retention, expected in (
        (0.1, 1),
        (0.3, 3),
        (0.29, 2),
        (0.7, 7),
        (1.0, 10),
        (0.05, 0),
    ):  # 0.3 * 10 < 3 in floats
        assert select.top(ones, one_rollout, retention).sum() == expected
    assert select.top(ones, one_rollout, 0.3).nonzero().flatten().tolist() == [0, 1, 2]  # ties: earlier first


def test_nothing_at_all_is_a_legal_selection():
    empty = torch.zeros(0, dtype=torch.int64)
    assert select.top(torch.zeros(0), empty, 0.5).shape == (0,)
    weights = TipWeighter(TipConfig())(stats(*(torch.zeros(0),) * 2, empty, empty), torch.Generator())
    assert weights.weights.shape == (0,) and weights.metrics["tip/retained"] == 0


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        select.top(torch.tensor([0.0, torch.nan, 1.0]), torch.zeros(3, dtype=torch.int64), 0.5)


@pytest.mark.parametrize("rule", ["random", "entropy_sampling"])
def test_sampling_keeps_the_count_per_rollout_and_repeats_from_its_seed(rule):
    for seed in range(20):
        first = kept(rule, 0.5, torch.Generator().manual_seed(seed))
        assert sum(i < 6 for i in first) == 3 and sum(i >= 6 for i in first) == 2
        assert first == kept(rule, 0.5, torch.Generator().manual_seed(seed))
    assert len({tuple(kept(rule, 0.5, torch.Generator().manual_seed(s))) for s in range(20)}) > 5


def by_hand(weight, retention, generator):
    """Top of log weight + Gumbel noise per rollout, in plain Python: one uniform per row, in row order."""
    uniforms = torch.rand(len(weight), generator=generator, dtype=torch.float64).tolist()
    keys = [(math.log(w) if w > 0 else -1e6) - math.log(-math.log(u)) for w, u in zip(weight, uniforms, strict=True)]
    chosen = []
    for rows in (range(6), range(6, 10)):
        best = sorted(rows, key=lambda i: -keys[i])[: int(retention * len(rows) + 1e-9)]
        chosen += sorted(best)
    return chosen


@pytest.mark.parametrize("retention", [0.2, 0.5, 0.75])
def test_sampled_rules_by_hand(retention):
    for seed in range(10):
        seeded = lambda s=seed: torch.Generator().manual_seed(s)  # noqa: E731
        assert kept("random", retention, seeded()) == by_hand([1.0] * 10, retention, seeded())
        assert kept("entropy_sampling", retention, seeded()) == by_hand(H.tolist(), retention, seeded())


@pytest.mark.parametrize("bad", [math.nan, -0.1])
def test_weights_that_are_no_weights_are_refused(bad):
    with pytest.raises(ValueError, match="1 of 3 weights are negative or NaN"):
        select.sample(torch.tensor([0.5, bad, 1.0]), torch.zeros(3, dtype=torch.int64), 0.5, torch.Generator())


def test_a_token_of_zero_weight_is_sampled_only_when_nothing_else_is_left():
    # rollout 0 has one zero (token 4), rollout 1 one (token 8)
    for seed in range(50):
        assert not {4, 8} & set(kept("entropy_sampling", 0.75, torch.Generator().manual_seed(seed)))
    zeros = torch.zeros(4, dtype=torch.int64)
    drawn = {tuple(select.sample(torch.tensor([0.0, 1.0, 0.0, 0.0]), zeros, 0.5, torch.Generator().manual_seed(s)).tolist())
             for s in range(60)}  # fmt: skip
    assert drawn == {(True, True, False, False), (False, True, True, False), (False, True, False, True)}


def test_sampling_is_sequential_and_proportional():
    """P(set) of drawing two of four one after another, by enumeration; 20,000 draws, four standard errors."""
    weight = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = dict.fromkeys(itertools.combinations(range(4), 2), 0.0)
    for i, j in itertools.permutations(range(4), 2):
        expected[tuple(sorted((i, j)))] += weight[i].item() * weight[j].item() / (1 - weight[i].item())
    draws, generator = 20_000, torch.Generator().manual_seed(1)
    groups = torch.arange(draws).repeat_interleave(4)
    mask = select.sample(weight.repeat(draws), groups, 0.5, generator).view(draws, 4)
    for pair, probability in expected.items():
        seen = (mask[:, pair[0]] & mask[:, pair[1]]).double().mean().item()
        assert abs(seen - probability) < 4 * math.sqrt(probability * (1 - probability) / draws)


def test_rollout_mean_weighs_every_rollout_alike():
    weights = TipWeighter(TipConfig(rule="entropy_topk", retention=0.5, aggregation="rollout_mean"))(
        stats(), torch.Generator()
    )
    assert weights.weights.tolist() == pytest.approx([1 / 3, 0, 1 / 3, 0, 0, 1 / 3, 0, 1 / 2, 0, 1 / 2])


def test_quadrants_by_hand():
    # means: h 0.33, d 0.88; high is strictly above
    found = taxonomy.quadrants(H, D)
    assert found.threshold_entropy == pytest.approx(0.33) and found.threshold_divergence == pytest.approx(0.88)
    assert found.quadrant.tolist() == [2, 3, 1, 4, 4, 4, 3, 2, 4, 1]
    metrics = taxonomy.describe(found, D, torch.tensor([1, 1, 0, 0, 0, 0, 1, 0, 0, 0], dtype=torch.bool))
    assert [metrics[f"tip/share_q{q}"] for q in (1, 2, 3, 4)] == pytest.approx([0.2, 0.2, 0.2, 0.4])
    assert [metrics[f"tip/mass_q{q}"] for q in (1, 2, 3, 4)] == pytest.approx([2 / 8.8, 0.1 / 8.8, 6 / 8.8, 0.7 / 8.8])
    assert [metrics[f"tip/kept_q{q}"] for q in (1, 2, 3, 4)] == pytest.approx([0, 0.5, 1, 0])
    assert metrics["tip/mass_covered"] == pytest.approx(6 / 8.8)


def test_equal_to_the_threshold_is_low():
    assert taxonomy.quadrants(torch.full((3,), 0.5), torch.full((3,), 1.0)).quadrant.tolist() == [4, 4, 4]


def test_the_axes_are_cut_before_the_thresholds():
    metrics = TipWeighter(TipConfig(entropy_clip_quantile=2 / 3))(stats(), torch.Generator()).metrics
    assert metrics["tip/threshold_entropy"] == pytest.approx(H.clamp(max=0.4).mean().item(), rel=1e-6)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_rule_reads_no_more_than_it_says_it_needs(rule):
    given = {
        name: getattr(stats(), name) if name in RULES[rule].needs else None
        for name in ("student_entropy", "reverse_kl")
    }
    blind = TokenStats(sequence_id=SEQUENCE, position=POSITION, vocab_size=7, step=1, **given)
    seeing = TipWeighter(TipConfig(rule=rule))(stats(), torch.Generator().manual_seed(3)).weights
    assert torch.equal(TipWeighter(TipConfig(rule=rule))(blind, torch.Generator().manual_seed(3)).weights, seeing)
