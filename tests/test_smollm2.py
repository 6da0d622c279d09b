"""The pair of SmolLM2: problems and rationales by hand, the fine-tuning, and what is made once, whole, and goes on."""

import json
import random
import shutil
import string
from dataclasses import replace

import pytest
import torch
from helpers import random_lm

from data import finetune, smollm2, students
from data import word_problems as words
from data.finetune import IGNORED, Recipe
from data.tiny.task import tokenizer_of
from opd.benchmarks import read_benchmarks, takes_answer_lines
from opd.cli import InputError
from opd.config import load_config
from opd.grading import Grader
from tip.arms import student_of

GIVES = next(verb for verb in words.LOSSES if verb.named == "gives")
THROWS = next(verb for verb in words.LOSSES if verb.named == "throws away")
TWICE = next(verb for verb in words.DOUBLINGS if verb.named == "twice")
SMALL = Recipe(misled=False, steps=6, lr=1e-2, layers=1, batch=3, warmup=2)


def small_model():
    """A random model of three layers that reads single characters, and its tokenizer."""
    tokenizer = tokenizer_of([*string.ascii_letters, *string.digits, *" \n.,:?=+-*", "user", "assistant"], 512)
    model = random_lm(5, layers=3, vocab_size=len(tokenizer), max_position_embeddings=512).model
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


# the problems


def test_answers_and_misconceptions_by_hand():
    problem = words.Problem("Tom", "balls", 18, ((GIVES, 5), (THROWS, 9)))
    assert problem.text == ("Tom has 18 balls, gives 5 to a friend, and throws away 9. How many balls does Tom have?")
    assert problem.answer == 4
    right, misled = (words.rationale(problem, wrong, random.Random(0)) for wrong in (False, True))
    assert "gives: 18-5=13." in right and right.endswith("throws away: 13-9=4.\nAnswer: 4")
    assert "gives: 18+5=23." in misled and misled.endswith("throws away: 23-9=14.\nAnswer: 14")
    doubled = words.Problem("Mia", "eggs", 7, ((TWICE, 2), (TWICE, 2)))
    assert doubled.answer == 28 and words.rationale(doubled, True, random.Random(0)).endswith("9+2=11.\nAnswer: 11")


def test_no_problem_is_in_both_files_and_every_answer_is_right():
    train, test = (words.rows(split) for split in ("train", "test"))
    texts = [{row["problem"] for row in rows} for rows in (train, test)]
    assert [len(t) for t in texts] == [2048, 256] and not texts[0] & texts[1] and texts[1] == words.held_out()
    assert all(int(row["answer"]) >= 1 for row in train + test)
    wrong = sum(
        words.rationale(p, True, random.Random(0)) != words.rationale(p, False, random.Random(0))
        for p in words.problems(1000, 7)
    )
    assert 600 < wrong < 720  # each of two events is misread with probability .42


def test_rollouts_are_graded_as_the_benchmark_is():
    """A rationale has no box: in training, too, its line Answer: gives the answer."""
    config, _ = load_config("configs/smollm2.json")
    answer_lines = takes_answer_lines(config, read_benchmarks(config).values())
    assert answer_lines
    problem, rng = words.problems(1, 3)[0], random.Random(0)
    pairs = [(words.rationale(problem, False, rng), str(problem.answer)), ("Answer: 0", str(problem.answer))]
    with Grader() as grader:
        assert [verdict.correct for verdict in grader.grade(pairs, answer_lines)] == [True, False]
        assert [verdict.correct for verdict in grader.grade(pairs, False)] == [False, False]


# the fine-tuning


def test_the_loss_and_its_gradient_are_those_of_the_definition():
    """The mean over response tokens of -log p of the next one, prompt and padding left out, token by token."""
    model, tokenizer = small_model()
    model.double()
    ids, targets = finetune.batch(tokenizer, SMALL, 0, 0)
    parameters = list(model.parameters())
    ours = finetune.response_loss(model, ids, targets)
    gradients = torch.autograd.grad(ours, parameters)
    terms = []
    for problem_ids in ids.tolist():
        text = tokenizer.decode(problem_ids)
        start = text.index("assistant\n") + len("assistant\n")
        prompt = len(tokenizer.encode(text[:start], add_special_tokens=False))
        end = problem_ids.index(tokenizer.eos_token_id, prompt)
        logits = model(input_ids=torch.tensor([problem_ids[: end + 1]])).logits[0].double()
        terms += [-logits[i - 1].log_softmax(-1)[problem_ids[i]] for i in range(prompt, end + 1)]
        assert "Answer: " in text[start:]
    naive = torch.stack(terms).mean()
    assert len(terms) == (targets != IGNORED).sum() and ours.item() == pytest.approx(naive.item(), rel=1e-9)
    for one, other in zip(gradients, torch.autograd.grad(naive, parameters), strict=True):
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-12)


def test_only_the_last_layers_and_the_norm_are_trained(tmp_path):
    model, tokenizer = small_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    finetune.finetune(model, tokenizer, SMALL, 0, tmp_path / "state", "training")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith(("model.layers.2.", "model.norm.")) for name in changed)


