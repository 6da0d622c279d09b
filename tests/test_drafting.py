"""Drafters of tables: acceptance before and after training, with paired intervals, from typed responses."""

import pytest
from helpers import response
from runs import write_finished

from tip import reproduce
from tip.results import comparison, drafting
from tip.results.collect import collect

PROBLEMS = ("a", "b", "c")


def drafted(by_sample):
    """Responses whose samples accept these shares of the drafts, one per problem; None: it was not measured."""
    rows = []
    for sample, shares in enumerate(by_sample):
        for problem, share in zip(PROBLEMS, shares, strict=True):
            more = {} if share is None else {"acceptance": share, "accepted_of_4": 4 * share}
            rows.append(response(problem, sample, True, **more))
    return rows


def results_of(root, after, seeds=(0, 1)):
    """Results of the table main with these shares after training; before it a half of every draft is accepted."""
    table = reproduce.only(reproduce.read_table("main"), ["soft_or 0.5"])
    for arm in table.arms:
        for seed in seeds:
            evaluations = {0: drafted([[0.5] * 3]), 60: drafted(after[arm.label][seed])}
            write_finished(root / f"seed_{seed}" / arm.slug, seed, evaluations)
    return collect(comparison.of_table(table, root, list(seeds), "tiny", ("s", "t")))


def test_drafters_by_hand(tmp_path):
    after = {
        "all 1.0": [[[0.6, 0.6, 0.9]], [[0.7, 0.7, 0.7]]],
        "soft_or 0.5": [[[0.6, 0.6, 0.8], [0.8, 0.8, 1.0]], [[0.9, 0.9, 0.9]] * 2],
    }
    found = {drafter.name: drafter for drafter in drafting.drafters(results_of(tmp_path, after), "tiny")}
    assert list(found) == ["step-0 student", "all 1.0", "soft_or 0.5"]
    start, base, arm = found.values()
    assert (start.accepted, start.of_block, start.to_start, start.to_base) == (0.5, 2.0, None, None)
    assert base.accepted == pytest.approx(0.7) and base.of_block == pytest.approx(2.8) and base.to_base is None
    # by problem .7 .7 .9 and .9 .9 .9, so .1 .1 .0 and .2 .2 .2 more than the baseline
    assert arm.accepted == pytest.approx((2.3 / 3 + 0.9) / 2)
    assert arm.to_base.mean == pytest.approx(0.4 / 3) and arm.to_base.by_seed == pytest.approx((0.2 / 3, 0.2))
    assert arm.to_start.mean == pytest.approx(arm.accepted - 0.5) and arm.to_start.problems == 3
    text = drafting.markdown(results_of(tmp_path / "again", after))
    assert "| step-0 student | 50.0 " in text and "| all 1.0        | 70.0 " in text and "| 2.80 " in text


def test_nothing_is_told_where_nothing_was_measured(tmp_path):
    after = {label: [[[None] * 3]] * 2 for label in ("all 1.0", "soft_or 0.5")}
    results = results_of(tmp_path, after)
    assert [drafter.name for drafter in drafting.drafters(results, "tiny")] == ["step-0 student"]
    assert drafting.drafters(results, "other") == []
