"""What is known of a token besides its statistics: columns that are always there, verdicts, and a scorer's columns."""

import json
import math
import threading
from dataclasses import replace

import pytest
import torch
from helpers import blob, engine_for, one_each, pair_of, random_lm, random_rollouts
from runs import configured, train

from opd import train as training
from opd.batch import make_micro_batches
from opd.benchmarks import read_benchmark, takes_answer_lines
from opd.build import load_scorers
from opd.config import ScorerSection
from opd.data import Prompt, Rollout
from opd.errors import InputError
from opd.grading import Grader, Verdict
from opd.hooks import TokenWeights, UniformWeighter
from opd.record import dump
from opd.scorer import load_scorer, token_columns
from opd.step import Pair, train_step
from opd.verdicts import Verdicts
from tip.results.token_map import page_of


class Keeps:
    """A weighter that weighs all tokens alike and keeps the statistics of the latest update."""

    def __init__(self, *needs):
        self.needs, self.seen = frozenset(needs), []

    def __call__(self, stats, generator):
        self.seen = [*self.seen, stats]
        return TokenWeights(weights=torch.ones(len(stats.position)))


class Reward:
    """A scorer for the tests: the place of a token in its response, plus `offset`; unknown for the first token."""

    names = frozenset({"reward", "length_share"})

    def __init__(self, offset=0.0):
        self.offset, self.calls = offset, 0

    def __call__(self, rollouts):
        self.calls += 1
        places = [torch.arange(len(r.response_ids)).float() for r in rollouts]
        return {
            "reward": [torch.where(p > 0, p + self.offset, torch.nan) for p in places],
            "length_share": [(p + 1) / len(p) for p in places],
        }


class Grades:
    """A grader that finds 7 right, gives up on x, and waits for a permission where it has one."""

    def __init__(self, permission=None):
        self.permission, self.asked = permission, []

    def grade(self, pairs, answer_lines=False):
        self.asked.append((list(pairs), answer_lines))
        if self.permission:
            assert self.permission.wait(60)
        return [Verdict(text, None if text == "x" else text == "7") for text, _ in pairs]


class Texts:
    """A tokenizer whose texts are the ids."""

    def decode(self, ids, skip_special_tokens):
        return "x" if ids[0] == 0 else str(ids[0])


def two_prompts():
    """Two rollouts of one prompt and one of another; the last one is cut."""
    one, other = Prompt("a", (5, 6, 7), "7"), Prompt("b", (5, 6), "7")
    return [
        Rollout(0, one, (8, 9, 34), "stop"),
        Rollout(1, other, (7,), "stop"),
        Rollout(2, one, (9, 9, 9, 9, 9), "length"),
    ]


def update(batches, weighter, *scorers, measure=frozenset()):
    student = random_lm(1)
    pair = pair_of(student, random_lm(2, name="teacher"))
    pair = Pair(pair.student, pair.teacher, pair.vocab_size, pair.loss, scorers)
    return train_step(pair, engine_for(student), batches, weighter, step=1, seed=0, measure=measure)


@pytest.mark.parametrize("size", [1, 10, 100])
def test_the_columns_that_are_always_there_by_hand(size):
    stats = update(make_micro_batches(two_prompts()[::-1], size, 0, "mask_tail"), UniformWeighter()).stats
    assert stats.sequence_id.tolist() == [0, 0, 0, 1, 2] and stats.position.tolist() == [0, 1, 2, 0, 0]
    assert stats.token_id.tolist() == [8, 9, 34, 7, 9]  # of five rounds of 9 the first one counts
    assert stats.length.tolist() == [3, 3, 3, 1, 5] and stats.turn.tolist() == [0] * 5
    assert stats.truncated.tolist() == [0] * 4 + [1]
    assert stats.prompt_id[0] == stats.prompt_id[4] != stats.prompt_id[3] and stats.verdict.isnan().all()
    assert not stats.extra


def test_prompts_of_two_files_with_the_same_name_are_two_prompts():
    rollouts = [Rollout(i, Prompt("1", (5, i), "7"), (8,), "stop") for i in (6, 7)]
    stats = update(one_each(rollouts), UniformWeighter()).stats
    assert len(stats.prompt_id.unique()) == 2


