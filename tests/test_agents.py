"""Table 7 and Figure 4: what conversations are measured by, and what a selection does in their turns."""

import itertools
import json
from pathlib import Path
from statistics import fmean

import pytest
from helpers import response

from opd import compare
from opd.errors import InputError
from opd.measures import CONVERSATIONS, MEASURES
from opd.record import dump, evaluation
from tip import reproduce
from tip.results import turns
from tip.results.types import Evaluation

CONFIG = "configs/tiny_planning.json"
ARMS = "soft_or 0.5,last_turn"
SMALL = (
    "optim.steps=2",
    "optim.warmup_steps=0",
    "eval.limit=6",
    "eval.k=3",
    "eval.every=0",
    "log.diagnostics_every=2",
    "eval.reverse_kl=false",
)
DUMPED = ("log.token_dump_every=2", "log.token_dump_rollouts=8")


# --- the measures -----------------------------------------------------------------------------------------------------
def conversation(problem, sample, share, extracted="plan"):
    correct = None if share is None else share == 1
    return response(problem, sample, correct, extracted, share=share, parts={}, turns=["a", "b"])


ROWS = [
    conversation("p", -1, 0.75),
    *(conversation("p", i, share) for i, share in enumerate((0.25, 1.0, 0.5))),
    conversation("q", -1, 1.0),
    *(conversation("q", i, share, None) for i, share in enumerate((0.0, None, 0.5))),  # the second has no verdict
]


def test_measures_of_conversations_by_hand(tmp_path):
    figures = evaluation.summarise(ROWS)
    assert figures["greedy"] == 0.5 and figures["mean_at_k"] == pytest.approx(1 / 6)
    assert figures["share_at_k"] == pytest.approx((1.75 / 3 + 0.5 / 3) / 2)
    assert figures["share_best_at_2"] == pytest.approx((2.5 / 3 + 1.0 / 3) / 2)  # 1 .5 1 and 0 .5 .5
    assert figures["share_best_at_k"] == pytest.approx(0.75) and figures["share_greedy"] == 0.875
    assert figures["delivered"] == pytest.approx((1 + 1 / 4) / 2)
    assert figures["delivered_se"] == pytest.approx(0.375) and figures["share_best_at_k_se"] == pytest.approx(0.25)
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = compare.per_problem(tmp_path / "bench.jsonl")
    assert found.keys() == MEASURES.keys() and found["share_best_at_k"] == {"p": 1.0, "q": 0.5}
    for name, numbers in found.items():
        assert fmean(numbers.values()) == pytest.approx(figures[name])


def test_what_was_not_measured_is_none_and_not_zero():
    two = [row for row in ROWS if row["sample"] < 2]
    assert evaluation.summarise(two)["share_best_at_2"] is None  # the best of two is then the best of all
    greedy = evaluation.summarise([row for row in ROWS if row["sample"] < 0])
    assert [greedy[name] for name in CONVERSATIONS] == [None, None, None, 1.0]
    graded = [response("p", 0, True)]
    assert not set(CONVERSATIONS) & evaluation.summarise(graded).keys()
    assert all(MEASURES[name].of(graded) is None for name in CONVERSATIONS)
    titles = [Evaluation(8, 16, {}, None, {}).title(name) for name in MEASURES]
    assert titles == ["greedy", "mean@16", "share@16", "best@2", "best@16", "delivered"]


# --- a small table ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The folder of a small Table 7."""
    out = tmp_path_factory.mktemp("agents")
    settings = [word for s in (*SMALL, *DUMPED, f"output_dir={out}") for word in ("--set", s)]
    reproduce.command(["--table", "7", "--config", CONFIG, "--arms", ARMS, *settings])
    return out / "tiny_planning-reproduce" / "table7"