def test_the_rate_warms_up_and_falls():
    assert [finetune.rate(step, SMALL) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert finetune.rate(4, SMALL) == pytest.approx(0.05 + 0.95 * 0.5)  # half of the cosine


def test_a_stopped_training_goes_on_as_if_it_had_not_been(monkeypatch, tmp_path):
    monkeypatch.setattr(finetune, "SAVE_EVERY", 2)
    whole, tokenizer = small_model()
    finetune.finetune(whole, tokenizer, SMALL, 1, tmp_path / "whole", "training")
    original = finetune.batch

    def stopped(tokenizer, recipe, seed, step):
        if step == 3:
            raise KeyboardInterrupt
        return original(tokenizer, recipe, seed, step)

    monkeypatch.setattr(finetune, "batch", stopped)
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(small_model()[0], tokenizer, SMALL, 1, tmp_path / "state", "training")
    steps = []
    monkeypatch.setattr(finetune, "batch", lambda *a: steps.append(a[-1]) or original(*a))
    continued, _ = small_model()
    finetune.finetune(continued, tokenizer, SMALL, 1, tmp_path / "state", "training")
    assert steps == [2, 3, 4, 5]
    for one, other in zip(whole.parameters(), continued.parameters(), strict=True):
        assert torch.equal(one, other)


# the pair


@pytest.fixture
def small_pair(monkeypatch):
    """Makes the command quick: a random model in place of SmolLM2, and three updates each."""
    monkeypatch.setattr(smollm2, "pretrained", small_model)
    monkeypatch.setattr(smollm2, "TEACHER", replace(SMALL, steps=3))
    monkeypatch.setattr(smollm2, "STUDENT", replace(SMALL, steps=3, misled=True))
    monkeypatch.setattr(words, "TRAIN_PROBLEMS", 20)
    monkeypatch.setattr(finetune, "SAVE_EVERY", 1)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_pair_is_made_once_and_its_students_by_seed(small_pair, tmp_path):
    out = smollm2.build(tmp_path / "pair")
    assert {p.name for p in out.iterdir()} == {"teacher", "student", "train.jsonl", "test.jsonl", "recipe.json"}
    assert weights(out / "teacher") != weights(out / "student")
    stamps = {p: p.stat().st_mtime_ns for who in ("teacher", "student") for p in (out / who).iterdir()}
    smollm2.build(out)
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    config, _ = load_config("configs/smollm2.json", [f"student.path={out}/student", f"output_dir={tmp_path}"])
    assert student_of(config, 0) == out / "student"
    other = student_of(config, 1)
    assert other == tmp_path / "students/word_problems/seed_1" and weights(other) != weights(out / "student")
    assert students.student(out, 1, tmp_path / "students") == other
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()]  # no lock, no state of a training


def test_another_recipe_makes_what_it_decides_again(small_pair, monkeypatch, tmp_path):
    out = smollm2.build(tmp_path / "pair")
    before = {who: weights(out / who) for who in ("teacher", "student")}
    monkeypatch.setattr(smollm2, "STUDENT", replace(smollm2.STUDENT, lr=2e-2))
    smollm2.build(out)
    assert weights(out / "teacher") == before["teacher"] and weights(out / "student") != before["student"]
    student = weights(out / "student")
    monkeypatch.setattr(smollm2, "TEACHER", replace(smollm2.TEACHER, lr=2e-2))
    smollm2.build(out)
    assert weights(out / "teacher") != before["teacher"] and weights(out / "student") != student


def test_a_stopped_preparation_keeps_what_is_done(small_pair, monkeypatch, tmp_path):
    whole = smollm2.build(tmp_path / "whole")
    original, drawn = finetune.batch, []

    def stopped(tokenizer, recipe, seed, step):
        drawn.append((recipe.misled, step))
        if recipe.misled and step == 1 and drawn.count((True, 1)) == 1:
            raise KeyboardInterrupt
        return original(tokenizer, recipe, seed, step)

    monkeypatch.setattr(finetune, "batch", stopped)
    with pytest.raises(KeyboardInterrupt):
        smollm2.build(tmp_path / "pair")
    assert (tmp_path / "pair/teacher/recipe.json").exists() and not (tmp_path / "pair/student").exists()
    out = smollm2.build(tmp_path / "pair")
    assert drawn == [(False, 0), (False, 1), (False, 2), (True, 0), (True, 1), (True, 1), (True, 2)]
    for who in ("teacher", "student"):
        assert weights(out / who) == weights(whole / who)


def test_what_is_refused(small_pair, monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no pair of this command"):
        smollm2.build(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    monkeypatch.undo()
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package")
    with pytest.raises(InputError, match="package no-such-package is not installed"):
        smollm2.pretrained()


def test_a_pair_needs_its_teacher_for_another_student(small_pair, tmp_path):
    out = smollm2.build(tmp_path / "pair")
    shutil.rmtree(out / "teacher")
    with pytest.raises(InputError, match=r"recipe.json: cannot be read"):
        smollm2.student(out, 1, tmp_path / "students")
    assert json.loads((out / "recipe.json").read_text())["task"] == smollm2.TASK