def test_a_verdict_is_a_column_of_those_who_need_it():
    rollouts = [Rollout(i, Prompt("a", (5,), "7"), (first, 9), "stop") for i, first in enumerate((7, 8, 0))]
    grader = Grades()
    verdicts = Verdicts(grader, Texts(), True)
    verdicts.begin(rollouts)
    needing, other = Keeps("verdict"), Keeps()
    for weighter in (needing, other):
        update(make_micro_batches(rollouts, 4, 0, "keep"), weighter, verdicts)
    assert needing.seen[0].verdict.tolist()[:4] == [1, 1, 0, 0] and needing.seen[0].verdict[4:].isnan().all()
    assert other.seen[0].verdict.isnan().all()
    assert grader.asked == [([("7", "7"), ("8", "7"), ("x", "7")], True)]  # once for both, with answer lines
    assert verdicts.result().texts == ["7", "8", "x"]
    verdicts.close()


def test_prompts_without_answers_have_unknown_verdicts_and_are_not_graded():
    rollouts = [Rollout(0, Prompt("a", (5,), None), (7, 9), "stop")]
    verdicts = Verdicts(Grades(), Texts(), False)
    verdicts.begin(rollouts)
    weighter = Keeps("verdict")
    update(one_each(rollouts), weighter, verdicts)
    assert weighter.seen[0].verdict.isnan().all() and verdicts.result().verdicts is None
    verdicts.close()


def test_a_plain_update_does_not_wait_for_the_grader():
    """The grader answers only when the update is done; a weighter that needs verdicts would wait for ever."""
    permission = threading.Event()
    rollouts = two_prompts()
    verdicts = Verdicts(Grades(permission), Texts(), False)
    verdicts.begin(rollouts)
    update(one_each(rollouts), Keeps("reverse_kl"), verdicts)
    assert not verdicts.graded.done()
    permission.set()
    assert [v.correct for v in verdicts.result().verdicts] == [False, True, False]
    verdicts.close()


def test_verdicts_need_no_scoring_pass(monkeypatch):
    monkeypatch.setattr(Pair, "stats", lambda *_: pytest.fail("scored"))
    rollouts = two_prompts()
    verdicts = Verdicts(Grades(), Texts(), False)
    verdicts.begin(rollouts)
    update(one_each(rollouts), Keeps("verdict", "reward"), verdicts, Reward())
    verdicts.close()


@pytest.mark.parametrize("size", [1, 10, 100])
def test_a_scorers_columns_by_hand(size):
    weighter, scorer = Keeps("reward", "reverse_kl"), Reward(offset=0.5)
    batches = make_micro_batches(two_prompts()[::-1], size, 0, "keep")
    stats = update(batches, weighter, scorer).stats
    assert scorer.calls == 1 and stats.reverse_kl is not None and set(stats.extra) == {"reward", "length_share"}
    reward, share = stats.extra["reward"], stats.extra["length_share"]
    known = ~reward.isnan()
    assert known.tolist() == [False, True, True, False, False, True, True, True, True]
    assert reward[known].tolist() == [1.5, 2.5, 1.5, 2.5, 3.5, 4.5]
    assert share.tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.2, 0.4, 0.6, 0.8, 1])
    assert stats.rows(stats.sequence_id == 1).extra["length_share"].tolist() == [1]


def test_a_scorer_that_nobody_needs_is_not_asked():
    scorer = Reward()
    assert not update(one_each(two_prompts()), Keeps("reverse_kl"), scorer).stats.extra and scorer.calls == 0
    update(one_each(two_prompts()), Keeps(), scorer, measure=frozenset({"reward"}))
    assert scorer.calls == 1


class Answering:
    """A scorer that answers as the function says."""

    names = frozenset({"reward"})

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, rollouts):
        return self.answer(rollouts)


@pytest.mark.parametrize(
    "answer,message",
    [
        (lambda r: {"other": []}, r"gives the columns \['other'\], expected \['reward'\]"),
        (lambda r: {"reward": []}, "has 0 columns, expected 3: one per rollout"),
        (lambda r: {"reward": [torch.zeros(2)] * 3}, r"reward of rollout 2 has shape \(2,\), expected \(5,\)"),
        (lambda r: {"reward": [torch.zeros(len(x.response_ids), dtype=torch.int64) for x in r]}, "expected a float"),
        (lambda r: {"reward": [torch.zeros(len(x.response_ids), requires_grad=True) for x in r]}, "detached"),
        (lambda r: {"reward": [torch.full((len(x.response_ids),), math.inf) for x in r]}, "5 infinite values"),
    ],
)
def test_malformed_scores_are_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        token_columns(Answering(answer), make_micro_batches(two_prompts(), 100, 0, "keep"))


class Unnamed:
    names = frozenset({"reverse_kl"})


