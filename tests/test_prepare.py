"""Data preparation: schema, counts, drop reasons, identical bytes, contamination."""

import json
import os
import re
from pathlib import Path

import pytest

from data import aime, contamination, dapo_math_17k, gsm8k
from data.prepare import command, prepare
from data.sources import BOXED
from opd.data import read_problems
from opd.errors import InputError

DATA = os.environ.get("OPD_TEST_DATA")
real = pytest.mark.skipif(not DATA, reason="OPD_TEST_DATA names no folder with problem files")


@pytest.mark.parametrize(
    "text,expected",
    [
        ("033", "33"),
        ("336^\\circ", "336"),
        ("336^{\\circ}", "336"),
        ("70°", "70"),
        (25, "25"),
        ("$25$", "25"),
        (" 0 ", "0"),
        ("000", "0"),
        ("33.0", "33"),
    ],
)
def test_aime_keys(text, expected):
    assert aime.key(text) == expected


@pytest.mark.parametrize("text", ["1000", "-3", "3.5", "", "x", None, "1 2x"])
def test_what_is_no_aime_key(text):
    with pytest.raises(ValueError, match="not an integer from 0 to 999"):
        aime.key(text)


def test_dapo_rows_by_hand():
    instruction = (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    )
    reminder = '\n\nRemember to put your answer on its own line after "Answer:".'
    original = {
        "prompt": [{"role": "user", "content": f"{instruction}What is $1+1$?{reminder}"}],
        "reward_model": {"ground_truth": "2"},
    }
    raw = [
        original,
        {"problem": "What is 1 + 1 ?", "answer": "2"},
        {"problem": "How many?", "answer": "3"},
        {"problem": "How  many?", "answer": "4"},
        *({"problem": f"Number {i}?", "answer": str(i)} for i in range(8)),
        {"problem": " ".join(f"w{i}" for i in range(30)), "answer": "1"},
        {"problem": "三角形的面积是多少?", "answer": 5},
    ]
    evaluation = [("e", " ".join(f"W{i}" for i in range(4, 40)))]
    found, dropped, pairs = dapo_math_17k.rows(raw, evaluation, "x")
    assert [p.eval_id for p in pairs] == ["e"]
    assert dropped == {"copies": 1, "copies with different answers": 2, "overlap with an evaluation set": 1}
    assert len(found) == 10
    texts = {row["prompt"][0]["content"] for row in found}
    assert "What is $1+1$?" + BOXED in texts and not any("Answer:" in t or "step by step. The last" in t for t in texts)
    assert {row["meta"]["language"] for row in found} == {"en", "zh"} and all(
        isinstance(r["answer"], str) for r in found
    )
    assert all(set(row) == {"id", "prompt", "answer", "source", "meta"} for row in found)


def evaluation_sets(folder):
    """Prepared evaluation sets of one problem each, which training data is held against."""
    for name in ("math500", "aime24", "aime25"):
        (folder / name).mkdir(parents=True)
        (folder / name / "test.jsonl").write_text('{"id": "e", "prompt": "something else"}\n')


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_split_is_two_files_and_a_manifest(tmp_path):
    source = tmp_path / "math.jsonl"
    problems = [{"problem": f"Number {i}?", "answer": str(i), "unique_id": f"p{i}"} for i in range(10)]
    source.write_text("".join(json.dumps(row) + "\n" for row in problems))
    options = ["--source", str(source), "--split", "0.8", "--split-seed", "42", "--out"]
    for out in ("one", "two"):
        evaluation_sets(tmp_path / out)
        command(["dapo_math_17k", *options, str(tmp_path / out)])
        command(["math500", *options, str(tmp_path / out)])
    for name, held_out in (("math500", "test"), ("dapo_math_17k", "validation")):
        train, other = (rows_of(tmp_path / "one" / name / f"{split}.jsonl") for split in ("train", held_out))
        assert (len(train), len(other)) == (8, 2) and len({row["answer"] for row in train + other}) == 10
        assert all(row["prompt"][0]["content"].endswith("?" + BOXED) for row in train)
        manifest = json.loads((tmp_path / "one" / name / "manifest.json").read_text())
        assert (manifest["split"], manifest["seed"]) == (0.8, 42)
        assert {file: about["rows"] for file, about in manifest["files"].items()} == {
            "train.jsonl": 8,
            f"{held_out}.jsonl": 2,
        }
        for file in ("train.jsonl", f"{held_out}.jsonl", "manifest.json"):
            assert (tmp_path / "one" / name / file).read_bytes() == (tmp_path / "two" / name / file).read_bytes()
    assert rows_of(tmp_path / "one/math500/test.jsonl")[0]["prompt"][0]["content"].endswith("?")  # as in the whole set
    command(["math500", *options[:-1], "--seed", "1", "--out", str(tmp_path / "two")])
    assert rows_of(tmp_path / "one/math500/test.jsonl") != rows_of(tmp_path / "two/math500/test.jsonl")


