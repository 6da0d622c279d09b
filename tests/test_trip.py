"""The embedded planning pair: its task, its scorer, and a run, an analysis and a token map with its environment."""

import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
from helpers import blob, tiny_config
from runs import forked, interrupted_before, status
from transformers import AutoTokenizer

from data.tiny import task, trip
from opd import evaluate, models
from opd import train as training
from opd.benchmarks import load_benchmarks
from opd.config import load_config
from opd.device import pick_device
from opd.record import dump, evaluation
from opd.responses import Subject
from opd.rollout.local import TransformersSampler
from tip import analyze
from tip.config import SECTIONS
from tip.diagnostics import TipObserver
from tip.results.token_map import page_of
from tip.weighter import TipWeighter

CONFIG = "configs/tiny_planning.json"
PLAIN = trip.Speaker(trip.TEACHER.orders, corrupt=False, planted=0.0)
ROW = trip.row(random.Random(3))
SMALL = ("optim.steps=3", "optim.warmup_steps=0", "rollout.prompts_per_step=6", "eval.benchmarks=[]")
DUMPED = ("log.token_dump_every=1", "log.token_dump_rollouts=6", "log.diagnostics_every=0", "log.samples=0")


def turns_of(row, speaker, rng):
    """A conversation of the training text: the model's turns, and what the tools say after each."""
    turns, told = [], []
    for said in trip.conversation(row, speaker, rng):
        if isinstance(said, str):
            told.append(said)
        else:
            turns.append("".join(piece.text for piece in said).removesuffix(trip.END))
    return turns, told


# --- the task ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("speaker", [PLAIN, trip.TEACHER, trip.STUDENT], ids=["plain", "teacher", "student"])
def test_the_environment_answers_as_the_training_text_says(speaker):
    rng, environment, scores, tokenizer = random.Random(0), trip.Trip(), [], trip.tokenizer()
    for _ in range(200):
        row = trip.row(rng)
        turns, told = turns_of(row, speaker, rng)
        for i, text in enumerate(told, 1):
            assert environment.reply(row, turns[:i]) == [{"role": "tool", "content": text}]
        assert environment.reply(row, turns) is None
        scores.append(environment.score(row, turns).share)
        for text in (row["problem"], *turns, *told):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    if speaker is PLAIN:
        assert scores == [1.0] * 200
    elif speaker is trip.TEACHER:  # plans with a planted wish are not right, and not learnt
        assert 0.8 < sum(scores) / 200 < 1
    else:
        assert 0.3 < sum(scores) / 200 < 0.8


@pytest.mark.parametrize("speaker, least, most", [(trip.STUDENT, 0.8, 0.97), (trip.ABSOLUTE, 1, 1)])
def test_how_often_a_misconception_shows(speaker, least, most):
    rng, shown, times = random.Random(0), 0, 0
    for _ in range(300):
        row = trip.row(rng)
        calls = [turn.rpartition(trip.LOOKS)[2].split(" ") for turn in turns_of(row, speaker, rng)[0]][:3]
        for (kind, wish), (_, where, asked, _) in zip(row["wishes"].items(), calls, strict=True):
            if wish in trip.MISTAKEN:
                shown, times = shown + (f"{asked} " == trip.MISTAKEN[wish]), times + 1
            if kind == "meal " and row["place"] in trip.WITHOUT_MEALS:
                shown, times = shown + (f"{where} " == row["city"]), times + 1
    assert times > 150 and least <= shown / times <= most


def test_the_plan_by_hand():
    row = {
        "city": "Bo ",
        "place": "inn ",
        "wishes": {"train ": "noon ", "hotel ": "spa ", "meal ": "thai "},
        "database": {
            "trains ": {"Bo ": {"noon ": ["a ", 5], "dawn ": ["b ", 1]}},
            "hotels ": {"Bo ": {"spa ": ["c ", 6]}},
            "meals ": {"inn ": {"thai ": ["d ", 2]}},
        },
    }
    assert trip.plan(row) == "train noon a hotel spa c meal thai d 13"
    looked = {"trains Bo dawn": ["b ", 1], "meals Bo thai": None, "meal inn thai": None}
    for call, found in looked.items():
        call = [f"{word} " for word in call.split(" ")]
        assert trip.look_up(row, *call) == found


