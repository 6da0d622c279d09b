"""The frozen pair: its scores of later rollouts, the drift of a selection, and the control that selects by it."""

import dataclasses
import json

import pytest
import torch
from helpers import random_rollouts, tiny_config, token_stats_of
from runs import words

from opd.batch import make_micro_batches
from opd.errors import InputError
from opd.step import score_update
from tip import train as tip_train
from tip.config import TipConfig
from tip.frozen import FrozenPair, with_frozen_pair
from tip.weighter import TipWeighter

FIELDS = frozenset({"student_entropy", "reverse_kl"})


def stats(d, frozen_d):
    n = len(d)
    zeros = torch.zeros(n)
    return token_stats_of(
        sequence_id=torch.zeros(n).long(),
        position=torch.arange(n),
        vocab_size=7,
        step=1,
        reverse_kl=torch.tensor(d),
        student_entropy=zeros,
        extra={"frozen_reverse_kl": torch.tensor(frozen_d), "frozen_student_entropy": zeros},
    )


def weighed(how, rule="divergence", **options):
    update = stats([0.5, 4.0, 3.0, 2.0, 1.0, 0.0], [5.0, 4.0, 0.0, 3.0, 1.0, 0.5])
    weighter = TipWeighter(TipConfig(rule=rule, retention=0.5, frozen=how, **options))
    return weighter(update, torch.Generator().manual_seed(0))


def test_drift_and_control_by_hand():
    # now 1 2 3 are the top; of the frozen pair 0 1 3: two in common of four
    measured, chosen = weighed("measure"), weighed("select")
    assert measured.weights.tolist() == [0, 1, 1, 1, 0, 0] and chosen.weights.tolist() == [1, 1, 0, 1, 0, 0]
    assert measured.metrics["tip/drift"] == chosen.metrics["tip/drift"] == pytest.approx(0.5)
    assert "tip/drift" not in weighed("none").metrics and "tip/drift" not in weighed("measure", "random").metrics
    assert torch.equal(weighed("none").weights, measured.weights)


def test_two_draws_from_the_same_scores_do_not_drift():
    update = stats([0.5, 4.0, 3.0, 2.0, 1.0, 0.0], [0.5, 4.0, 3.0, 2.0, 1.0, 0.0])
    for how in ("measure", "select"):
        weighter = TipWeighter(TipConfig(rule="soft_or_sampling", retention=0.5, frozen=how))
        answer = weighter(update, torch.Generator().manual_seed(3))
        plain = TipWeighter(dataclasses.replace(weighter.config, frozen="none"))
        assert torch.equal(answer.weights, plain(update, torch.Generator().manual_seed(3)).weights)
        assert answer.metrics["tip/drift"] == 0


def test_the_scorer_gives_what_the_pair_says(tiny_pair):
    """Of rollouts in any order and with any sequence ids, the statistics that an update of the same pair sees."""
    config = with_frozen_pair(tiny_config("optim.micro_batch_tokens=100"), TipConfig(frozen="measure"))
    scorer = FrozenPair(**config.rollout.scorer.settings)
    assert scorer.names == {"frozen_student_entropy", "frozen_reverse_kl"}
    rollouts = [dataclasses.replace(r, sequence_id=7 * r.sequence_id) for r in random_rollouts(scorer.pair.student)]
    batches = make_micro_batches(rollouts, 1000, 0, "keep")
    expected, found = score_update(scorer.pair, batches, FIELDS, 1), scorer(rollouts[::-1])
    for field in FIELDS:
        for rollout, column in zip(rollouts[::-1], found[f"frozen_{field}"], strict=True):
            rows = expected.sequence_id == rollout.sequence_id
            torch.testing.assert_close(column, vars(expected)[field][rows], rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in scorer.pair.student.model.parameters())
    assert scorer([]) == {name: [] for name in scorer.names}


def test_a_run_drifts_once_the_student_has_moved(tmp_path):
    settings = ("optim.steps=2", "optim.warmup_steps=0", "optim.lr=3e-3", "eval.benchmarks=[]", "tip.retention=0.2")
    small = ("rollout.prompts_per_step=8", "log.token_dump_every=0", f"output_dir={tmp_path}")
    runs = {}
    for how in ("none", "measure", "select"):
        tip_train.command(words(*settings, *small, f"run_name={how}", f"tip.frozen={how}", "tip.rule=divergence"))
        lines = (tmp_path / how / "metrics.jsonl").read_text().splitlines()
        runs[how] = [json.loads(line) for line in lines]
    drift = [row["tip/drift"] for row in runs["measure"]]
    assert drift[0] == 0 and 0 < max(drift) <= 1
    for name in ("loss/divergence", "tokens/kept", "optim/grad_norm"):  # to measure changes nothing
        assert [row[name] for row in runs["measure"]] == [row[name] for row in runs["none"]]
    assert runs["select"][0]["optim/grad_norm"] == runs["none"][0]["optim/grad_norm"]
    assert runs["select"][1]["optim/grad_norm"] != runs["none"][1]["optim/grad_norm"]


def test_what_does_not_go_together_is_refused():
    with pytest.raises(InputError, match="scope is 'running', which remembers the student's own scores"):
        TipWeighter(TipConfig(frozen="measure", scope="running"))
    other = tiny_config('rollout.scorer={"name": "mine:Reward"}')
    with pytest.raises(InputError, match="the frozen pair takes the place of a scorer"):
        with_frozen_pair(other, TipConfig(frozen="select"))
    assert with_frozen_pair(other, TipConfig(frozen="select", rule="random")) is other
    split = tiny_config("teacher.placement=sharded", "engine.kind=deepspeed", "engine.deepspeed=zero2")
    with pytest.raises(InputError, match="whole on the device of each process"):
        with_frozen_pair(split, TipConfig(frozen="measure"))
