"""tip.rollout_weight: the factor of a rollout, by hand and in the gradient."""

import dataclasses
import math

import pytest
import torch
from environments import section
from helpers import engine_for, flat_gradient, one_each, pair_of, random_lm, random_rollouts, relative, token_stats_of
from runs import configured, words

from opd.batch import make_micro_batches
from opd.build import load_scorers
from opd.errors import InputError
from opd.hooks import TokenStats, TokenWeights
from opd.step import train_step
from opd.train import run
from tip import train as tip_train
from tip.config import TipConfig
from tip.divergences import fields_of
from tip.rules import RULES
from tip.weighter import TipWeighter

# six rollouts of three prompts: 0 1 2 of the first, 3 4 of the second, 5 of the third; rollout 4 is unknown
SEQUENCE = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 5])
PROMPT = torch.tensor([70, 70, 70, 70, 70, 70, 20, 20, 20, 90])
VERDICT = [1.0, 0.0, 0.25, 1.0, math.nan, 0.0]  # of the rollouts
TOKENS = [2, 1, 3, 1, 2, 1]


def stats(verdict=VERDICT):
    position = torch.tensor([0, 1, 0, 0, 1, 2, 0, 0, 1, 0])
    columns = {
        "sequence_id": SEQUENCE,
        "position": position,
        "prompt_id": PROMPT,
        "verdict": torch.tensor(verdict)[SEQUENCE],
    }
    return token_stats_of(**columns, vocab_size=7, step=1, reverse_kl=torch.arange(10.0))


def factors(how, verdict=VERDICT, **options):
    """The factor of each rollout."""
    weighter = TipWeighter(TipConfig(rule="all", rollout_weight=how, **options))
    assert weighter.needs == {"verdict"}
    weights = weighter(stats(verdict), torch.Generator()).weights
    parts = weights.split(TOKENS)
    assert all((part == part[0]).all() for part in parts)
    return [part[0].item() for part in parts]


def test_right_and_wrong_by_hand():
    assert factors("right") == [1, 0, 0.25, 1, 0, 0]
    assert factors("wrong") == [0, 1, 0.75, 0, 0, 1]


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.01])
def test_reward_by_hand(beta):
    sizes = [0 if math.isnan(v) else math.exp((v - 1) / beta) for v in VERDICT]
    assert factors("reward", reward_beta=beta) == pytest.approx([size / sum(sizes) for size in sizes], rel=1e-6)


def test_pass_rate_by_hand():
    first, second = 1.25 / 3, 1.0  # the unknown one has no say in the rate of its prompt
    a, b = first * (1 - first), second * (1 - second)
    assert factors("pass_rate") == pytest.approx([a, a, a, b, 0, 0], rel=1e-6)
    assert factors("pass_rate", [1, 0, 1, 0, 1, 1]) == pytest.approx([2 / 9, 2 / 9, 2 / 9, 1 / 4, 1 / 4, 0], rel=1e-6)


@pytest.mark.parametrize("how", ["reward", "pass_rate", "right", "wrong"])
def test_of_unknown_rollouts_nothing_is_learnt(how):
    assert factors(how, [math.nan] * 6) == [0] * 6
    assert factors(how)[4] == 0
    empty = stats().rows(torch.zeros(10, dtype=torch.bool))
    assert TipWeighter(TipConfig(rule="all", rollout_weight=how))(empty, torch.Generator()).weights.shape == (0,)


@pytest.mark.parametrize("rule", ["divergence", "random", "first_k"])
def test_the_factor_multiplies_what_a_rule_keeps(rule):
    one, both = (TipWeighter(TipConfig(rule=rule, retention=0.5, rollout_weight=how)) for how in ("none", "right"))
    kept, weights = (w(stats(), torch.Generator().manual_seed(1)).weights for w in (one, both))
    assert kept.sum() == 3 and torch.equal(weights, kept * torch.tensor([1, 0, 0.25, 1, 0, 0])[SEQUENCE])
    assert one.needs == fields_of(RULES[rule].needs, "reverse_kl") and both.needs == one.needs | {"verdict"}


def test_a_mean_of_rollouts_is_weighted_by_rollout():
    weighter = TipWeighter(TipConfig(rule="all", rollout_weight="right", aggregation="rollout_mean"))
    sums = [part.sum().item() for part in weighter(stats(), torch.Generator()).weights.split(TOKENS)]
    assert sums == pytest.approx([1, 0, 0.25, 1, 0, 0])