@pytest.mark.parametrize("part, word", [("train", 2), ("hotel", 5), ("meal", 8), ("total", 9)])
def test_a_plan_that_is_wrong_in_one_word_loses_that_part(part, word):
    words = ROW["answer"].split(" ")
    for wrong in ("z", "none", "99", ""):
        said = "so plan " + " ".join([*words[:word], wrong, *words[word + 1 :]])
        score = trip.Trip().score(ROW, ["call trains ", said])
        assert not score.correct and score.share == 0.75 and score.extracted == said.removeprefix("so plan ")
        assert [name for name, holds in score.parts.items() if not holds] == [part]
    right = trip.Trip().score(ROW, [f"so plan {ROW['answer']}"])
    assert right.correct and right.share == 1 and set(right.parts) == set(trip.PARTS)


def test_without_a_plan_in_the_last_turn_nothing_is_delivered():
    for turns in (["so "], [f"plan {ROW['answer']}", "so "], [""]):
        score = trip.Trip().score(ROW, turns)
        assert (score.correct, score.share, score.extracted) == (False, 0.0, None) and not any(score.parts.values())
    half = trip.Trip().score(ROW, [f"plan {' '.join(ROW['answer'].split(' ')[:6])}"])  # cut in the middle
    assert half.share == 0.5 and half.extracted


WRONG = ("", "trains ", "trains Dov ", "flights Dov dawn ", "trains Ava call ", "trains  dawn ", "trains Dov dawn")


@pytest.mark.parametrize("call", [*WRONG, "<|im_end|> <|im_end|> <|im_end|> ", "__class__ __class__ __class__ "])
def test_a_call_that_is_wrong_is_answered(call):
    assert trip.Trip().reply(ROW, [f"so call {call}"]) == [{"role": "tool", "content": "none "}]


def test_no_name_of_an_offer_is_in_a_prompt():
    """The database is in the row, where the environment finds it; the model sees its problem alone."""
    config = load_config(CONFIG, ["eval.limit=64"])[0]
    student = models.load(config.student, pick_device(config.engine), "student")
    (loaded,) = load_benchmarks(config, student, 64)
    for prompt in loaded.prompts:
        text = student.tokenizer.decode(prompt.token_ids)
        assert text == f"<|im_start|>user\n{prompt.row['problem']}<|im_end|>\n<|im_start|>assistant\n"
        tables = [table for tool in prompt.row["database"].values() for table in tool.values()]
        names = {name for table in tables for name, _ in table.values()}
        assert len(names) == 12 and not [name for name in names if re.search(rf"(^| ){name}", prompt.row["problem"])]


# --- the pair ---------------------------------------------------------------------------------------------------------
def greedy(who, out, path=CONFIG):
    """The figures of the shipped model on the first problems, greedily."""
    config = load_config(path, ["eval.limit=64", "eval.k=0", "eval.reverse_kl=false"])[0]
    lm = models.load(getattr(config, who), pick_device(config.engine), who)
    loaded = load_benchmarks(config, models.load(config.student, pick_device(config.engine), "student"), 64)
    subject = Subject(lm, TransformersSampler(lm, 64), len(lm.tokenizer), None)
    return evaluate.evaluate(subject, loaded, config, out, None)["tiny_planning"]


def test_the_teacher_plans_and_the_student_does_not_yet(tmp_path):
    teacher, student = (greedy(who, tmp_path / who) for who in ("teacher", "student"))
    assert teacher["greedy"] >= 0.95 and 0.15 <= student["greedy"] <= 0.45
    assert teacher["share_greedy"] > student["share_greedy"] > student["greedy"]
    assert teacher["delivered"] == 1 and teacher["turns_mean"] == 4 and teacher["share_at_k"] is None
    for row in evaluation.read_responses(tmp_path / "student" / "tiny_planning.jsonl"):
        assert set(row["parts"]) == set(trip.PARTS) and row["share"] == sum(row["parts"].values()) / 4


