"""Scopes of the normalisation: per micro-batch, and running, with which the student's body runs once per update."""

import copy
import dataclasses
import math

import pytest
import torch
from helpers import LOSS, engine_for, flat_gradient, one_each, random_lm, random_rollouts, relative

from opd.batch import make_micro_batches
from opd.config import load_config
from opd.errors import InputError
from opd.hooks import RunningWeighter, TokenStats, TokenWeights
from opd.step import train_step
from opd.train import run
from tip.config import SECTIONS, TipConfig
from tip.rules import RULES
from tip.scores import Spread
from tip.weighter import TipWeighter

PER_ROLLOUT = [name for name, rule in RULES.items() if rule.budget == "per_rollout" or rule.mechanic == "weights"]


def update(student, teacher, engine, micro_batches, weighter, number):
    return train_step(
        student=student,
        teacher=teacher,
        engine=engine,
        micro_batches=micro_batches,
        weighter=weighter,
        loss=LOSS,
        vocab_size=35,
        step=number,
        seed=0,
    )


def two_updates(weighter, cut, seed=0):
    """Update 1 (two passes) and update 2 (one pass if the weighter can); the results, the gradient of 2, bodies run in
    2."""
    student, teacher = random_lm(1), random_lm(2, hidden=48, layers=3, name="teacher")
    engine = engine_for(student, "optim.warmup_steps=0", "optim.lr=1e-3")
    first = update(student, teacher, engine, cut(random_rollouts(student, count=7, seed=seed)), weighter, 1)
    runs, gradients = [], []
    handle = student.model.base_model.register_forward_hook(lambda *_: runs.append(1))
    original = engine.finish

    def finish(apply, divisor=1.0):
        gradients.append(flat_gradient(student.model) / divisor)
        return original(apply, divisor)

    engine.finish = finish
    second = update(student, teacher, engine, cut(random_rollouts(student, count=7, seed=seed + 1)), weighter, 2)
    handle.remove()
    return first, second, gradients[0], len(runs)


class Replay:
    """Two passes with the weights that another weighter chose; update 1 as that one does it."""

    needs = frozenset({"student_entropy"})

    def __init__(self, first, second):
        self.answers = {1: first, 2: second}

    def __call__(self, stats: TokenStats, generator) -> TokenWeights:
        return TokenWeights(
            weights=self.answers[stats.step].weights, forward_share=self.answers[stats.step].forward_share
        )


@pytest.mark.parametrize("rule", PER_ROLLOUT)
def test_one_pass_is_the_update_of_two_passes_with_the_same_weights(rule):
    weighter = TipWeighter(TipConfig(rule=rule, retention=0.4, scope="running"))
    assert isinstance(weighter, RunningWeighter) and not weighter.one_pass
    first, second, gradient, bodies = two_updates(weighter, one_each)
    assert weighter.one_pass == bool(RULES[rule].needs)  # without statistics there is nothing to remember
    _, replayed, expected, twice = two_updates(Replay(first.weights, second.weights), one_each)
    assert torch.equal(second.stats.sequence_id, replayed.stats.sequence_id)
    assert second.loss == pytest.approx(replayed.loss, rel=1e-6)
    assert relative(gradient, expected) < 3e-6
    if weighter.one_pass:
        assert bodies == 7 and twice == 7 + len(second.stats.sequence_id[second.weights.weights > 0].unique())
        assert second.metrics["optim/grad_norm"] == pytest.approx(replayed.metrics["optim/grad_norm"], rel=1e-5)


@pytest.mark.parametrize("rule", ["soft_or", "soft_or_sampling", "product", "quadrant", "eopd"])
def test_one_pass_does_not_depend_on_micro_batches_or_order(rule):
    def found(cut):
        return two_updates(TipWeighter(TipConfig(rule=rule, retention=0.4, scope="running")), cut)

    _, base, gradient, _ = found(one_each)
    for cut in (
        lambda rollouts: make_micro_batches(rollouts, 60, 7, "keep"),
        lambda rollouts: list(reversed(make_micro_batches(rollouts, 40, 3, "keep"))),
    ):
        _, other, other_gradient, _ = found(cut)
        assert torch.equal(base.weights.weights > 0, other.weights.weights > 0)
        assert relative(other_gradient, gradient) < 3e-6


