"""Who needs a chat template: the model that makes prompts. A file can hold the template of a base model."""

import json

import pytest
from test_bad_input import S, edit, outcome, snapshot
from transformers import AutoTokenizer

from opd import evaluate
from opd import train as opd_train

SMALL = [S[0], "optim.steps=1", S[0], "optim.warmup_steps=0", S[0], "eval.limit=2"]


def without_template(folder):
    """Takes the template out of a model's folder, and returns it."""
    template = AutoTokenizer.from_pretrained(folder).chat_template
    for path in folder.glob("*template*"):
        path.unlink()
    edit("tokenizer_config.json", drop=("chat_template",))(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    return template


def train(setup, monkeypatch, capsys, *settings):
    arguments = ["--config", str(setup / "pair.json"), *SMALL, *(word for s in settings for word in (*S, s))]
    return outcome(opd_train.command, arguments, monkeypatch, capsys)


def test_a_teacher_needs_none_and_a_base_student_takes_one_from_a_file(setup, monkeypatch, capsys):
    code, _, err = train(setup, monkeypatch, capsys, "run_name=before")
    assert code == 0, err
    without_template(setup / "pair/teacher")
    template = without_template(setup / "pair/student")
    file = setup / "my.jinja"
    file.write_text(template)
    code, _, err = train(setup, monkeypatch, capsys, "run_name=base", f"student.chat_template={file}")
    assert code == 0, err
    same = ("loss/divergence", "optim/grad_norm", "tokens/response")
    rows = [json.loads((setup / f"out/{name}/metrics.jsonl").read_text()) for name in ("before", "base")]
    assert [rows[0][name] for name in same] == [rows[1][name] for name in same]
    checkpoint = setup / "out/base/checkpoints/step_000001"
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template == template
    record = json.loads((setup / "out/base/config.json").read_text())
    assert record["config"]["student"]["chat_template"] == str(file) and str(file) in record["files"]
    file.write_text(template + " ")  # another template under the same name makes another run
    code, _, err = train(setup, monkeypatch, capsys, "run_name=base", f"student.chat_template={file}")
    assert code == 2 and f"it differs in files.{file}" in err


def test_the_teacher_alone_is_evaluated_with_the_prompts_of_training(setup, monkeypatch, capsys):
    template = without_template(setup / "pair/teacher")
    (setup / "my.jinja").write_text(template)
    arguments = ["--config", str(setup / "pair.json"), "--model", str(setup / "pair/teacher"), "--limit", "1"]
    arguments += [*S, "eval.reverse_kl=false", *S, "eval.k=0"]
    code, _, err = outcome(evaluate.command, arguments, monkeypatch, capsys)
    assert code == 2 and "pair/teacher': the tokenizer has no chat template" in err
    arguments += [*S, f"student.chat_template={setup / 'my.jinja'}"]
    code, _, err = outcome(evaluate.command, arguments, monkeypatch, capsys)
    assert code == 0, err
    (row,) = map(json.loads, (setup / "out/eval/pair-teacher/bench.jsonl").read_text().splitlines())
    assert row["prompt"].startswith("<|im_start|>user\n")


@pytest.mark.parametrize(
    "content, more, message",
    [
        (None, [], "my.jinja: cannot be read (No such file or directory). Expected a chat template in Jinja"),
        (
            None,
            ["--dry-run"],
            "my.jinja: cannot be read (No such file or directory). Expected a chat template in Jinja",
        ),
        (b"\n", [], "my.jinja: the file is empty"),
        (b"\xff", [], "my.jinja: not UTF-8 text"),
        (b"{% for %}", [], "the chat template refuses it (Expected an expression"),
    ],
)
def test_files_that_hold_no_template(content, more, message, setup, monkeypatch, capsys):
    path = setup / "my.jinja"
    if content is not None:
        path.write_bytes(content)
    before = snapshot(setup)
    words = ["--config", str(setup / "pair.json"), *S, f"student.chat_template={path}", *more]
    code, out, err = outcome(opd_train.command, words, monkeypatch, capsys)
    assert code == 2 and message in err and out == "", err
    assert snapshot(setup) == before
