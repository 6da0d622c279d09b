"""Two evaluations on the same problems: pairs, which evaluation of a run, and files that are damaged or foreign."""

import json

import pytest
from helpers import evaluation_figures
from helpers import response as row

from opd import compare
from opd.errors import InputError

BENCHMARK = {"version": 1, "file": "test.jsonl"}


def evaluation(folder, greedy, **figures):
    """A finished evaluation of the benchmark `bench` by greedy answers, one a problem."""
    folder.mkdir(parents=True)
    rows = [row(f"p{i}", -1, correct) for i, correct in enumerate(greedy)]
    (folder / "bench.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = evaluation_figures(greedy=0.5, mean_at_k=None, benchmark=BENCHMARK) | figures
    (folder / "summary.json").write_text(json.dumps({"bench": found}))
    return folder


@pytest.fixture
def pair(tmp_path):
    return evaluation(tmp_path / "a", [False] * 8), evaluation(tmp_path / "b", [True] * 2 + [False] * 6)


def output(arguments, capsys):
    compare.command([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_pairs_are_made_by_problem_and_an_ungraded_answer_is_wrong(tmp_path):
    for name, answers in (
        ("a", {"p": [True, False], "q": [False, False], "only a": [True, True]}),
        ("b", {"p": [True, True], "q": [None, False], "r": [True, True]}),
    ):
        (tmp_path / name).mkdir()
        rows = [row(p, i, c) for p, values in answers.items() for i, c in enumerate(values)] + [row("p", -1, True)]
        (tmp_path / name / "bench.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = compare.compare(tmp_path / "a", tmp_path / "b", "bench")
    assert (found.problems, found.a, found.b, found.better, found.worse) == (2, 0.25, 0.5, 1, 0)
    assert (found.low, found.high) == (-1, 1)  # 0.25 +- 12.7 x 0.25: two problems leave everything open
    assert compare.per_problem(tmp_path / "b" / "bench.jsonl")["mean_at_k"] == {"p": 1.0, "q": 0.0, "r": 1.0}
    (tmp_path / "b" / "bench.jsonl").write_text(json.dumps(row("p", 0, None)) + "\n" + json.dumps(row("p", 1, True)))
    assert compare.per_problem(tmp_path / "b" / "bench.jsonl")["mean_at_k"] == {"p": 0.5}
    with pytest.raises(InputError, match="no problem of bench with greedy in both"):
        compare.compare(tmp_path / "a", tmp_path / "b", "bench", "greedy")


def test_the_interval_is_of_95_percent_and_the_output_says_over_what(pair, capsys):
    found = compare.compare(*pair, "bench", "greedy")
    half = (
        2.364624 * (1.5 / 7) ** 0.5 / 8**0.5
    )  # t of 7 degrees of freedom x deviation of two ones and six zeros / sqrt(8)
    assert (found.low, found.high) == pytest.approx((0.25 - half, 0.25 + half), abs=1e-6)
    text = output(pair, capsys)
    assert "95 % interval over problems only: it says nothing about another training" in text
    assert "bench greedy: A 0.0, B 25.0, difference +25.0 [-13.7, +63.7]; better on 2, worse on 0 of 8" in text
    assert "mean@k" not in text  # not measured


def test_the_last_finished_step_of_a_run_is_compared_and_foreign_folders_are_not(tmp_path, pair, capsys):
    run = tmp_path / "run"
    for step, right in (("000000", 0), ("000020", 2), ("999999", 3), ("1000000", 4)):
        evaluation(run / "eval" / f"step_{step}", [True] * right + [False] * (4 - right))
    for name in ("step_foo", "step_9999999x", "step_99", "xstep_9000000", "teacher"):
        evaluation(run / "eval" / name, [False] * 4)
    (run / "eval" / "step_1000020").mkdir()  # not finished
    (run / "summary.json").write_text('{"tokens": {}}')  # the run's own
    assert compare.evaluation_folder(run).name == "step_1000000"
    assert f"B: {run / 'eval/step_1000000'}" in (text := output([pair[0], run], capsys)) and "B 100.0" in text


def test_evaluations_that_were_not_measured_alike_are_refused(tmp_path, pair):
    for change in ({"seed": 1}, {"grader": "h"}, {"benchmark": BENCHMARK | {"version": 2}}):
        other = evaluation(tmp_path / next(iter(change)), [True] * 4, **change)
        with pytest.raises(InputError, match="bench was not measured the same way"):
            compare.command([str(pair[0]), str(other)])
    (pair[1] / "summary.json").write_text((pair[1] / "summary.json").read_text().replace('"bench"', '"other"'))
    with pytest.raises(InputError, match="no benchmark in common"):
        compare.command([str(pair[0]), str(pair[1])])


@pytest.mark.parametrize("arguments", [[], ["a"], ["a", "b", "c"], ["a", "b", "--seed"]])
def test_wrong_arguments_show_the_usage(arguments):
    with pytest.raises(InputError, match=r"Usage: python -m opd\.compare"):
        compare.command(arguments)


def test_a_folder_without_an_evaluation_is_named(tmp_path, pair):
    for name in ("step_99", "step_foo", "step_00002x", "teacher"):
        evaluation(tmp_path / "foreign" / "eval" / name, [True] * 4)
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "foreign", pair[0] / "bench.jsonl"):
        with pytest.raises(InputError, match=f"{folder}: no finished evaluation in it"):
            compare.command([str(folder), str(pair[1])])


def edited(**changes):
    """A line of responses with other values; without those that are None."""
    values = row("p0", -1, True) | changes
    return json.dumps({key: value for key, value in values.items() if key not in changes or value is not None}).encode()


GOOD = json.dumps(row("p0", -1, True)).encode() + b"\n"
DAMAGED = {
    "an empty summary": ("summary.json", b"", "not JSON"),
    "half a summary": ("summary.json", b'{"bench": {"greedy": 0.5, "mean', "not JSON"),
    "a summary that is a list": ("summary.json", b"[1, 2]", "list, expected the figures of an evaluation"),
    "a summary in Latin-1": ("summary.json", '{"Prüfung": 1}'.encode("latin-1"), "not UTF-8"),
    "a summary in UTF-16": ("summary.json", '{"bench": {}}'.encode("utf-16"), "not UTF-8"),
    "a summary in UTF-16 without its mark": ("summary.json", '{"bench": {}}'.encode("utf-16-le"), "not JSON"),
    "figures that lack some": (
        "summary.json",
        b'{"bench": {"greedy": 0.5}}',
        "bench.time/evaluation is missing. Expected the figures of an evaluation",
    ),
    "figures that are a number": (
        "summary.json",
        b'{"bench": 3}',
        "bench is 3 (Input should be a valid dictionary). Expected the figures",
    ),
    "no responses": ("bench.jsonl", None, "cannot be read (No such file or directory)"),
    "responses in UTF-16": ("bench.jsonl", GOOD.decode().encode("utf-16"), "not UTF-8"),
    "a line cut off": ("bench.jsonl", GOOD + b'{"id": "p1", "sam', "line 2: not JSON"),
    "a line that is a list": ("bench.jsonl", GOOD + b"\n[1]\n", "line 3: list, expected a JSON object"),
    "a response without id": ("bench.jsonl", GOOD + edited(id=None), "line 2: id is missing. Expected the responses"),
    "an id that is a list": ("bench.jsonl", edited(id=[1]), "line 1: id is [1] (Input should be a valid string)"),
    "a response without sample": ("bench.jsonl", edited(sample=None), "line 1: sample is missing"),
    "a sample that is a text": (
        "bench.jsonl",
        edited(sample="-1"),
        "line 1: sample is '-1' (Input should be a valid integer)",
    ),
    "a response without verdict": ("bench.jsonl", edited(correct=None), "line 1: correct is missing"),
    "a verdict that is a text": ("bench.jsonl", edited(correct="yes"), "line 1: correct is 'yes'"),
    "no response at all": ("bench.jsonl", b"", "nothing is in it. Expected the responses"),
}


@pytest.mark.parametrize("name,content,message", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_ends_in_one_message(name, content, message, pair):
    path = pair[1] / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        compare.command([str(folder) for folder in pair])
    text = str(caught.value)
    assert message in text and "\n" not in text
    assert str(path) in text or str(pair[1]) in text