def test_rollouts_draw_independently_in_one_pass():
    """Two rollouts of equal length and equal scores: the same draw twice would be one random number used twice."""
    weighter = TipWeighter(TipConfig(rule="entropy_sampling", retention=0.5, scope="running"))
    student, teacher = random_lm(1), random_lm(2, name="teacher")
    engine = engine_for(student, "optim.warmup_steps=0")
    one = random_rollouts(student, count=1, response=(12, 12))[0]
    twins = one_each([dataclasses.replace(one, sequence_id=i) for i in range(6)])
    update(student, teacher, engine, twins, weighter, 1)
    result = update(student, teacher, engine, twins, weighter, 2)
    drawn = {tuple(result.weights.weights[result.stats.sequence_id == i].tolist()) for i in range(6)}
    assert len(drawn) > 3


def test_an_update_that_keeps_nothing_in_one_pass_changes_nothing():
    weighter = TipWeighter(TipConfig(rule="soft_or", retention=0.5, scope="running"))
    student, teacher = random_lm(1), random_lm(2, name="teacher")
    engine = engine_for(student, "optim.warmup_steps=0")
    update(student, teacher, engine, one_each(random_rollouts(student)), weighter, 1)
    before = copy.deepcopy(student.model.state_dict())
    weighter.config = dataclasses.replace(weighter.config, retention=0.01)
    with pytest.warns(UserWarning, match="no token has weight above 0"):
        result = update(student, teacher, engine, one_each(random_rollouts(student)), weighter, 2)
    assert result.loss == 0 and all(torch.equal(before[k], v) for k, v in student.model.state_dict().items())


def test_running_quantiles_by_hand():
    weighter = TipWeighter(TipConfig(rule="divergence", scope="running", running_decay=0.75))
    answer = TokenWeights(weights=torch.ones(3))
    for step, d in ((1, [0.0, 1.0, 4.0]), (2, [2.0, 2.0, 8.0])):
        stats = TokenStats(
            sequence_id=torch.zeros(3).long(),
            position=torch.arange(3),
            vocab_size=7,
            step=step,
            reverse_kl=torch.tensor(d),
        )
        weighter.learn(stats, answer)
    spread = weighter.memory["reverse_kl"]
    # minimum .75 * 0 + .25 * 2, median .75 * 1 + .25 * 2, maximum .75 * 4 + .25 * 8; q75 between 1 and 4, 2 and 8
    assert [spread.quantile(q) for q in (0, 0.5, 0.75, 1)] == pytest.approx([0.5, 1.25, 0.75 * 2.5 + 0.25 * 5, 5.0])
    restored = TipWeighter(weighter.config)
    restored.load_state(weighter.state())
    assert restored.one_pass and torch.equal(restored.memory["reverse_kl"].points, spread.points)


def two_learnt(rule):
    """A running weighter after two updates of three tokens, the second of them, and its metrics."""
    weighter = TipWeighter(TipConfig(rule=rule, scope="running", running_decay=0.75, entropy_clip_quantile=None))
    for step, h, d in ((1, [0.0, 0.5, 1.0], [0.0, 1.0, 4.0]), (2, [0.25, 0.75, 0.6], [1.0, 1.8, 8.0])):
        stats = TokenStats(
            sequence_id=torch.zeros(3).long(),
            position=torch.arange(3),
            vocab_size=7,
            step=step,
            student_entropy=torch.tensor(h) * math.log(7),
            reverse_kl=torch.tensor(d),
        )
        metrics = weighter.learn(stats, TokenWeights(weights=torch.ones(3)))
    return weighter, stats, metrics