@pytest.mark.parametrize("share", ["0", "1", "1.0", "0.0", "80", "-0.5", "nan", "x", "0.5e0"])
def test_what_is_no_share_is_refused(share, tmp_path):
    with pytest.raises(InputError, match="expected a share between 0 and 1"):
        command(["math500", f"--split={share}", "--out", str(tmp_path)])


def test_a_split_that_leaves_a_file_empty_is_refused(tmp_path):
    source = tmp_path / "math.jsonl"
    source.write_text('{"problem": "1+1", "answer": "2", "unique_id": "a"}\n')
    with pytest.raises(InputError, match="of 1 problems leaves a file without any"):
        prepare("math500", str(source), tmp_path / "out", share=0.5)
    with pytest.raises(InputError, match="gsm8k comes as train and test"):
        prepare("gsm8k", "hub", tmp_path / "out", share=0.5)
    assert not list((tmp_path / "out").glob("*"))


def test_gsm8k_rows_by_hand():
    raw = [{"question": " Q? ", "answer": "So 1,000+1.\n#### 1,001"}]
    (train,), (test,) = gsm8k.rows(raw, "train", "x"), gsm8k.rows(raw, "test", "x")
    assert train["answer"] == test["answer"] == "1001"
    assert train["prompt"][0]["content"] == "Q?" + BOXED and test["prompt"][0]["content"] == "Q?"
    with pytest.raises(InputError, match="ends in '#### N'"):
        gsm8k.rows([{"question": "Q", "answer": "7"}], "train", "x")


def test_overlap_by_hand():
    text = [f"w{i}" for i in range(20)]  # 11 spans
    joined = " ".join(text)
    half = " ".join([*text[:15], *("z" * (i + 1) for i in range(5))])  # shares spans 0..5: 6 of 11
    less = " ".join([*text[:14], *("z" * (i + 1) for i in range(6))])  # 5 of 11
    found = contamination.overlaps([("half", half), ("less", less), ("same", joined.upper() + "!")], [("e", joined)])
    assert [(o.train_id, o.share) for o in found] == [("half", pytest.approx(6 / 11)), ("same", 1.0)]
    inside = contamination.overlaps([("long", joined + " " + "and more " * 50)], [("e", joined)])
    assert inside[0].share == 1.0  # of the shorter text
    assert contamination.overlaps([("a", "short one")], [("e", "Short, one.")]) and not contamination.overlaps(
        [("a", "short one")], [("e", "short two")]
    )
    chinese = "已知三角形的三条边长分别为三四五求它的面积是多少"
    assert contamination.overlaps([("a", "题目:" + chinese)], [("e", chinese)])
    assert not contamination.overlaps([("a", "求证任意两个偶数之和仍然是偶数的命题")], [("e", chinese)])


@real
def test_real_files_give_the_counts_and_the_same_bytes_twice(tmp_path):
    sources = {
        "math500": f"{DATA}/math500/test.jsonl",
        "aime24": f"{DATA}/aime24/test.jsonl",
        "aime25": f"{DATA}/aime25/test.jsonl",
        "gsm8k": f"{DATA}/gsm8k",
        "dapo_math_17k": f"{DATA}/dapo_math_17k/train.jsonl",
    }
    for out in (tmp_path / "one", tmp_path / "two"):
        for name, source in sources.items():
            prepare(name, source, out)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    manifests = {name: json.loads((tmp_path / "one" / name / "manifest.json").read_text()) for name in sources}
    rows = {name: {f: about["rows"] for f, about in m["files"].items()} for name, m in manifests.items()}
    assert rows["math500"] == {"test.jsonl": 500} and rows["aime24"] == rows["aime25"] == {"test.jsonl": 30}
    assert rows["gsm8k"] == {"train.jsonl": 7473, "test.jsonl": 1319}
    dapo = manifests["dapo_math_17k"]
    overlapping = dapo["dropped"]["overlap with an evaluation set"]
    assert rows["dapo_math_17k"] == {
        "train.jsonl": int(0.8 * (16714 - overlapping)),
        "validation.jsonl": 16714 - overlapping - int(0.8 * (16714 - overlapping)),
    }
    recorded = {line.split()[1]: line.split()[0] for line in (Path(DATA) / "SHA256SUMS").read_text().splitlines()}
    recorded = {name.removeprefix("./"): digest for name, digest in recorded.items()}
    for name, split in (
        ("math500", "test"),
        ("aime24", "test"),
        ("aime25", "test"),
        ("gsm8k", "train"),
        ("gsm8k", "test"),
        ("dapo_math_17k", "train"),
    ):
        assert manifests[name]["source"][split]["sha256"] == recorded[f"{name}/{split}.jsonl"]
    problems = read_problems(tmp_path / "one/math500/test.jsonl", "prompt", "answer")
    assert len({p.id for p in problems}) == 500 and problems[0].answer == "\\left( 3, \\frac{\\pi}{2} \\right)"
    assert {p.answer for p in read_problems(tmp_path / "one/aime24/test.jsonl", "prompt", "answer")} >= {
        "33",
        "23",
        "25",
    }


