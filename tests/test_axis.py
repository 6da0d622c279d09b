"""The divergence of the score (tip.axis) and the normalisation without a statistic of other tokens."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from helpers import (
    blob,
    engine_for,
    naive_loss,
    one_each,
    pair_of,
    random_lm,
    random_rollouts,
    token_stats_of,
)
from runs import train

from opd.errors import InputError
from opd.record import dump
from opd.step import train_step
from tip import taxonomy
from tip.config import TipConfig
from tip.diagnostics import TipObserver
from tip.divergences import DIVERGENCES, fields_of
from tip.results.token_map import columns_of, page_of
from tip.rules import RULES
from tip.scores import Axes
from tip.weighter import TipWeighter

N, V = 40, 11
BOUNDED = [name for name, divergence in DIVERGENCES.items() if divergence.largest is not None]


@pytest.fixture(scope="module")
def update():
    """Logits of both models at N tokens of four rollouts, (N, V), and the statistics of the tokens."""
    make = torch.Generator().manual_seed(5)
    student, teacher = (4 * torch.randn(N, V, generator=make, dtype=torch.float64) for _ in range(2))
    log_p = student.log_softmax(-1)
    columns = {name: naive_loss(name, student, teacher).float() for name in DIVERGENCES}
    columns |= {"student_entropy": -(log_p.exp() * log_p).sum(-1).float()}
    for name in ("teacher_entropy", "overlap_kl", "teacher_topk_mass", "student_logprob", "teacher_logprob"):
        columns[name] = -torch.rand(N, generator=make)
    columns |= {name: torch.rand(N, generator=make) for name in ("reverse_kl_energy", "forward_kl_energy")}
    place = torch.arange(N)
    return (
        student,
        teacher,
        token_stats_of(sequence_id=place // 10, position=place % 10, vocab_size=V, step=1, **columns),
    )


def test_every_divergence_is_an_axis_and_a_field():
    axes = TipConfig.__dataclass_fields__["axis"].type.__origin__.__args__
    assert axes == tuple(DIVERGENCES)
    assert all(d.largest is None or d.largest > 0 for d in DIVERGENCES.values())


@pytest.mark.parametrize("axis", DIVERGENCES)
def test_the_axis_is_that_divergence(update, axis):
    student, teacher, stats = update
    d_N = naive_loss(axis, student, teacher)
    config = TipConfig(axis=axis, entropy_clip_quantile=None)
    axes = Axes(stats, config)
    torch.testing.assert_close(axes.d, d_N, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(axes.divergence, (d_N - d_N.min()) / (d_N.max() - d_N.min()), rtol=1e-5, atol=1e-6)
    quadrants = taxonomy.of(axes)
    assert quadrants.threshold_divergence == pytest.approx(d_N.mean().item(), rel=1e-5)
    assert torch.equal(quadrants.quadrant % 2 == 1, d_N > d_N.mean())
    weighter = TipWeighter(dataclasses.replace(config, rule="divergence", retention=0.2))
    answer = weighter(stats, torch.Generator())
    best = d_N.view(4, 10).topk(2).indices
    assert torch.equal(answer.weights.view(4, 10).nonzero()[:, 1].view(4, 2), best.sort().values)
    covered = d_N.view(4, 10).topk(2).values.sum() / d_N.sum()
    assert answer.metrics["tip/mass_covered"] == pytest.approx(covered.item(), rel=1e-5)


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("axis", DIVERGENCES)
def test_a_rule_with_another_axis_reads_that_one_alone(update, rule, axis):
    stats = update[2]
    weighter = TipWeighter(TipConfig(rule=rule, axis=axis))
    assert weighter.needs == fields_of(RULES[rule].needs, axis)
    blind = dataclasses.replace(stats, **dict.fromkeys(DIVERGENCES.keys() - weighter.needs))
    seen, other = (weighter(s, torch.Generator().manual_seed(3)).weights for s in (stats, blind))
    assert torch.equal(seen, other)


def test_total_variation_is_divergence_with_that_axis(update):
    one = TipConfig(rule="total_variation", retention=0.3)
    other = TipConfig(
        rule="divergence", axis="total_variation", retention=0.3, budget="per_update", mixture="total_variation"
    )
    a, b = (TipWeighter(config)(update[2], torch.Generator()) for config in (one, other))
    assert torch.equal(a.weights, b.weights) and torch.equal(a.forward_share, b.forward_share)


@pytest.mark.parametrize("axis", BOUNDED)
def test_absolute_by_its_formula(update, axis):
    student, teacher, stats = update
    p = student.softmax(-1)
    h = -(p * p.log()).sum(-1) / math.log(V)
    d = naive_loss(axis, student, teacher) / DIVERGENCES[axis].largest
    assert (d > 0).all() and (d < 1).all()
    config = TipConfig(axis=axis, normalization="absolute")
    torch.testing.assert_close(RULES["soft_or"].score(stats, Axes(stats, config)), h + d - h * d, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", BOUNDED)
def test_an_absolute_score_needs_no_other_token(update, axis):
    stats, config = update[2], TipConfig(axis=axis, normalization="absolute")
    whole = RULES["soft_or"].score(stats, Axes(stats, config))
    for part in torch.arange(N).split([1, 7, 12, 20]):
        rows = stats.rows(part)
        assert torch.equal(RULES["soft_or"].score(rows, Axes(rows, config)), whole[part])
    scaled = dataclasses.replace(config, normalization="minmax", entropy_clip_quantile=None)
    rows = stats.rows(torch.arange(7))
    assert not torch.equal(RULES["soft_or"].score(rows, Axes(rows, scaled)), whole[:7])


@pytest.mark.parametrize("axis", BOUNDED)
def test_the_largest_value_is_reached_by_models_that_share_no_token(axis):
    student, teacher = (torch.tensor([[40.0, -40.0]], dtype=torch.float64) * sign for sign in (1, -1))
    assert naive_loss(axis, student, teacher).item() == pytest.approx(DIVERGENCES[axis].largest)


@pytest.mark.parametrize(
    "options,message",
    [
        ({}, "axis is 'reverse_kl', which has no largest value to divide by. Set tip.axis to 'jsd' or 'total_variat"),
        ({"axis": "forward_kl"}, "axis is 'forward_kl'"),
        ({"axis": "jsd", "divergence_clip_quantile": 0.9}, "a quantile depends on other tokens"),
    ],
)
def test_absolute_refuses_what_is_not_token_local(options, message):
    with pytest.raises(InputError, match=message):
        TipWeighter(TipConfig(normalization="absolute", **options))


@pytest.mark.parametrize("rule", ["soft_or", "quadrant"])
def test_an_update_does_not_depend_on_micro_batches(rule):
    def kept(cut):
        student, teacher = random_lm(1), random_lm(2, hidden=48, layers=3, name="teacher")
        weighter = TipWeighter(TipConfig(rule=rule, axis="jsd", normalization="absolute", retention=0.4))
        batches = cut(random_rollouts(student, count=7))
        pair = pair_of(student, teacher)
        return train_step(pair, engine_for(student), batches, weighter, step=1, seed=0).weights.weights

    assert torch.equal(kept(one_each), kept(lambda rollouts: one_each(rollouts[::-1])))


@pytest.mark.parametrize("axis", ["jsd", "total_variation"])
def test_diagnostics_are_of_the_axis(update, axis):
    weighter = TipWeighter(TipConfig(axis=axis, rule="divergence", retention=0.2))
    observer, stats = TipObserver(weighter), update[2]
    assert {axis, "student_entropy"} <= observer.needs and "reverse_kl" not in observer.needs
    weights = weighter(stats, torch.Generator())
    diagnosis = observer.diagnose(stats, weights)
    d_N = vars(stats)[axis].double()
    assert torch.equal(diagnosis.histograms["tip/divergence"], d_N)
    assert torch.equal(observer.columns(stats, weights, torch.Generator())[axis], vars(stats)[axis])


def test_dump_map_and_metrics_of_a_run_are_of_its_axis(tmp_path):
    settings = ("optim.steps=1", "rollout.prompts_per_step=4", "rollout.n=1", "log.token_dump_every=1")
    run = train(tmp_path, "eval.benchmarks=[]", "optim.warmup_steps=0", *settings, "tip.axis=jsd")
    rows = dump.read(run / "tokens" / "step_000001.jsonl")
    jsd = [d for row in rows for d in row["jsd"]]
    assert len(jsd) == sum(len(row["token_ids"]) for row in rows) and 0 <= min(jsd) <= max(jsd) <= math.log(2)
    metrics = json.loads((run / "metrics.jsonl").read_text())
    assert metrics["tip/threshold_divergence"] == pytest.approx(sum(jsd) / len(jsd), rel=1e-4)
    page = page_of({"run": run}, "")
    assert json.loads(blob(page, "about"))["runs"][0]["divergence"]["title"] == "JSD"
    place = 4 * len(jsd) * (1 + columns_of("jsd").index("jsd"))
    shown = np.frombuffer(blob(page, "columns-0-0"), "<f4", len(jsd), place)
    assert shown.tolist() == pytest.approx(jsd)