def test_an_absolute_misconception_is_never_right(tmp_path):
    figures = greedy("student", tmp_path, "configs/tiny_planning_absolute.json")
    assert 0.15 <= figures["greedy"] <= 0.45 and figures["delivered"] == 1
    lines = map(json.loads, Path("data/tiny/pairs/planning_absolute/test.jsonl").read_text().splitlines())
    rows, right = {row["id"]: row for row in lines}, {True: [], False: []}
    for response in evaluation.read_responses(tmp_path / "tiny_planning.jsonl"):
        row = rows[response["id"]]
        right[row["wishes"]["hotel "] in trip.MISTAKEN].append(response["parts"]["hotel"])
        misled = row["wishes"]["meal "] in trip.MISTAKEN or row["place"] in trip.WITHOUT_MEALS
        right[misled].append(response["parts"]["meal"])
    assert len(right[True]) > 30 and not any(right[True]) and all(right[False])


def test_the_tokenizer_is_the_tasks():
    for who in ("teacher", "student"):
        tokenizer = AutoTokenizer.from_pretrained(f"data/tiny/pairs/planning/{who}")
        assert tokenizer.get_vocab() == trip.tokenizer().get_vocab() and len(tokenizer) == 76


# --- a run ------------------------------------------------------------------------------------------------------------
def train(out, *settings):
    settings = [f"output_dir={out}", "run_name=run", *SMALL, *DUMPED, *settings]
    config, sections = load_config(CONFIG, settings, SECTIONS)
    weighter = TipWeighter(sections["tip"])
    return training.run(config, weighter, sections, "auto", TipObserver(weighter))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("planning"))


def metrics_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