def test_looking_back_by_hand_is_by_what_was_known_before():
    weighter, stats, metrics = two_learnt("soft_or")
    score, found = weighter.look_back(stats)
    # by update 1 the axes are h and d / 4, cut at 1: .25 .75 .6 and .25 .45 1
    assert score.tolist() == pytest.approx([1 - 0.75 * 0.75, 1 - 0.25 * 0.55, 1])
    # its quantiles average .5, and .5 below the median and 2.5 above it; those of both updates would say .51 and 1.91,
    # those of update 2 alone .53 and 3.6: there the second token is in quadrant 2
    assert found.quadrant.tolist() == [4, 1, 1]
    assert found.threshold_entropy == pytest.approx(0.5, abs=1e-6)
    assert found.threshold_divergence == pytest.approx(1.5, abs=0.01)  # of 1001 points
    assert metrics["tip/threshold_divergence"] == found.threshold_divergence
    assert [metrics[f"tip/share_q{q}"] for q in (1, 2, 3, 4)] == pytest.approx([2 / 3, 0, 0, 1 / 3])


def test_looking_back_with_a_memory_of_one_axis_takes_the_quadrants_of_the_update():
    weighter, stats, metrics = two_learnt("entropy_topk")
    assert set(weighter.memory) == {"student_entropy"}
    score, found = weighter.look_back(stats)
    assert score.tolist() == pytest.approx([0.25, 0.75, 0.6])
    assert found.threshold_entropy == pytest.approx(1.6 / 3) and found.threshold_divergence == pytest.approx(3.6)
    assert found.quadrant.tolist() == [4, 2, 1] and metrics["tip/share_q2"] == pytest.approx(1 / 3)


def test_spread_by_hand():
    spread = Spread.of(torch.tensor([3.0, 1.0, 1.0, 5.0]))
    assert spread.points.tolist() == [1, 1, 3, 5]
    assert spread.quantile(0.5) == 2.0 and spread.quantile(1 / 3) == pytest.approx(1.0)
    # among 1 1 3 5: the ones share places 0 and 1, 2 falls between places 1 and 2, what lies outside is cut
    assert spread.place(torch.tensor([1.0, 2.0, 3.0, 5.0, 9.0, 0.0])).tolist() == pytest.approx(
        [1 / 6, 0.5, 2 / 3, 1, 1, 0]
    )
    grid = spread.on_grid()
    assert len(grid.points) == 1001 and [grid.quantile(q) for q in (0, 0.5, 1)] == pytest.approx([1, 2, 5])


def test_micro_batch_scope_by_hand():
    # two micro-batches whose divergences have other ranges: each is mapped by its own
    stats = TokenStats(
        sequence_id=torch.tensor([0, 0, 1, 1]),
        position=torch.tensor([0, 1, 0, 1]),
        vocab_size=7,
        step=1,
        student_entropy=torch.zeros(4),
        reverse_kl=torch.tensor([0.0, 1.0, 0.0, 10.0]),
        micro_batch=torch.tensor([3, 3, 5, 5]),
    )
    score = lambda scope: TipWeighter(TipConfig(scope=scope)).scores(stats)[0].tolist()  # noqa: E731
    assert score("micro_batch") == [0, 1, 0, 1] and score("update") == pytest.approx([0, 0.1, 0, 1])


def test_what_is_worked_out_per_micro_batch_comes_back_in_the_order_of_the_rows():
    # the longest rollouts go first, so micro-batches do not follow the rows: here 5 5 3 3 4 4 3, which is no order that
    # undoes itself. Each micro-batch has a range of its own: 0..2 (5), 0..10 (3), 1..5 (4)
    stats = TokenStats(
        sequence_id=torch.tensor([0, 0, 1, 1, 2, 2, 3]),
        position=torch.tensor([0, 1, 0, 1, 0, 1, 0]),
        vocab_size=7,
        step=1,
        student_entropy=torch.zeros(7),
        reverse_kl=torch.tensor([2.0, 0.0, 1.0, 10.0, 1.0, 5.0, 0.0]),
        total_variation=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        micro_batch=torch.tensor([5, 5, 3, 3, 4, 4, 3]),
    )
    config = TipConfig(rule="soft_or", mixture="total_variation", scope="micro_batch")
    weighter = TipWeighter(config)
    score, share = weighter.scores(stats)
    assert score.tolist() == pytest.approx([1, 0, 0.1, 1, 0, 1, 0])
    assert torch.equal(share, stats.total_variation)
    # half of each rollout: the better of two, and none of one
    assert weighter(stats, torch.Generator()).weights.tolist() == [1, 0, 0, 1, 0, 1, 0]
    # high is above the mean of the micro-batch: 1, 11/3 and 3; nowhere is entropy high
    seen, found = weighter.look_back(stats)
    assert seen.tolist() == pytest.approx([1, 0, 0.1, 1, 0, 1, 0])
    assert found.quadrant.tolist() == [3, 4, 4, 3, 4, 3, 4]
    assert found.threshold_divergence == pytest.approx((2 * 1 + 3 * 11 / 3 + 2 * 3) / 7)