@pytest.mark.parametrize(
    "name,settings,message",
    [
        ("nowhere.at_all:Class", {}, "cannot be made of settings {} .ModuleNotFoundError"),
        ("test_verdicts:Missing", {}, "AttributeError"),
        ("test_verdicts:Reward", {"offst": 1}, "unexpected keyword argument 'offst'"),
        ("test_verdicts:Unnamed", {}, "none of a field of opd.hooks.TokenStats"),
    ],
)
def test_scorers_that_cannot_be_used_are_refused(name, settings, message):
    with pytest.raises(InputError, match=message):
        load_scorer(ScorerSection(name=name, settings=settings))


def test_what_nothing_gives_is_refused_before_a_run_starts(tmp_path):
    config, _ = configured(tmp_path)
    with pytest.raises(InputError, match="needs 'reward', which is no statistic and no column"):
        training.run(config, Keeps("reward"))
    config, _ = configured(tmp_path, "data.answer_field=null")
    with pytest.raises(InputError, match="needs verdicts, and data"):
        training.run(config, Keeps("verdict"))
    assert not (tmp_path / "run").exists()
    config, _ = configured(tmp_path, 'rollout.scorer={"name": "test_verdicts:Reward", "settings": {"offset": 2}}')
    (scorer,) = load_scorers(config, Keeps("reward", "verdict", "jsd"))
    assert scorer.offset == 2


def test_a_run_with_verdicts_and_a_scorer_is_the_plain_run_and_sees_both(tmp_path):
    """A weighter that reads them and weighs all alike changes no bit, and its verdicts are rollout/accuracy."""
    few = ["optim.steps=2", "optim.warmup_steps=0", "rollout.prompts_per_step=8", "eval.benchmarks=[]"]
    config, _ = configured(tmp_path / "a", *few, 'rollout.scorer={"name": "test_verdicts:Reward"}')
    weighter = Keeps("verdict", "reward")
    folders = [training.run(config, weighter), train(tmp_path / "b", *few, plain=True)]
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    for name in ("loss/divergence", "optim/grad_norm", "rollout/accuracy", "rollout/ungraded"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]]
    for stats, row in zip(weighter.seen, rows[0], strict=True):
        first = stats.position == 0
        assert stats.verdict[first].mean().item() == pytest.approx(row["rollout/accuracy"])
        assert stats.extra["reward"].isnan().sum() == first.sum() == 8


def test_dumps_and_the_token_map_hold_the_verdicts(tmp_path, monkeypatch):
    """Right, wrong and unknown; a run whose responses nothing judges has no such column."""
    verdicts = (True, False, None)

    def graded(self, pairs, answer_lines=False):
        return [Verdict("7", verdicts[i % 3]) for i in range(len(pairs))]

    monkeypatch.setattr(Grader, "grade", graded)
    few = ["optim.steps=1", "optim.warmup_steps=0", "rollout.prompts_per_step=4", "rollout.n=1", "eval.benchmarks=[]"]
    few += ["log.token_dump_every=1", "log.token_dump_rollouts=3"]
    judged, plain = train(tmp_path / "a", *few), train(tmp_path / "b", *few, "data.answer_field=null")
    rows = dump.read(judged / "tokens" / "step_000001.jsonl")
    for row, expected in zip(rows, (1, 0, None), strict=True):
        assert row["verdict"] == [expected] * len(row["token_ids"])
    for run, expected in ((judged, [1, 0, None]), (plain, [None] * 3)):
        about = json.loads(blob(page_of({"run": run}, ""), "about"))
        assert [rollout["verdict"] for rollout in about["runs"][0]["updates"][0]["rollouts"]] == expected
    assert all("verdict" not in row for row in dump.read(plain / "tokens" / "step_000001.jsonl"))


def test_answer_lines_count_in_training_as_in_the_benchmarks(tmp_path):
    boxed = read_benchmark("configs/benchmarks/tiny.json")
    lines = replace(boxed, answer_lines=True)
    config, _ = configured(tmp_path)
    assert not takes_answer_lines(config, [boxed]) and takes_answer_lines(config, [boxed, lines])
    for choice in ("true", "false"):
        config, _ = configured(tmp_path, f"data.answer_lines={choice}")
        assert takes_answer_lines(config, [boxed, lines]) == (choice == "true")


def test_the_update_of_random_rollouts_has_the_same_columns_for_any_cut():
    rollouts = random_rollouts(random_lm(1), count=6)
    a, b = (
        update(batches, Keeps("reward"), Reward()).stats
        for batches in (one_each(rollouts), make_micro_batches(rollouts[::-1], 10**6, 0, "keep"))
    )
    for name in ("token_id", "prompt_id", "length", "truncated"):
        assert torch.equal(vars(a)[name], vars(b)[name])
    assert torch.equal(a.extra["length_share"], b.extra["length_share"])