@pytest.mark.parametrize("rule", sorted(RULES))
def test_none_is_the_rule_alone(rule):
    """Without a factor a rule neither reads nor needs a verdict."""
    optional = {f.name: torch.rand(10) for f in dataclasses.fields(TokenStats) if f.default is None}
    update = dataclasses.replace(stats(), **optional)
    blind = dataclasses.replace(update, verdict=torch.full((10,), torch.nan))
    weighter = TipWeighter(TipConfig(rule=rule, retention=0.5, rollout_weight="none"))
    a, b = (weighter(s, torch.Generator().manual_seed(2)).weights for s in (update, blind))
    assert weighter.needs == fields_of(RULES[rule].needs, "reverse_kl") and torch.equal(a, b)


def test_the_memory_of_earlier_updates_holds_no_verdicts():
    weighter = TipWeighter(TipConfig(rule="divergence", scope="running", rollout_weight="right"))
    weighter(stats(), torch.Generator())
    assert set(weighter.state()) == {"reverse_kl"}


class Judged:
    """A weighter behind a factor, as it would be with verdicts from outside: rollout i has the verdict i % 3 / 2."""

    def __init__(self, weighter):
        self.weighter, self.needs = weighter, weighter.needs - {"verdict"}

    def __call__(self, stats, generator):
        verdict = (stats.sequence_id % 3).float() / 2
        return self.weighter(dataclasses.replace(stats, verdict=verdict), generator)


class PerMicroBatch:
    """The reward weight as it is upstream: a softmax over the rollouts of each micro-batch of `size` rollouts."""

    needs = frozenset()

    def __init__(self, size):
        self.size = size

    def __call__(self, stats, generator):
        exponentials = [math.exp(i % 3 / 2 / 0.2) for i in range(6)]
        sums = [sum(exponentials[i // self.size * self.size :][: self.size]) for i in range(6)]
        weights = torch.tensor([e / s for e, s in zip(exponentials, sums, strict=True)])
        return TokenWeights(weights=weights[stats.sequence_id])


def gradient(batches, weighter):
    student = random_lm(1)
    engine, seen = engine_for(student), []
    original = engine.finish
    engine.finish = lambda apply: seen.append(flat_gradient(student.model)) or original(apply)
    train_step(pair_of(student, random_lm(2, name="teacher")), engine, batches, weighter, step=1, seed=0)
    return seen[0]


@pytest.mark.parametrize("how", ["reward", "pass_rate", "right", "wrong"])
def test_the_factor_does_not_depend_on_micro_batches(how):
    rollouts = random_rollouts(random_lm(1), count=6)
    prompts = [rollouts[i // 3 * 3].prompt for i in range(6)]
    rollouts = [dataclasses.replace(r, prompt=p) for r, p in zip(rollouts, prompts, strict=True)]
    weighter = Judged(TipWeighter(TipConfig(rule="all", rollout_weight=how, reward_beta=0.2)))
    alone, together = (
        gradient(b, weighter) for b in (one_each(rollouts), make_micro_batches(rollouts, 10**6, 0, "keep"))
    )
    assert relative(alone, together) < 3e-6


def test_the_reward_weight_does_not_cancel_where_that_of_a_micro_batch_does():
    """At one rollout a micro-batch the softmax over a micro-batch is 1, so upstream's weight is no weight."""
    rollouts = random_rollouts(random_lm(1), count=6)
    batches = one_each(rollouts)
    plain = gradient(batches, TipWeighter(TipConfig(rule="all")))
    ours = gradient(batches, Judged(TipWeighter(TipConfig(rule="all", rollout_weight="reward", reward_beta=0.2))))
    assert relative(gradient(batches, PerMicroBatch(1)), plain) < 3e-6 < 0.1 < relative(ours, plain)
    assert relative(gradient(batches, PerMicroBatch(6)), ours) < 3e-6  # the same formula over the whole update


def test_an_environment_gives_verdicts_where_no_field_has_an_answer(tmp_path):
    config, sections = configured(tmp_path, "tip.rule=all", "tip.rollout_weight=right", "data.answer_field=null")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, environment=section()))
    assert load_scorers(config, TipWeighter(sections["tip"])) == ()


def test_what_cannot_work_is_refused(tmp_path):
    settings = [f"output_dir={tmp_path}", "tip.rollout_weight=pass_rate"]
    with pytest.raises(InputError, match=r"rollout.n is 1: of one rollout the pass rate p is 0 or 1"):
        tip_train.command(words(*settings))
    with pytest.raises(InputError, match=r"all, rollouts by right needs verdicts, and data.answer_field is null"):
        config, sections = configured(tmp_path, "tip.rule=all", "tip.rollout_weight=right", "data.answer_field=null")
        run(config, TipWeighter(sections["tip"]), sections)
    assert not list(tmp_path.iterdir())
