"""The embedded pairs: task, tokenizer, what is shipped, and that another one is built once and the same."""

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from data.tiny import build, task
from opd import evaluate
from opd.grading import extract


def test_answers_by_hand():
    # left to right, not by precedence: ((8*6-5)-2)-3 -> 8, 3, 1, 8
    assert task.answer("8*6-5-2-3 mod10?") == 8
    assert task.answer("2+3*4-9+0 mod10?") == 1  # 5, 20 -> 0, -9 -> 1, 1
    assert task.answer("0-1+0*7-7 mod10?") == 6  # 9, 9, 63 -> 3, -4 -> 6


def test_the_teachers_text_is_right_and_the_students_is_wrong_in_two_ways():
    rng = random.Random(0)
    misconceptions = careless = subtractions = 0
    for _ in range(2000):
        text = task.problem(rng)
        assert extract(task.response(text, task.TEACHER, rng)) == str(task.answer(text))
        for line in task.response(text, task.STUDENT, rng).splitlines()[:-1]:
            a, operator, b, result = line[-5], line[-4], line[-3], line[-1]
            right = str(task.apply(int(a), operator, int(b)))
            if operator == "*" and b >= "6":
                assert result == str((int(right) + 1) % 10)
                misconceptions += 1
            elif operator == "-" and b > a:
                subtractions += 1
                careless += result != right
            else:
                assert result == right
    assert misconceptions > 500 and 0.45 < careless / subtractions < 0.51  # reversed and right coincide when b - a = 5


def test_the_tokenizer_is_exact_both_ways():
    tokenizer, rng = task.tokenizer(), random.Random(1)
    assert len(tokenizer) == 35
    for _ in range(200):
        text = task.problem(rng)
        response = task.response(text, task.STUDENT, rng)
        for piece, length in ((text, 11), (response, 36)):
            ids = tokenizer.encode(piece, add_special_tokens=False)
            assert len(ids) == length and tokenizer.decode(ids) == piece and tokenizer.unk_token_id not in ids
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    assert len(prompt) == 19 and tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


def test_the_folder_is_a_pair_of_plain_checkpoints(tiny_pair):
    for name, layers, hidden in (("teacher", 3, 96), ("student", 2, 64)):
        config = AutoConfig.from_pretrained(tiny_pair / name)
        assert (config.num_hidden_layers, config.hidden_size, config.head_dim, config.vocab_size) == (
            layers,
            hidden,
            32,
            35,
        )
        tokenizer = AutoTokenizer.from_pretrained(tiny_pair / name)
        assert tokenizer.get_vocab() == task.tokenizer().get_vocab() and tokenizer.chat_template == task.CHAT_TEMPLATE
    train, test = (
        [json.loads(line) for line in (tiny_pair / f"{n}.jsonl").read_text().splitlines()] for n in ("train", "test")
    )
    assert len(train) == 8192 and len(test) == 512
    assert not {r["problem"] for r in train} & {r["problem"] for r in test}
    assert all(r["answer"] == str(task.answer(r["problem"])) for r in train + test)


CONFIGS = {
    "chain": "configs/tiny.json",
    "addition": "configs/tiny_addition.json",
    "planning": "configs/tiny_planning.json",
    "planning_absolute": "configs/tiny_planning_absolute.json",
    "hinted": "configs/tiny_self.json",
}


def models_of(pair):
    return ("teacher", "student") if pair.teacher else ("student",)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shipped_pair_is_made_by_todays_recipe(name, tmp_path):
    folder, pair = Path("data/tiny/pairs") / name, build.PAIRS[name]
    recorded = json.loads((folder / "recipe.json").read_text())
    recipes = {who: recipe and asdict(recipe) for who, recipe in (("teacher", pair.teacher), ("student", pair.student))}
    assert {k: recorded[k] for k in ("task", "seed", "teacher", "student")} == json.loads(
        json.dumps({"task": name, "seed": 0, **recipes})
    )
    test = build.write_problems(tmp_path / "test.jsonl", pair.task, pair.test_problems, build.TEST_SEED, set())
    build.write_problems(tmp_path / "train.jsonl", pair.task, pair.train_problems, build.TRAIN_SEED, test)
    for file in ("test.jsonl", "train.jsonl"):
        assert (folder / file).read_bytes() == (tmp_path / file).read_bytes()
    for who in models_of(pair):
        with safe_open(folder / who / "model.safetensors", framework="pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118


def test_the_shipped_weights_are_small():
    assert sum(path.stat().st_size for path in Path("data/tiny/pairs").rglob("*.safetensors")) < 3.25 * 2**20


def greedy_accuracy(config, model, out):
    evaluate.command(
        [
            "--config",
            config,
            "--model",
            str(model),
            "--out",
            str(out),
            "--set",
            "eval.k=0",
            "--set",
            "eval.reverse_kl=false",
        ]
    )
    (figures,) = json.loads((out / "summary.json").read_text()).values()
    return figures["greedy"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_building_from_the_recipe_reaches_the_shipped_accuracies(name, tmp_path):
    """Another processor trains other weights; both models stay within five points on the 512 test problems."""
    built, shipped = build.build(tmp_path / "pair", name=name), Path("data/tiny/pairs") / name
    for who in models_of(build.PAIRS[name]):
        ours, theirs = (
            greedy_accuracy(CONFIGS[name], folder / who, tmp_path / f"{which}-{who}")
            for which, folder in (("built", built), ("shipped", shipped))
        )
        print(f"{name} {who}: built {ours:.3f}, shipped {theirs:.3f}")
        assert abs(ours - theirs) <= 0.05


@pytest.mark.parametrize("name", CONFIGS)
def test_building_is_deterministic_and_happens_once(name, monkeypatch, tmp_path):
    pair = build.PAIRS[name]
    recipes = {who: replace(vars(pair)[who], steps=3, batch=4, warmup=1) for who in models_of(pair)}
    monkeypatch.setitem(build.PAIRS, name, replace(pair, **recipes))
    for folder in (tmp_path / "a", tmp_path / "b"):
        build.build(folder, name=name)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    stamp = (tmp_path / "a" / "recipe.json").stat().st_mtime_ns
    students = tmp_path / "students"
    other = build.student(tmp_path / "a", 7, students)
    assert (other / "model.safetensors").read_bytes() != (tmp_path / "a" / "student" / "model.safetensors").read_bytes()
    made = (other / "model.safetensors").stat().st_mtime_ns
    assert build.student(tmp_path / "a", 7, students) == other == students / name / "seed_7"
    assert build.student(tmp_path / "a", 0, students) == tmp_path / "a" / "student"
    assert (other / "model.safetensors").stat().st_mtime_ns == made
    build.build(tmp_path / "a", name=name)
    assert (tmp_path / "a" / "recipe.json").stat().st_mtime_ns == stamp
    build.build(tmp_path / "a", seed=1, name=name)  # another recipe: rebuilt
    assert (tmp_path / "a" / "recipe.json").stat().st_mtime_ns != stamp
    assert not list(tmp_path.glob(".*")) and torch.get_num_threads() == 1