@real
def test_contamination_finds_the_marked_rows_from_the_texts_alone():
    dapo = [json.loads(line) for line in (Path(DATA) / "dapo_math_17k/train.jsonl").read_text().split("\n") if line]
    marked = {row["id"] for row in dapo if row["eval_overlap"]}
    evaluation = []
    for name in ("math500", "aime24", "aime25"):
        lines = (Path(DATA) / name / "test.jsonl").read_text().split("\n")
        evaluation += [(f"{name}-{i}", json.loads(line)["problem"]) for i, line in enumerate(lines) if line]
    found = {pair.train_id for pair in contamination.overlaps([(r["id"], r["problem"]) for r in dapo], evaluation)}
    assert len(marked) == 26 and len(found & marked) >= 24
    assert len(found - marked) <= 5, sorted(found - marked)


def test_training_data_needs_the_evaluation_sets_first(tmp_path, monkeypatch):
    source = tmp_path / "dapo.jsonl"
    source.write_text('{"problem": "1+1", "answer": "2"}\n')
    with pytest.raises(InputError, match=r"python -m data\.prepare math500"):
        prepare("dapo_math_17k", str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content,message",
    [
        ("{", "not JSON"),
        ("[1]", "this is a JSON list"),
        ("", "no problems in it"),
        ('{"problem": "x"}', "row 1: no field 'answer'"),
        ('{"problem": "x", "answer": "1/2"}', "not an integer from 0 to 999"),
    ],
)
def test_malformed_sources_are_named(tmp_path, content, message):
    source = tmp_path / "aime.jsonl"
    source.write_text(content)
    with pytest.raises(InputError, match=message):
        command(["aime24", "--source", str(source), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_hub_is_asked_for_a_pinned_revision(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(repository, subset, split, revision):
        asked.append((repository, subset, split, revision))
        rows = {"problem": "p", "answer": "033", "unique_id": "u", "question": "q"}
        return datasets.Dataset.from_list([rows | ({"answer": "#### 7"} if "gsm8k" in repository else {})])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("math500", "aime24", "aime25", "gsm8k", "dapo_math_17k"):
        prepare(name, "hub", tmp_path)
    assert [(a[0], a[2]) for a in asked] == [
        ("HuggingFaceH4/MATH-500", "test"),
        ("HuggingFaceH4/aime_2024", "train"),
        ("yentinglin/aime_2025", "train"),
        ("openai/gsm8k", "train"),
        ("openai/gsm8k", "test"),
        ("YouJiacheng/DAPO-Math-17k-dedup", "train"),
    ]
    assert all(re.fullmatch(r"[0-9a-f]{40}", a[3]) for a in asked)
    manifest = json.loads((tmp_path / "aime24/manifest.json").read_text())
    assert manifest["source"]["test"]["revision"] == asked[1][3]
    assert json.loads((tmp_path / "aime24/test.jsonl").read_text())["answer"] == "33"
    # the one training problem stands in every evaluation set: dropped, and listed with both texts
    assert json.loads((tmp_path / "dapo_math_17k/manifest.json").read_text())["dropped"] == {
        "overlap with an evaluation set": 1
    }
    overlap = json.loads((tmp_path / "dapo_math_17k/overlap.jsonl").read_text().splitlines()[0])
    assert overlap["train_text"] == overlap["eval_text"] == "p"


def test_a_hub_that_cannot_be_reached_is_one_message(tmp_path, monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        InputError, match=r"HuggingFaceH4/MATH-500@\w+/test: cannot be read \(no network\).*--source FILE"
    ):
        prepare("math500", "hub", tmp_path)


def test_the_contamination_command_reports_both_texts(tmp_path, capsys):
    train, evaluation = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    rows = [
        {"id": "a", "prompt": "What is 2+3?" + BOXED, "answer": "5"},
        {"id": "b", "prompt": "Find x." + BOXED, "answer": "1"},
    ]
    train.write_text("\n".join(map(json.dumps, rows)))
    evaluation.write_text(
        "\n".join(map(json.dumps, [{"id": "e", "prompt": "what is 2 + 3"}, {"id": "f", "prompt": "Solve y." + BOXED}]))
    )
    contamination.command([str(train), str(evaluation), "--out", str(tmp_path / "report.jsonl")])
    assert capsys.readouterr().out == "1\n"
    (pair,) = map(json.loads, (tmp_path / "report.jsonl").read_text().splitlines())
    assert (pair["train_id"], pair["eval_id"], pair["train_text"], pair["eval_text"]) == (
        "a",
        "e",
        "What is 2+3?",
        "what is 2 + 3",
    )