@pytest.mark.parametrize("rule", ["soft_or", "quadrant", "teachability", "total_variation"])
def test_micro_batch_scope_with_one_micro_batch_is_update_scope(rule):
    found = {}
    for scope in ("update", "micro_batch"):
        weighter = TipWeighter(TipConfig(rule=rule, retention=0.4, scope=scope))
        whole = lambda rollouts: make_micro_batches(rollouts, 10_000, 0, "keep")  # noqa: E731
        _, found[scope], _, _ = two_updates(weighter, whole)
    assert torch.equal(found["update"].weights.weights, found["micro_batch"].weights.weights)
    _, cut, _, _ = two_updates(TipWeighter(TipConfig(rule="soft_or", retention=0.4, scope="micro_batch")), one_each)
    assert set(cut.stats.micro_batch.tolist()) == set(range(7))


@pytest.mark.parametrize("rule", ["total_variation", "teachability"])
def test_running_scope_refuses_a_budget_over_the_whole_update(rule):
    with pytest.raises(InputError, match=r"one rollout at a time.*tip.budget=per_rollout"):
        TipWeighter(TipConfig(rule=rule, scope="running"))
    TipWeighter(TipConfig(rule=rule, scope="running", budget="per_rollout"))


class Compared(TipWeighter):
    """Running scope that also asks what scope update would have kept of the same statistics."""

    def learn(self, stats, weights):
        update_scope = TipWeighter(dataclasses.replace(self.config, scope="update"))
        other = update_scope(stats, torch.Generator()).weights
        kept, would = weights.weights > 0, other > 0
        self.differing.append((kept != would).double().mean().item())
        self.overlap.append((kept & would).sum().item() / (kept | would).sum().item())
        return super().learn(stats, weights)


@pytest.mark.parametrize(
    "settings,overlap",
    [
        (("tip.rule=soft_or", "tip.retention=0.5"), 0.95),
        (("tip.rule=soft_or", "tip.retention=0.2"), 0.95),
        (("tip.rule=soft_or", "tip.retention=0.1"), 0.9),
        # at 10 % the cut falls among tokens beyond the 95th percentile, which all score 1: a small shift reorders them
        (("tip.rule=soft_or", "tip.retention=0.1", "tip.normalization=quantile"), 0.4),
        (("tip.rule=soft_or", "tip.retention=0.2", "tip.normalization=quantile"), 0.85),
        (("tip.rule=q3", "tip.retention=0.2"), 0.95),
        (("tip.rule=quadrant",), 0.7),
        (("tip.rule=teachability", "tip.retention=0.2", "tip.budget=per_rollout"), 0.9),
    ],
)
def test_running_differs_from_update_on_few_tokens_after_twenty_updates(settings, overlap, tiny_pair, tmp_path):
    texts = [
        f"output_dir={tmp_path}",
        "optim.steps=30",
        "eval.benchmarks=[]",
        "log.diagnostics_every=0",
        "log.samples=0",
    ]
    config, sections = load_config("configs/tiny.json", [*texts, "tip.scope=running", *settings], SECTIONS)
    weighter = Compared(sections["tip"])
    weighter.differing, weighter.overlap = [], []
    run(config, weighter, sections)
    assert weighter.differing[0] == 0  # the first update is of scope update
    assert sum(weighter.differing[20:]) / 10 < (0.05 if overlap > 0.4 else 0.09)
    assert sum(weighter.overlap[20:]) / 10 > overlap