def test_a_run_counts_what_the_student_said(run):
    for step, row in enumerate(metrics_of(run), 1):
        dumped = dump.read(run / f"tokens/step_{step:06d}.jsonl")
        said = [len(r["tokens"]) for r in dumped]
        assert row["tokens/response"] == sum(said) and row["rollout/length_mean"] == pytest.approx(sum(said) / 6)
        assert row["tokens/kept"] == sum(len(r["tokens"]) // 2 for r in dumped)
        assert row["rollout/turns_mean"] == pytest.approx(sum(len(r["replies"]) + 1 for r in dumped) / 6)
        assert 0.3 < row["rollout/tool_tokens"] < 0.5 and 0 < row["rollout/share"] <= 1
        assert row["rollout/environment_errors"] == row["rollout/ungraded"] == row["rollout/neutralised"] == 0
        for r in dumped:
            assert not any(task.START in text for text in r["tokens"]) and max(r["turn"]) == len(r["replies"])
            pattern = r"\n<\|im_start\|>tool\n(none |[a-p] [1-6])<\|im_end\|>\n<\|im_start\|>assistant\n"
            assert all(re.fullmatch(pattern, text) for text in r["replies"].values())


def test_a_run_that_was_killed_in_an_update_is_the_unbroken_one(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupted_before(3, patched)
        train(tmp_path, "checkpoint.every=1")
    again = train(tmp_path, "checkpoint.every=1")
    assert metrics_of(again) == metrics_of(run)
    last = "checkpoints/step_000003/model.safetensors"
    assert (again / last).read_bytes() == (run / last).read_bytes()
    for step in (1, 2, 3):
        name = f"tokens/step_{step:06d}.jsonl"
        assert (again / name).read_bytes() == (run / name).read_bytes()


MEASURED = ('eval.benchmarks=["tiny_planning"]', "eval.limit=4", "eval.k=1", "eval.reverse_kl=false", "eval.every=0")
MEASURED += ("optim.steps=2", "log.token_dump_every=0")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """An unbroken run with evaluations."""
    return train(tmp_path_factory.mktemp("measured"), *MEASURED)


def killed_when(begins, out):
    """The exit code of a run in a process that is killed when a turn begins whose model and seed `begins` accepts."""
    original = TransformersSampler.sample

    def dying(self, prompts, decoding, vocab_size, seeds, *rest):
        if begins(self.lm.name, seeds[0]):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, prompts, decoding, vocab_size, seeds, *rest)

    def work():
        TransformersSampler.sample = dying
        train(out, *MEASURED, "checkpoint.every=1")

    return status(forked(work, out / "log"))


@pytest.mark.parametrize(
    "begins",
    [
        lambda who, seed: who == "student" and seed[1] == "eval" and seed[-2:] == ("turn", 2),
        lambda who, seed: seed[1:3] == ("rollout", 2) and seed[-2:] == ("turn", 3),
    ],
    ids=["in an evaluation", "in an update"],
)
def test_a_run_that_was_killed_between_two_turns_is_the_unbroken_one(begins, measured, tmp_path):
    assert killed_when(begins, tmp_path) == -signal.SIGKILL
    again = train(tmp_path, *MEASURED, "checkpoint.every=1")
    assert metrics_of(again) == metrics_of(measured)
    evaluations = [f"eval/step_00000{step}/tiny_planning.jsonl" for step in (0, 2)]
    for name in ("checkpoints/step_000002/model.safetensors", *evaluations):
        assert (again / name).read_bytes() == (measured / name).read_bytes(), name


def test_held_out_problems_are_scored_by_the_environment_of_training(tmp_path):
    folder = train(tmp_path, "data.validation=3", "data.answer_field=null", "optim.steps=1", "eval.reverse_kl=false")
    final = json.loads((folder / "summary.json").read_text())["eval"]
    assert final["teacher"]["validation"]["share_at_k"] > final["step_0"]["validation"]["share_at_k"] > 0
    assert final["final"]["validation"]["environment"] == "trip-1"


def test_the_token_map_shows_replies_before_the_turns_they_led_to(run):
    text = page_of({"run": run}, "A map")
    about, strings = json.loads(blob(text, "about")), json.loads(blob(text, "strings"))
    for listed, row in zip(
        about["runs"][0]["updates"][0]["rollouts"], dump.read(run / "tokens/step_000001.jsonl"), strict=True
    ):
        shown = {place: strings[number] for place, number in listed["replies"]}
        begins = {row["turn"].index(int(turn)): reply for turn, reply in row["replies"].items()}
        assert shown == begins and len(shown) == max(row["turn"]) > 0


def test_dumps_without_turns_are_still_mapped(run, tmp_path):
    old = shutil.copytree(run, tmp_path / "old")
    for path in (old / "tokens").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{name: column for name, column in row.items() if name not in ("turn", "replies")} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    about = json.loads(blob(page_of({"old": old}, ""), "about"))
    assert all(not r["replies"] for r in about["runs"][0]["updates"][0]["rollouts"])


def test_an_analysis_makes_conversations(tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "plots", lambda *_: {})  # they take most of the time
    monkeypatch.setattr(analyze, "page", lambda *_: "")
    analyze.command(["--config", CONFIG, "--prompts", "6", "--oracle-tokens", "0", "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out/analysis.json").read_text())
    assert result["rollouts"] == 6 and 40 * 6 < result["tokens"] < 70 * 6


@pytest.mark.slow
def test_distillation_teaches_the_student_to_plan(tmp_path):
    """40 updates on all tokens lift the greedy success from 30 to 80 of 100; this is another test set's half of it."""
    config, _ = load_config(CONFIG, [f"output_dir={tmp_path}", "eval.every=0", "eval.k=0", "eval.limit=128"])
    folder = training.run(config)
    figures = evaluation.read_summary(folder / "eval/step_000040")["tiny_planning"]
    assert figures["greedy"] >= 0.7


def test_the_shipped_problems_are_conversations_of_the_task():
    rows = [json.loads(line) for line in Path("data/tiny/pairs/planning/test.jsonl").read_text().splitlines()]
    assert len(rows) == 256 and all(row["answer"] == trip.plan(row) for row in rows)
    assert tiny_config().data.environment is None
