"""Learning rate as an axis: the rate chosen on other problems, verdicts that flip, and a small table by its command."""

import json

import pytest
from helpers import response
from runs import write_finished

from opd.accuracy import PROBLEMS_ONLY, Interval
from opd.errors import InputError
from tip import arms, reproduce
from tip.results import page, rates
from tip.results.rates import Matrix, Row
from tip.tables import at_rate, read_table


def between(low, high):
    return Interval((low + high) / 2, low, high, PROBLEMS_ONLY, ((low + high) / 2,), 8)


def test_a_rate_is_chosen_on_the_other_half():
    """On a, c and e the lower rate is better and on b and d the higher one; so each half takes the worse one."""
    low = [{"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.0, "e": 1.0}] * 2
    high = [{"a": 0.0, "b": 1.0, "c": 0.5, "d": 1.0, "e": 0.0}] * 2
    chosen, shares = rates.chosen_on_the_other_half({1e-4: low, 1e-3: high})
    assert chosen == (1e-3, 1e-4)
    assert shares == [{"a": 0.0, "c": 0.5, "e": 0.0, "b": 0.0, "d": 0.0}] * 2


def test_the_choice_is_by_all_seeds_and_ties_go_to_the_lowest_rate():
    one, two = {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.0, "b": 0.0}
    chosen, shares = rates.chosen_on_the_other_half({3e-4: [one, two], 1e-4: [two, one], 1e-3: [two, two]})
    assert chosen == (1e-4, 1e-4) and shares == [{"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0}]
    assert rates.chosen_on_the_other_half({1e-4: [{"a": 1.0}], 1e-3: [{"a": 0.0, "b": 1.0}]}) == ((), [])


def test_the_reported_half_has_no_say_in_the_choice():
    """Shares of pure noise: the best of many rates looks good where it was chosen, and not where it is reported."""
    import random

    draw, told, best = random.Random(0), [], []
    for _ in range(200):
        by_rate = {rate: [{i: float(draw.random() < 0.5) for i in range(40)}] for rate in range(1, 9)}
        _, (shares,) = rates.chosen_on_the_other_half(by_rate)
        told.append(sum(shares.values()) / 40)
        best.append(max(sum(seeds[0].values()) / 40 for seeds in by_rate.values()))
    assert sum(told) / 200 == pytest.approx(0.5, abs=0.02) and sum(best) / 200 > 0.58


def test_flips_and_swing_by_hand():
    better, worse, same = between(0.1, 0.3), between(-0.3, -0.1), between(-0.1, 0.1)
    row = Row("a", {1.0: 0.5, 2.0: 0.7, 4.0: 0.2}, {4.0: worse, 1.0: better, 2.0: same}, (), None, None)
    assert row.flips == 2 and len(row.neighbours) == 2 and row.swing == pytest.approx(0.5)
    assert Row("a", {1.0: 0.5}, {2.0: better, 1.0: better}, (), None, None).flips == 0
    base = Row("all 1.0", {1.0: 0.4, 2.0: 0.5, 4.0: 0.6}, {}, (4.0, 2.0), 0.55, None)
    text = rates.markdown([Matrix("b", "greedy", "all 1.0", (1.0, 2.0, 4.0), (base, row))], "Table", "command")
    assert "2 of 2 verdicts change" in text and "| all 1.0 | 40.0 | 50.0 | 60.0 | 20.0  | 2 or 4" in text
    assert "| +20.0 [+10.0, +30.0] 1/1 | +0.0 [-10.0, +10.0] 0/1 | -20.0 [-30.0, -10.0] 0/1 | 2 of 2 |" in text


def test_an_arm_at_the_rate_of_the_pair_file_is_the_arm_itself():
    table = read_table("main")
    assert at_rate(table, 3e-4, 3e-4) is table
    other = at_rate(table, 1e-3, 3e-4)
    assert [arm.label for arm in other.arms] == [f"{arm.label} lr=0.001" for arm in table.arms]
    assert other.baselines == ("all 1.0 lr=0.001",) and other.arms[1].settings["optim.lr"] == 1e-3


@pytest.mark.parametrize(
    "words,message",
    [
        (["--rates", "1e-4,x"], "expected learning rates above 0 with commas between them"),
        (["--rates", "0"], "expected learning rates above 0"),
        (["--rates", "1e-4,inf"], "expected learning rates above 0"),
        (["--rates", ""], "expected learning rates above 0"),
        (["--rates", "1e-4", "--set", "optim.lr=1e-3"], "the arms and seeds of a table set optim.lr. Leave it out"),
    ],
)
def test_bad_rates_are_refused(words, message, tmp_path):
    with pytest.raises(InputError, match=message):
        command = ["--table", "main", "--config", "configs/tiny.json", "--set", f"output_dir={tmp_path}"]
        reproduce.command([*command, "--dry-run", *words])


def test_a_small_table_at_two_rates(tmp_path, capsys, monkeypatch):
    """The command with a training that writes down what would have come out of it."""
    right = {("all", 3e-4): "abc", ("all", 1e-3): "abcd", ("soft_or", 3e-4): "abcdef", ("soft_or", 1e-3): "ef"}
    trained = []

    def train(config, weighter, *_):
        if (config.run_dir / "summary.json").exists():
            return  # as a finished run is left alone
        trained.append((config.run_name, config.optim.lr))
        rows = [response(problem, 0, problem in right[weighter.config.rule, config.optim.lr]) for problem in "abcdef"]
        write_finished(config.run_dir, config.seed, {0: rows, 60: rows})

    monkeypatch.setattr(arms, "train", train)
    monkeypatch.setattr(page, "draw", lambda *_: {})  # figures of a table take most of the time
    command = ["--table", "main", "--config", "configs/tiny.json", "--arms", "soft_or 0.5"]
    command += ["--set", f"output_dir={tmp_path}"]
    reproduce.command([*command, "--rates", "1e-3,3e-4"])
    root = tmp_path / "tiny-reproduce"
    assert trained == [
        ("all-1.0", 3e-4),
        ("soft_or-0.5", 3e-4),
        ("all-1.0-lr-0.001", 1e-3),
        ("soft_or-0.5-lr-0.001", 1e-3),
    ]
    text = (root / "main-rates" / "rates.md").read_text()
    assert text.removesuffix("\n") in capsys.readouterr().out and (root / "main-rates" / "rates.png").exists()
    (matrix,) = json.loads((root / "main-rates" / "rates.json").read_text())
    assert matrix["metric"] == "mean@1" and matrix["rates"] == [3e-4, 1e-3] and matrix["base"] == "all 1.0"
    base, arm = matrix["rows"]
    assert base["accuracies"] == pytest.approx({"0.0003": 0.5, "0.001": 4 / 6}) and base["difference"] is None
    # b, d and f choose the higher rate for all tokens, and a, c and e the lower one, because the two are equally good
    assert base["chosen"] == [1e-3, 3e-4] and base["accuracy"] == pytest.approx((2 + 1) / 6)
    assert arm["chosen"] == [3e-4, 3e-4] and arm["accuracy"] == 1 and arm["difference"]["mean"] == pytest.approx(0.5)
    assert arm["swing"] == pytest.approx(4 / 6) and [arm["differences"][r]["mean"] for r in ("0.0003", "0.001")] == (
        pytest.approx([0.5, -2 / 6])
    )
    assert "soft_or 0.5 lr=0.001" in (root / "main-rates" / "lr_0.001" / "table.md").read_text()
    reproduce.command(command)  # the plain table needs no new run
    assert len(trained) == 4
