"""Selections worked out by hand on ten typed numbers, for every rule; the sampling mechanic against its formula."""

import dataclasses
import itertools
import math

import pytest
import torch
from helpers import token_stats_of

from opd.errors import InputError
from opd.hooks import TokenStats
from tip import scores, select, taxonomy
from tip.config import TipConfig
from tip.rules import RULES
from tip.scores import Axes, Spread
from tip.weighter import TipWeighter

# two rollouts: six tokens and four; a vocabulary of 7, so h = H / ln 7
SEQUENCE = torch.tensor([0] * 6 + [1] * 4)
POSITION = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3])
H = torch.tensor([0.9, 0.1, 0.5, 0.1, 0.0, 0.3, 0.2, 0.8, 0.0, 0.4])  # normalised
D = torch.tensor([0.0, 2.0, 1.0, 0.0, 0.5, 0.2, 4.0, 0.1, 0.0, 1.0])  # nats


F = torch.tensor([0.1, 6.0, 1.0, 0.0, 2.0, 0.4, 3.0, 0.1, 0.5, 1.0])  # forward KL, nats
TEACHER = torch.tensor([0.9, 0.2, 0.8, 0.1, 0.0, 1.5, 0.7, 0.81, 0.0, 0.3])  # teacher entropy, nats
OVERLAP = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
MASS = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
TV = torch.tensor([0.0, 0.9, 0.3, 0.0, 0.6, 0.1, 0.7, 0.1, 0.2, 0.3])
LOG_S = torch.tensor([-0.1, -0.2, -3.0, -0.1, -0.5, -2.0, -0.1, -1.0, -0.3, -0.7])
LOG_T = torch.tensor([-0.1, -5.0, -1.0, -0.2, -0.4, -2.5, -4.0, -1.0, -0.2, -0.9])


def stats(h=H, d=D, sequence=SEQUENCE, position=POSITION, step=1):
    n = len(h)
    return token_stats_of(
        sequence_id=sequence,
        position=position,
        vocab_size=7,
        step=step,
        student_entropy=h * math.log(7),
        reverse_kl=d,
        forward_kl=F[:n],
        teacher_entropy=TEACHER[:n],
        overlap_kl=OVERLAP[:n],
        teacher_topk_mass=MASS[:n],
        total_variation=TV[:n],
        student_logprob=LOG_S[:n],
        teacher_logprob=LOG_T[:n],
        jsd=TV[:n] / 2,
    )


def score_of(rule, **options):
    return RULES[rule].score(stats(), Axes(stats(), TipConfig(**options)))


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
    by_hand = [
        1.0,
        1 - (8 / 9) * 0.5,
        1 - (4 / 9) * 0.75,
        1 / 9,
        0.125,
        1 - (2 / 3) * 0.95,
        1.0,
        1 - (1 / 9) * 0.975,
        0.0,
        1 - (5 / 9) * 0.75,
    ]
    torch.testing.assert_close(
        score_of("soft_or", entropy_clip_quantile=None),
        torch.tensor(by_hand, dtype=torch.float64),
        rtol=1e-6,
        atol=1e-7,
    )
    # rollout 0: 1, .667, .556; rollout 1: 1, .892
    assert kept("soft_or", 0.5, entropy_clip_quantile=None) == [0, 1, 2, 6, 7]
    # of the whole update the two ones, and no longer one per rollout
    assert kept("soft_or", 0.2, entropy_clip_quantile=None, budget="per_update") == [0, 6]
    # of the whole update: 1, 1, .892, .667 and .583, which is token 9 and not token 1
    assert kept("soft_or", 0.5, entropy_clip_quantile=None, budget="per_update") == [0, 2, 6, 7, 9]


def test_soft_or_bottom_by_hand():
    # the lowest of 1, .556, .667, .111, .125, .367 and of 1, .892, 0, .583
    assert kept("soft_or_bottom", 0.5, entropy_clip_quantile=None) == [3, 4, 5, 8, 9]


def test_divergence_by_hand():
    assert kept("divergence", 0.5) == [1, 2, 4, 6, 9]  # 2, 1, .5 and 4, 1
    assert kept("divergence_bottom", 0.5) == [0, 3, 5, 7, 8]  # 0, 0, .2 and 0, .1