def test_the_table_holds_every_measure_and_says_that_it_is_not_the_papers(table):
    text, found = (table / "table.md").read_text(), json.loads((table / "table.json").read_text())
    assert "The paper has this table for DeepPlanning." in text and "| paper" not in text
    header = "| arm            | greedy      | mean@3      | share@3     | best@2      | best@3      | delivered"
    assert header in text and "after update 2, differences" in text and "the paper's Avg@k" in text
    assert set(found["arms"]) == {"all 1.0", "soft_or 0.5", "last_turn"}
    for label, arm in found["arms"].items():
        measured = arm["evaluations"]["2"]["tiny_planning"]["metrics"]
        assert set(measured) == set(MEASURES)
        rows = evaluation.read_responses(Path(found["folders"][label]["0"]) / "eval/step_000002/tiny_planning.jsonl")
        best = []
        for problem in {row["id"] for row in rows}:
            shares = [row["share"] for row in rows if row["id"] == problem and row["sample"] >= 0]
            best.append(fmean(max(pair) for pair in itertools.combinations(shares, 2)))
        assert measured["share_best_at_2"]["mean"] == pytest.approx(fmean(best))
        assert set(arm["differences"].get("all 1.0", {"2": {"tiny_planning": MEASURES}})["2"]["tiny_planning"]) == set(
            MEASURES
        )
    page = (table / "report.html").read_text()
    assert 'alt="shares"' in page and "<h2>Turns</h2>" in page and "its values do not stand here" in page


def test_last_turns_are_what_the_rule_keeps(table):
    runs = json.loads((table / "table.json").read_text())["folders"]["last_turn"]
    for row in dump.read(Path(runs["0"]) / "tokens/step_000002.jsonl"):
        assert row["weight"] == [float(turn == max(row["turn"])) for turn in row["turn"]] and max(row["turn"]) > 0
        assert row["verdict"] == [row["verdict"][0]] * len(row["turn"]) and row["verdict"][0] in (0, 0.25, 0.5, 0.75, 1)


def test_the_turns_are_counted_as_a_loop_over_the_dump_counts_them(table):
    found = json.loads((table / "table.json").read_text())
    folders = {label: {0: Path(runs["0"])} for label, runs in found["folders"].items()}
    told = turns.read(folders, "soft_or 0.5")
    cells = {where: [[0, 0.0, 0] for _ in range(4)] for where in ("before the last", "last", "turn 2")}
    carried = {}
    for row in dump.read(folders["soft_or 0.5"][0] / "tokens/step_000002.jsonl"):
        for i, turn in enumerate(row["turn"]):
            where, q, d = (
                "last" if turn == max(row["turn"]) else "before the last",
                row["quadrant"][i],
                row["reverse_kl"][i],
            )
            for place in {where, f"turn {turn + 1}" if where != "last" else where} & cells.keys():
                sums = cells[place][q - 1]
                cells[place][q - 1] = [sums[0] + 1, sums[1] + d, sums[2] + (row["weight"][i] > 0)]
            if q == 3:
                key = (where, row["tokens"][i], row["teacher_top5"][i][0][0])
                carried[key] = [carried.get(key, [0, 0.0])[0] + 1, carried.get(key, [0, 0.0])[1] + d]
    for where, expected in cells.items():
        got = told.by_update[2][where]
        assert (got.tokens, got.kept) == ([n for n, *_ in expected], [kept for *_, kept in expected])
        assert got.divergence == pytest.approx([d for _, d, _ in expected])
    assert {(c.turns, c.text, c.teacher): [c.tokens, pytest.approx(c.divergence)] for c in told.carriers} == carried
    assert [c.divergence for c in told.carriers] == sorted((c.divergence for c in told.carriers), reverse=True)
    assert told.by_arm["last_turn"]["before the last"].kept == [0] * 4
    text = turns.text(told)
    assert "Turns of soft_or 0.5 at update 2" in text and "| last_turn " in text and "<|im_end|>" not in text


def test_without_conversations_nothing_is_told_of_turns(table, tmp_path):
    assert turns.text(None) == "" and turns.read({"all 1.0": {0: tmp_path}}, "all 1.0") is None


def test_the_text_of_a_model_stays_in_its_cell():
    carrier = turns.Carrier("last", "a|b`\n\x1b[1m</td>", "t", 1, 1.0, 1.0, "x")
    told = turns.Turns("all", {1: {"last": turns.Cells()}}, {"all": {"last": turns.Cells()}}, [carrier])
    line = next(line for line in turns.text(told).splitlines() if "</td>" in line)
    assert line.count("|") == 7 and "\x1b" not in line and line.count("`") == 6


def test_without_its_databases_deepplanning_stops_with_one_message(tmp_path):
    pair = "configs/qwen3_14b_to_1.7b_deepplanning.json"
    with pytest.raises(InputError, match="holds no prepared tasks"):
        reproduce.command(["--figure", "4", "--config", pair, "--set", f"output_dir={tmp_path}"])
    assert not list(tmp_path.iterdir())