def test_q3_by_hand():
    # forward KL times 1 - h / 0.9: 0, 5.33, .444, 0, 2, .267 and 2.33, .011, .5, .556
    score = score_of("q3", entropy_clip_quantile=None)
    expected = [0, 6 * 8 / 9, 4 / 9, 0, 2, 0.4 * 2 / 3, 3 * 7 / 9, 0.1 / 9, 0.5, 5 / 9]
    torch.testing.assert_close(score, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert kept("q3", 0.5, entropy_clip_quantile=None) == [1, 2, 4, 6, 9]


def test_quadrant_by_hand():
    # means .33 and .88: quadrants 2 3 1 4 4 4 3 2 4 1, whatever the retention
    assert kept("quadrant", 0.1, entropy_clip_quantile=None) == [1, 2, 6, 9]
    assert kept("quadrant", 0.1, entropy_clip_quantile=None, quadrants=(2,)) == [0, 7]
    # above 0.25 and above 0.4 nats: high h 0 2 5 7 9, high d 1 2 4 6 9
    options = {"quadrant_threshold": "absolute", "quadrant_entropy": 0.25, "quadrant_divergence": 0.4}
    assert kept("quadrant", 0.1, quadrants=(3,), **options) == [1, 4, 6]
    # above the medians 0.25 and 0.35: the same high h; high d 1 2 4 6 9
    options = {"quadrant_threshold": "quantile", "quadrant_entropy": 0.5, "quadrant_divergence": 0.5}
    assert kept("quadrant", 0.1, quadrants=(1,), **options) == [2, 9]


def test_teachability_by_hand():
    # percentiles of 0..9 are .45 and 8.55, of the masses .045 and .855; products peak in the middle
    by_hand = [
        max(0, min(1, (o - 0.45) / 8.1)) * max(0, min(1, (m - 0.045) / 0.81))
        for o, m in zip(OVERLAP.tolist(), MASS.tolist(), strict=True)
    ]
    score = score_of("teachability")
    torch.testing.assert_close(score, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert kept("teachability", 0.2) == [4, 5]  # of the whole update
    assert kept("teachability", 0.5, budget="per_rollout") == [3, 4, 5, 6, 7]


def test_product_by_hand():
    weight = score_of("product", product_alpha=2.0, product_gamma=0.5)
    expected = [(h**2) * math.sqrt(tv / 2 / math.log(2)) for h, tv in zip(H.tolist(), TV.tolist(), strict=True)]
    torch.testing.assert_close(weight, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)
    seeded = lambda: torch.Generator().manual_seed(4)  # noqa: E731
    weight = score_of("product")
    assert kept("product", 0.5, seeded()) == by_hand_sample(weight.tolist(), 0.5, seeded())


def test_eopd_by_hand():
    # teacher entropy above 0.8 (strictly): tokens 0, 5, 7
    found = TipWeighter(TipConfig(rule="eopd"))(stats(), torch.Generator())
    assert found.weights.tolist() == [2, 1, 1, 1, 1, 2, 1, 2, 1, 1]
    assert found.forward_share.tolist() == [0.5, 0, 0, 0, 0, 0.5, 0, 0.5, 0, 0]


def test_aopd_by_hand():
    # the teacher finds the sampled token no likelier: equal at 0 and 7
    found = TipWeighter(TipConfig(rule="aopd"))(stats(), torch.Generator())
    assert found.weights.tolist() == [1] * 10
    assert found.forward_share.tolist() == [1, 1, 0, 1, 0, 1, 1, 1, 0, 1]


def test_aopd_with_a_threshold_by_hand():
    # log q/p: 0 -4.8 2 -.1 .1 -.5 -3.9 0 .1 -.2
    found = TipWeighter(TipConfig(rule="aopd", aopd_threshold=-0.3))(stats(), torch.Generator())
    assert found.forward_share.tolist() == [0, 1, 0, 0, 0, 1, 1, 0, 0, 0]
    found = TipWeighter(TipConfig(rule="aopd", aopd_threshold=0.5))(stats(), torch.Generator())
    assert found.forward_share.tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 1, 1]


def test_first_k_by_hand():
    assert kept("first_k", 0.5) == [0, 1, 2, 6, 7]
    assert kept("first_k", 0.2) == [0]  # floor(1.2) and floor(0.8)
    assert kept("first_k", 0.34, budget="per_update") == [0, 1, 6]  # the first tokens of both before any second one


def test_turns_by_hand():
    # rollout 0 ends with turn 2, and rollout 1 with turn 1
    turns = torch.tensor([0, 0, 1, 1, 2, 2, 0, 0, 0, 1])
    spoken = dataclasses.replace(stats(), turn=turns)
    found = {
        rule: TipWeighter(TipConfig(rule=rule, retention=0.1))(spoken, torch.Generator()).weights.tolist()
        for rule in ("first_turns", "last_turn")
    }
    assert found == {"first_turns": [1, 1, 1, 1, 0, 0, 1, 1, 1, 0], "last_turn": [0, 0, 0, 0, 1, 1, 0, 0, 0, 1]}
    assert kept("last_turn", 0.1) == list(range(10)) and kept("first_turns", 0.1) == []  # without an environment


def test_iw_opd_by_hand():
    # |log q/p|: 0 4.8 2 .1 .1 .5, together 7.5; 3.9 0 .1 .2, together 4.2
    upto = [0, 4.8 / 7.5, 6.8 / 7.5, 6.9 / 7.5, 7 / 7.5, 1, 3.9 / 4.2, 3.9 / 4.2, 4 / 4.2, 1]
    for gain in (1.0, 2.5, 0.0):
        found = TipWeighter(TipConfig(rule="iw_opd", iw_gain=gain))(stats(), torch.Generator())
        assert found.weights.tolist() == pytest.approx([1 + gain * (1 - share) for share in upto], rel=1e-6)
        assert found.forward_share is None
    same = dataclasses.replace(stats(), teacher_logprob=LOG_S)  # models that agree: no token comes before another
    assert len(TipWeighter(TipConfig(rule="iw_opd"))(same, torch.Generator()).weights.unique()) == 1


def test_tropd_by_hand():
    # q/p: 1 e^-4.8 e^2 e^-.1 e^.1 e^-.5 e^-3.9 1 e^.1 e^-.2
    found = TipWeighter(TipConfig(rule="tropd"))(stats(), torch.Generator())
    expected = [math.exp(min(0.0, a)) for a in (0, -4.8, 2, -0.1, 0.1, -0.5, -3.9, 0, 0.1, -0.2)]
    assert found.weights.tolist() == pytest.approx(expected, rel=1e-5) and found.forward_share is None


def test_total_variation_by_hand():
    found = TipWeighter(TipConfig(rule="total_variation", retention=0.3))(stats(), torch.Generator())
    assert torch.nonzero(found.weights).flatten().tolist() == [1, 4, 6]  # .9 .6 .7 of the whole update
    assert torch.equal(found.forward_share, TV) and found.metrics["tip/forward_share"] == pytest.approx(2.2 / 3)
    assert kept("total_variation", 0.5, budget="per_rollout") == [1, 2, 4, 6, 9]


def test_other_normalisations_by_hand():
    # ranks of 0 0 .1 .1 .2 .3 .4 .5 .8 .9 over 9: ties share .5 and 2.5
    expected = torch.tensor([9, 2.5, 7, 2.5, 0.5, 5, 4, 8, 0.5, 6], dtype=torch.float64) / 9
    torch.testing.assert_close(scores.normalise(H, Spread.of(H), "rank"), expected)
    # d sorted 0 0 0 .1 .2 .5 1 1 2 4: q05 = 0, q95 = 2 + .55 * 2 = 3.1
    torch.testing.assert_close(
        scores.normalise(D, Spread.of(D), "quantile"), (D / 3.1).clamp(max=1).double(), rtol=1e-6, atol=1e-7
    )
    # an outlier of 100 nats squeezes min-max Soft-OR onto the entropy axis, and not the repaired one
    d = D.clone()
    d[6] = 100.0
    config = {"rule": "soft_or", "retention": 0.2, "budget": "per_update", "entropy_clip_quantile": None}
    for how, expected_set in (("minmax", [0, 6]), ("quantile", [6, 0])):
        weights = TipWeighter(TipConfig(normalization=how, **config))(stats(d=d), torch.Generator()).weights
        assert set(torch.nonzero(weights).flatten().tolist()) == set(expected_set)


def test_a_retention_schedule_by_hand():
    config = TipConfig(rule="entropy_topk", retention=1.0, retention_end=0.2, retention_steps=5, budget="per_update")
    assert [config.retention_at(step) for step in (1, 2, 3, 5, 9)] == pytest.approx([1.0, 0.8, 0.6, 0.2, 0.2])
    counts = [int(TipWeighter(config)(stats(step=step), torch.Generator()).weights.sum()) for step in (1, 2, 3, 5, 9)]
    assert counts == [10, 8, 6, 2, 2]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"retention_end": 0.2}, "a schedule needs both"),
        ({"retention_steps": 5}, "a schedule needs both"),
        ({"quadrant_threshold": "absolute"}, "take both"),
        ({"quadrant_entropy": 0.5}, "mean takes neither"),
        (
            {"quadrant_threshold": "quantile", "quadrant_entropy": 0.5, "quadrant_divergence": 3.0},
            "expected a quantile",
        ),
        ({"quadrants": ()}, "quadrants is empty"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        TipWeighter(TipConfig(**options))


def test_entropy_clip_by_hand():
    # sorted h: 0 0 .1 .1 .2 .3 .4 .5 .8 .9; quantile 2/3 of nine gaps: exactly the seventh, 0.4
    clipped = Axes(stats(), TipConfig(entropy_clip_quantile=2 / 3)).h
    torch.testing.assert_close(clipped, H.clamp(max=0.4).double(), rtol=1e-6, atol=1e-7)
    # now tokens 0 and 2 tie at h^ = 1; token 2 has d and still scores 1: ties go to the earlier token
    assert kept("soft_or", 0.17, entropy_clip_quantile=2 / 3) == [0]
    # linear interpolation: quantile 0.98 lies 0.82 of the way from 0.8 to 0.9
    assert Spread.of(H).quantile(0.98) == pytest.approx(0.882, abs=1e-6)


def test_divergence_clip_by_hand():
    # cap d at 2: tokens 1 and 6 tie on the axis
    axis = Axes(stats(), TipConfig(divergence_clip_quantile=8 / 9)).d
    torch.testing.assert_close(axis, D.clamp(max=2.0).double())


def test_equal_values_normalise_to_zero():
    for how in ("minmax", "quantile", "rank"):
        assert scores.normalise(torch.full((4,), 3.0), Spread.of(torch.full((4,), 3.0)), how).tolist() == [0] * 4
        assert scores.normalise(torch.zeros(0), Spread.of(torch.zeros(0)), how).tolist() == []


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


def by_hand_sample(weight, retention, generator):
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
        assert kept("random", retention, seeded()) == by_hand_sample([1.0] * 10, retention, seeded())
        soft_or = score_of("soft_or")
        assert kept("soft_or_sampling", retention, seeded()) == by_hand_sample(soft_or.tolist(), retention, seeded())
        assert kept("entropy_sampling", retention, seeded()) == by_hand_sample(H.tolist(), retention, seeded())


@pytest.mark.parametrize("bad", [math.nan, -0.1])
def test_weights_that_are_no_weights_are_refused(bad):
    with pytest.raises(ValueError, match="1 of 3 scores are negative or NaN"):
        select.sample(torch.tensor([0.5, bad, 1.0]), torch.zeros(3, dtype=torch.int64), 0.5, torch.Generator())


def test_a_token_of_zero_weight_is_sampled_only_when_nothing_else_is_left():
    # rollout 0 has one zero (token 4), rollout 1 one (token 8)
    for seed in range(50):
        assert not {4, 8} & set(kept("entropy_sampling", 0.75, torch.Generator().manual_seed(seed)))
    zeros = torch.zeros(4, dtype=torch.int64)
    drawn = {
        tuple(select.sample(torch.tensor([0.0, 1.0, 0.0, 0.0]), zeros, 0.5, torch.Generator().manual_seed(s)).tolist())
        for s in range(60)
    }
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
    found = taxonomy.of(Axes(stats(), TipConfig(entropy_clip_quantile=None)))
    assert found.threshold_entropy == pytest.approx(0.33) and found.threshold_divergence == pytest.approx(0.88)
    assert found.quadrant.tolist() == [2, 3, 1, 4, 4, 4, 3, 2, 4, 1]
    metrics = taxonomy.describe(found, D, torch.tensor([1, 1, 0, 0, 0, 0, 1, 0, 0, 0], dtype=torch.bool))
    assert [metrics[f"tip/share_q{q}"] for q in (1, 2, 3, 4)] == pytest.approx([0.2, 0.2, 0.2, 0.4])
    assert [metrics[f"tip/mass_q{q}"] for q in (1, 2, 3, 4)] == pytest.approx([2 / 8.8, 0.1 / 8.8, 6 / 8.8, 0.7 / 8.8])
    assert [metrics[f"tip/kept_q{q}"] for q in (1, 2, 3, 4)] == pytest.approx([0, 0.5, 1, 0])
    assert metrics["tip/mass_covered"] == pytest.approx(6 / 8.8)


def test_equal_to_the_threshold_is_low():
    assert taxonomy.assign(torch.full((3,), 0.5), torch.full((3,), 1.0), (0.5, 1.0)).quadrant.tolist() == [4, 4, 4]


def test_equal_values_are_low_whatever_their_mean_rounds_to():
    for n in (3, 10, 1000):
        same = stats(torch.full((n,), 0.3), torch.full((n,), 0.7), torch.zeros(n).long(), torch.arange(n))
        assert set(taxonomy.of(Axes(same, TipConfig())).quadrant.tolist()) == {4}


def test_the_mean_of_equal_values_is_that_value():
    """Of float64 values: n copies of one of 24 bits sum up exactly, n copies of 0.1 mostly do not. Both ways of
    rounding."""
    above = below = 0
    for value in (0.1, 0.3, 1 / 3, 0.7, 2.3, 0.001):
        for n in range(2, 120):
            copies = torch.full((n,), value, dtype=torch.float64)
            above, below = above + (sum([value] * n) / n > value), below + (sum([value] * n) / n < value)
            assert Spread.of(copies).mean == value, (value, n)
    assert above > 10 and below > 10  # sums in turn, in IEEE double: these are cases that test something


@pytest.mark.parametrize("error", [1 + 2**-50, 1 - 2**-50])
def test_equal_values_are_low_also_where_a_mean_is_rounded_up_or_down(error, monkeypatch):
    """The same on a processor that sums otherwise: a mean that is off by a few units in the last place."""
    original = torch.Tensor.mean
    monkeypatch.setattr(torch.Tensor, "mean", lambda self, *rest, **named: original(self, *rest, **named) * error)
    for value in (0.1, 1 / 3, 0.7):
        assert torch.full((8,), value).double().mean().item() != torch.tensor(value).double().item()
        same = stats(torch.full((8,), value), torch.full((8,), value), torch.zeros(8).long(), torch.arange(8))
        assert taxonomy.of(Axes(same, TipConfig())).quadrant.tolist() == [4] * 8
        found = Spread.of(same.reverse_kl)
        assert found.mean == found.points[0].item()  # and not below either: an equal value is not above it


def test_the_axes_are_cut_before_the_thresholds():
    metrics = TipWeighter(TipConfig(entropy_clip_quantile=2 / 3))(stats(), torch.Generator()).metrics
    assert metrics["tip/threshold_entropy"] == pytest.approx(H.clamp(max=0.4).mean().item(), rel=1e-6)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_rule_reads_no_more_than_it_says_it_needs(rule):
    optional = {f.name for f in dataclasses.fields(TokenStats) if f.default is None}
    blind = dataclasses.replace(stats(), **dict.fromkeys(optional - TipWeighter(TipConfig(rule=rule)).needs))
    seeing, other = (TipWeighter(TipConfig(rule=rule))(s, torch.Generator().manual_seed(3)) for s in (stats(), blind))
    assert torch.equal(seeing.weights, other.weights)
    assert (seeing.forward_share is None) == (other.forward_share is None)
    seeing.check(stats())


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_takes_an_update_without_tokens(rule):
    none = torch.zeros(0)
    optional = {f.name: none for f in dataclasses.fields(TokenStats) if f.default is None}
    empty = token_stats_of(sequence_id=none.long(), position=none.long(), vocab_size=7, step=1, **optional)
    found = TipWeighter(TipConfig(rule=rule, aggregation="rollout_mean"))(empty, torch.Generator())
    assert found.weights.shape == (0,)
    found.check(empty)
