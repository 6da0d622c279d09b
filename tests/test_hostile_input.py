"""Input that breaks readers: numbers and nesting without end, half characters, null bytes, endless names, damaged runs.

Like tests/test_bad_input.py, for what ended in a traceback or a crash before, and for all commands.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from runs import words
from test_bad_input import edit, line, nothing, outcome, snapshot, write

from data import contamination, prepare
from data.tiny import build
from opd import cli, compare, evaluate, launch
from opd import train as opd_train
from opd.config import MOST_THREADS
from tip import analyze, report, reproduce
from tip import train as tip_train

S = "--set"
DIGITS = "9" * 5000
DEEP, BOTTOMLESS = "[" * 200 + "]" * 200, "[" * 100_000
HALF = "\\ud800"  # in JSON: the first half of a character
NAME = "n" * 300
SEEDS = ("2147483648", "-1", "1.0", "x", "", "٣", DIGITS)


def refused(command, arguments, folder, monkeypatch, capsys):
    """The message of a command that refuses its input: code 2, one line of error, a disk as it was."""
    before = snapshot(folder)
    code, out, err = outcome(command, [str(argument) for argument in arguments], monkeypatch, capsys)
    assert code == 2, err
    assert len([text for text in err.splitlines() if text.startswith("error: ")]) == 1 and "Traceback" not in err
    assert out == "" and len(err) < 1500, err
    assert snapshot(folder) == before
    return err


def prompts(text):
    return line(json.dumps({"id": "i", "problem": "P", "answer": "5"}).replace('"P"', text))


def replaced(name, old, new):
    """Changes the text of a file, for what json.dumps does not write."""

    def change(d):
        text = (d / name).read_text()
        assert old in text
        (d / name).write_text(text.replace(old, new, 1))

    return change


def benchmark_file(text):
    """The benchmark's problems are `text`."""
    return write("pair/test.jsonl", text)


DIGIT_FAULT, DEPTH_FAULT, HALF_FAULT = (
    "Exceeds the limit (4300 digits)",
    "nested too deep, expected at most 100 levels",
    "half of a character",
)
MESSAGES = f'[{{"role": "user", "content": "a{HALF}"}}]'
CASES = {
    "digits in --set": (nothing, [S, f"seed={DIGITS}"], "error: --set 'seed=99999", DIGIT_FAULT),
    "digits in the config": (replaced("pair.json", '"seed": 0', f'"seed": {DIGITS}'), [], "pair.json: ", DIGIT_FAULT),
    "digits in a line": (line(f'{{"problem": "1", "answer": {DIGITS}}}'), [], "train.jsonl, line 2: ", DIGIT_FAULT),
    "digits in a benchmark": (
        benchmark_file(f'{{"problem": "1", "answer": {DIGITS}}}'),
        [],
        "test.jsonl, line 1: ",
        DIGIT_FAULT,
    ),
    "deep in --set": (
        nothing,
        [S, f"data.chat_template_args={DEEP}"],
        "error: --set 'data.chat_template_args=[[",
        DEPTH_FAULT,
    ),
    "deep in the config": (replaced("pair.json", '"seed": 0', f'"seed": {DEEP}'), [], "pair.json: ", DEPTH_FAULT),
    "deep in a line": (prompts(DEEP), [], "train.jsonl, line 2: ", DEPTH_FAULT),
    "bottomless in --set": (nothing, [S, f"data.train={BOTTOMLESS}"], "error: --set 'data.train=[[", DEPTH_FAULT),
    "bottomless in the config": (write("pair.json", '{"seed": ' + BOTTOMLESS), [], "pair.json: ", DEPTH_FAULT),
    "bottomless in a line": (line('{"a": ' + BOTTOMLESS), [], "train.jsonl, line 2: ", DEPTH_FAULT),
    "deep in a model's config.json": (
        write("pair/student/config.json", '{"model_type": ' + BOTTOMLESS),
        [],
        "student.path",
        "does not load as a causal",
    ),
    "half a character in a prompt": (prompts(f'"1{HALF}"'), [], "train.jsonl, line 2: holds \\ud800", HALF_FAULT),
    "half a character in an answer": (
        line(f'{{"problem": "1", "answer": "{HALF}"}}'),
        [],
        "line 2: holds \\ud800",
        HALF_FAULT,
    ),
    "half a character in an id": (
        line(f'{{"id": "{HALF}", "problem": "1", "answer": "1"}}'),
        [],
        "line 2: holds \\ud800",
        HALF_FAULT,
    ),
    "half a character in a key": (
        line(f'{{"{HALF}": 1, "problem": "1", "answer": "1"}}'),
        [],
        "line 2: holds \\ud800",
        HALF_FAULT,
    ),
    "half a character in a message": (prompts(MESSAGES), [], "line 2: holds \\ud800", HALF_FAULT),
    "half a character in the config": (
        replaced("pair.json", '"run_name": "tiny"', f'"run_name": "{HALF}"'),
        [],
        "pair.json: holds \\ud800",
        HALF_FAULT,
    ),
    "half a character in --set": (nothing, [S, f'student.path="{HALF}"'], "error: --set 'student.path=", HALF_FAULT),
    "half a character typed": (
        nothing,
        [S, "student.path=\udcff"],
        "argument 'student.path=\\udcff' is not UTF-8 text",
        "Type it again",
    ),
    "half a character typed as a config": (
        nothing,
        ["--config", "\udcff"],
        "argument '\\udcff' is not UTF-8 text",
        "rename the file",
    ),
    "half a character in a benchmark": (
        benchmark_file(f'{{"problem": "{HALF}", "answer": "1"}}'),
        [],
        "test.jsonl, line 1: holds",
        HALF_FAULT,
    ),
    "UTF-16": (
        write("pair/train.jsonl", '{"problem": "1"}'.encode("utf-16")),
        [],
        "train.jsonl: not UTF-8 text (byte 0)",
        "Expected a JSONL file",
    ),
    "a folder of other files": (
        nothing,
        [S, 'data.train=["{dir}"]'],
        "{dir}/bench.json: the object in it has no list",
        "Expected a JSON list of problems, or an object with one list",
    ),
    "a folder without files": (
        lambda folder: (folder / "empty").mkdir(),
        [S, 'data.train=["{dir}/empty"]'],
        "{dir}/empty: no file in this folder ends in .jsonl, .json, .csv, .parquet",
        "Name the files",
    ),
    "a folder of config": (
        nothing,
        [S, "seed=0", "--config", "{dir}"],
        "{dir}: cannot be read (Is a directory)",
        "Expected a JSON file",
    ),
    **{
        f"a null byte in {key}": (nothing, [S, f"{key}={value}"], key, "holds a null byte, which no path can")
        for key, value in {
            "student.path": '"a\\u0000b"',
            "teacher.path": '"a\\u0000b"',
            "data.train": '["a\\u0000b"]',
            "eval.benchmarks": '["a\\u0000b"]',
            "output_dir": '"a\\u0000b"',
            "engine.deepspeed": '"a\\u0000b"',
        }.items()
    },
    "a null byte in a benchmark": (edit("bench.json", file="a\0b"), [], "bench.json: file is", "holds a null byte"),
    "a null byte in the run's name": (nothing, [S, 'run_name="a\\u0000b"'], "run_name is", "Expected"),
    "an endless run_name": (nothing, [S, f"run_name={NAME}"], "run_name is", "at most 200 characters"),
    "an endless output_dir": (
        nothing,
        [S, f"output_dir={{dir}}/{NAME}"],
        "output_dir is",
        "expected names of at most 255 bytes",
    ),
    "an endless output_dir of short names": (
        nothing,
        [S, "output_dir={dir}" + "/n" * 2500],
        "output_dir is",
        "too long for a path",
    ),
    "an endless name in bytes": (nothing, [S, f"output_dir={{dir}}/{'ü' * 130}"], "output_dir is", "at most 255 bytes"),
    "an endless model": (nothing, [S, f"student.path=a/{NAME}"], "student.path is", "at most 255 bytes"),
    "an endless data file": (nothing, [S, f'data.train=["{NAME}"]'], "data.train.0 is", "at most 255 bytes"),
    "an endless benchmark": (nothing, [S, f'eval.benchmarks=["{NAME}"]'], "eval.benchmarks.0 is", "at most 255 bytes"),
    "an endless config": (nothing, ["--config", NAME], "argument --config", "at most 255 bytes"),
    "a config without a name": (nothing, ["--config", ""], "argument --config", "is empty, expected a path"),
    "an endless checkpoint": (nothing, ["--resume", NAME], "--resume", "Expected"),
    "an endless rule": (nothing, [S, f"tip.rule={NAME}"], "rule is", "one of all, random"),
    "a device without end": (
        nothing,
        ["--config", "/dev/zero"],
        "/dev/zero: is a device or a pipe, which may have no end",
        "Expected",
    ),
    "a device of data": (nothing, [S, 'data.train=["/dev/zero"]'], "/dev/zero: is a device", "Expected"),
    "a pipe of data": (
        lambda folder: os.mkfifo(folder / "pipe"),
        [S, 'data.train=["{dir}/pipe"]'],
        "{dir}/pipe: is a device or a pipe",
        "Expected a .jsonl, .json, .csv or .parquet file",
    ),
    "an endless argument": (nothing, [NAME * 10], "unrecognized arguments: nnn", "Usage: "),
    "an endless field": (nothing, [S, f"data.prompt_field={NAME * 10}"], "no field 'nnn", "Set the field's name"),
    "an endless server": (
        nothing,
        [S, "rollout.engine=vllm", S, f'rollout.servers=["{NAME * 10}"]'],
        "is no address of a server",
        "",
    ),
    "a port of other digits": (
        nothing,
        [S, "rollout.engine=vllm", S, 'rollout.servers=["a:²"]'],
        "'a:²' is no address",
        "",
    ),
    "an endless key": (nothing, [S, f"{NAME * 10}=1"], "nnn", "not a known key"),
    **{
        f"template argument {name}": (
            nothing,
            [S, f"data.chat_template_args={json.dumps({name: value})}"],
            f"sets '{name}'",
            "Remove it",
        )
        for name, value in {
            "return_tensors": "pt",
            "tokenize": False,
            "padding": "max_length",
            "truncation": True,
            "max_length": 3,
            "return_dict": True,
            "add_generation_prompt": False,
            "continue_final_message": True,
            "chat_template": "x",
            "conversation": [],
            "tokenizer_kwargs": {},
            "return_assistant_tokens_mask": True,
        }.items()
    },
    "a hundred million threads": (
        nothing,
        [S, "engine.cpu_threads=100000000"],
        "engine.cpu_threads is 100000000",
        "less than or equal to 1024",
    ),
    **{
        f"{key} = {value}": (nothing, [S, f"{key}={value}"], f"{key} is ", "less than or equal to")
        for key, value in {
            "rollout.n": 10**9,
            "rollout.prompts_per_step": 10**9,
            "eval.k": 2**31,
            "optim.steps": 10**30,
            "rollout.batch_size": 2**63,
            "data.max_prompt_tokens": 10**30,
            "rollout.max_response_tokens": 2**64,
            "teacher.cache_gb": 1e308,
        }.items()
    },
    "more samples than anyone takes": (
        edit("bench.json", k=2**31),
        [],
        "bench.json: k is 2147483648",
        "less than or equal to 100000",
    ),
    "a temperature that overflows": (
        nothing,
        [S, "rollout.temperature=1e-320"],
        "rollout.temperature is 1e-320",
        "expected 0 (greedy) or at least 0.001",
    ),
    "a benchmark's temperature that overflows": (
        edit("bench.json", temperature=1e-320),
        [],
        "bench.json: temperature is 1e-320",
        "greater than or equal to 0.001",
    ),
    "no thread": (nothing, [S, "engine.cpu_threads=0"], "engine.cpu_threads is 0", "greater than or equal to 1"),
    "a revision of a folder": (nothing, [S, "student.revision=main"], "student.revision is 'main'", "Set it to null"),
    "a revision of a teacher's folder": (
        nothing,
        [S, "teacher.revision=main"],
        "teacher.revision is 'main'",
        "Set it to null",
    ),
    **{f"seed {text[:12]}": (nothing, [S, f"seed={text}"], "seed", "") for text in SEEDS},
}


@pytest.mark.parametrize("name", CASES)
def test_hostile_input(name, setup, monkeypatch, capsys):
    change, extra, *wanted = CASES[name]
    change(setup)
    arguments = ["--config", setup / "pair.json", *(text.replace("{dir}", str(setup)) for text in extra)]
    message = refused(tip_train.command, arguments, setup, monkeypatch, capsys)
    for text in wanted:
        assert text.replace("{dir}", str(setup)) in message, message


def test_a_byte_order_mark_is_no_fault(setup, monkeypatch, capsys):
    for name in ("pair.json", "bench.json", "pair/train.jsonl", "pair/test.jsonl"):
        (setup / name).write_bytes(b"\xef\xbb\xbf" + (setup / name).read_bytes())
    arguments = ["--config", str(setup / "pair.json"), S, "optim.steps=1", S, "optim.warmup_steps=0"]
    code, out, err = outcome(tip_train.command, arguments, monkeypatch, capsys)
    assert code == 0 and out == f"{setup}/out/tiny\n", err


def test_the_most_threads_work():
    product = "float((torch.ones(512, 512) @ torch.ones(512, 512)).sum())"
    code = f"import torch; torch.set_num_threads({MOST_THREADS}); print({product})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0 and float(found.stdout) == 512**3, found.stderr


# --- model folders ----------------------------------------------------------------------------------------------------
@pytest.fixture
def random_model(setup, tiny_pair):
    """A function that puts a small random model of an architecture, with the pair's tokenizer, into the student's
    place."""

    def make(name, **changes):
        for path in (setup / "pair/student").iterdir():
            if not path.name.startswith("tokenizer") and "template" not in path.name:
                path.unlink()
        torch.manual_seed(0)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_pair / "student")
        config = getattr(transformers, f"{name}Config")(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=128,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(setup / "pair/student")
        edit("pair/student/config.json", **changes)(setup)

    return make


@pytest.mark.parametrize("name, key", [("Cohere", "logit_scale"), ("Gemma2", "final_logit_softcapping")])
@pytest.mark.parametrize("value", ["big", [1], True, {}])
def test_a_head_that_is_scaled_by_no_number(name, key, value, random_model, setup, monkeypatch, capsys):
    random_model(name, **{key: value})
    arguments = ["--config", setup / "pair.json", S, "student.attn_implementation=eager"]
    message = refused(tip_train.command, arguments, setup, monkeypatch, capsys)
    assert "student.path" in message and key in message, message


@pytest.mark.parametrize(
    "name, changes, wanted",
    [
        ("config.json", {"is_encoder_decoder": True}, "config.json has is_encoder_decoder"),
        ("config.json", {"final_logit_softcapping": 10**400}, "final_logit_softcapping"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": [1, -1]}, "eos_token_id"),
        ("generation_config.json", {"pad_token_id": -1}, "generation_config.json cannot be saved again"),
        (
            "generation_config.json",
            {"temperature": 0.6, "do_sample": False},
            "generation_config.json cannot be saved again",
        ),
        ("generation_config.json", {"temperature": ""}, "generation_config.json"),
    ],
)
def test_settings_of_a_model_that_end_a_run_later(name, changes, wanted, setup, monkeypatch, capsys):
    edit(f"pair/student/{name}", **changes)(setup)
    message = refused(tip_train.command, ["--config", setup / "pair.json"], setup, monkeypatch, capsys)
    assert "student.path" in message and wanted in message, message


# --- evaluation -------------------------------------------------------------------------------------------------------
def evaluating(d, *extra):
    return ["--config", d / "pair.json", "--model", d / "pair/student", *extra]


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--model", ""], "argument --model: '' is empty, expected a path"),
        (["--model", NAME], "argument --model: 'nnn"),
        (["--model", "a\0b"], "holds a null byte"),
        (["--out", ""], "argument --out: '' is empty"),
        (["--out", f"{{dir}}/{NAME}"], "at most 255 bytes"),
        (["--out", "{dir}/bench.json"], "bench.json is a file, expected a folder. Set --out"),
        (["--out", "{dir}/bench.json/x"], "bench.json is a file, expected a folder. Set --out"),
        (["--out", "{dir}/a\0b"], "holds a null byte"),
        *((["--limit", text], "--limit") for text in ("0", "-3", "x", "1.5", "", "1e3", "٣", DIGITS)),
        (["--benchmark", ""], 'eval.benchmarks.0 is ""'),
        (["--benchmark", NAME], "at most 255 bytes"),
        (["--benchmark", "a\0b"], "null byte"),
        (["--benchmark", "tiny", "--benchmark", "tiny"], "names a benchmark twice"),
        ([S, "eval.benchmarks=[]"], "eval.benchmarks is []: there is nothing to evaluate"),
        (["--out", "/"], "/ is the root of the file system. Set --out"),
        (["--out", "/proc/x"], "/proc/x cannot be written (No such file or directory). Set --out"),
    ],
)
def test_evaluations_of_wrong_arguments(extra, message, setup, monkeypatch, capsys):
    arguments = evaluating(setup, *(text.replace("{dir}", str(setup)) for text in extra))
    assert message in refused(evaluate.command, arguments, setup, monkeypatch, capsys)


@pytest.mark.parametrize("name", ["evaluation.json", "summary.json", "responses.partial.jsonl"])
@pytest.mark.parametrize(
    "garbage",
    [b"", b"\xff\xff", b"[", b"[]", b"{}", b'{"bench": {}}', b"9" * 5000, DEEP.encode(), b'"\\ud800"', b"null"],
)
def test_an_evaluation_with_garbage_in_its_folder_is_made_again(name, garbage, evaluated, monkeypatch, capsys):
    folder, out = evaluated
    good = json.loads((out / "summary.json").read_text())["bench"]
    if name == "responses.partial.jsonl":
        (out / "summary.json").unlink()
    (out / name).write_bytes(garbage)
    code, _, err = outcome(evaluate.command, [str(a) for a in evaluating(folder, "--out", out)], monkeypatch, capsys)
    assert code == 0, err
    again = json.loads((out / "summary.json").read_text())["bench"]
    assert {**again, "time/evaluation": 0} == {**good, "time/evaluation": 0}
    assert not (out / "responses.partial.jsonl").exists()


@pytest.fixture
def evaluated(setup, monkeypatch, capsys):
    """(setup, the folder of an evaluation of its student)."""
    edit("bench.json", k=0)(setup)
    values = json.loads((setup / "pair.json").read_text())
    values["eval"] |= {"limit": 2, "reverse_kl": False}
    (setup / "pair.json").write_text(json.dumps(values))
    arguments = evaluating(setup, "--out", setup / "e")
    code, _, err = outcome(evaluate.command, [str(a) for a in arguments], monkeypatch, capsys)
    assert code == 0, err
    return setup, setup / "e"


# --- reports of damaged runs ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tiny_pair, tmp_path_factory):
    """A finished run of two updates, made once; tests damage copies of it."""
    folder = tmp_path_factory.mktemp("trained")
    benchmark = json.loads(Path("configs/benchmarks/tiny.json").read_text()) | {"k": 1}
    (folder / "bench.json").write_text(json.dumps(benchmark))
    settings = [
        "optim.steps=2",
        "optim.warmup_steps=0",
        "log.token_dump_every=1",
        "log.diagnostics_every=1",
        "eval.limit=4",
        f'eval.benchmarks=["{folder}/bench.json"]',
        f"output_dir={folder}",
        "rollout.prompts_per_step=4",
    ]
    tip_train.command(words(*settings))
    return folder / "tiny"


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def cut(name, keep):
    """Keeps that share of a file's bytes."""

    def change(d):
        path = d / name
        os.truncate(path, int(path.stat().st_size * keep))

    return change


def shorter_column(d):
    path = d / "tokens/step_000001.jsonl"
    first, *rest = path.read_text().splitlines()
    row = json.loads(first)
    row["reverse_kl"].pop()
    path.write_text("\n".join([json.dumps(row), *rest]) + "\n")


def without_teacher(d):
    values = json.loads((d / "summary.json").read_text())
    edit("summary.json", eval=values["eval"] | {"teacher": None})(d)


def other_columns(d):
    path = d / "tokens/step_000001.jsonl"
    first, *rest = path.read_text().splitlines()
    row = json.loads(first)
    del row["quadrant"]
    path.write_text("\n".join([json.dumps(row), *rest]) + "\n")


RUNS = {
    **{
        f"summary {text}": (write("summary.json", text), [], "summary.json: ", "the final figures of a finished run")
        for text in ("{}", "[]", '{"config": null}', "", '{"steps": "x"}', "\ufeff{}")
    },
    **{
        f"config {text}": (write("config.json", text), [], "config.json: ", "what a run was started with")
        for text in ("{}", "[]", '{"config": null}', '{"config": {}}', "")
    },
    "digits in a summary": (write("summary.json", DIGITS), [], "summary.json: ", DIGIT_FAULT),
    "a deep configuration": (write("config.json", DEEP), [], "config.json: ", DEPTH_FAULT),
    "figures of no benchmark": (
        edit("summary.json", eval={"teacher": None, "step_0": {"b": {}}, "final": None}),
        [],
        "summary.json: eval.step_0.b",
        "is missing",
    ),
    "no evaluation of the teacher": (
        without_teacher,
        [],
        "summary.json: eval.teacher has no figures of benchmark 'bench'",
        "Remove the file",
    ),
    "half a response": (
        cut("eval/step_000000/bench.jsonl", 0.9),
        ["--example"],
        "step_000000/bench.jsonl, line 8: not JSON",
        "",
    ),
    "no responses": (write("eval/step_000000/bench.jsonl", ""), ["--example"], "step_000000/bench.jsonl", "Expected"),
    "no responses of the teacher": (
        write("eval/teacher/bench.jsonl", "\n"),
        ["--example"],
        "teacher/bench.jsonl: nothing is in it",
        "Expected",
    ),
    "responses to other problems": (
        write(
            "eval/teacher/bench.jsonl",
            json.dumps(
                {
                    "id": "other",
                    "sample": -1,
                    "prompt": "q",
                    "response": "r",
                    "extracted": "x",
                    "vote": "x",
                    "answer": "x",
                    "correct": True,
                    "finish_reason": "stop",
                    "tokens": 5,
                }
            ),
        ),
        ["--example"],
        "step-0 student and teacher have not answered the same problems of bench",
        "",
    ),
    "responses of another shape": (
        write("eval/teacher/bench.jsonl", "{}\n"),
        ["--example"],
        "teacher/bench.jsonl, line 1: id is missing",
        "Expected",
    ),
    "responses that are a folder": (
        lambda d: ((d / "eval/teacher/bench.jsonl").unlink(), (d / "eval/teacher/bench.jsonl").mkdir()),
        ["--example"],
        "teacher/bench.jsonl: cannot be read (Is a directory)",
        "Expected",
    ),
    "half a line of metrics": (cut("metrics.jsonl", 0.9), ["--out", "{dir}/o"], "metrics.jsonl, line 2: not JSON", ""),
    "metrics of another shape": (
        write("metrics.jsonl", '{"step": 1}\n'),
        ["--out", "{dir}/o"],
        "metrics.jsonl, line 1",
        "Expected",
    ),
    "a metric that is no number": (
        replaced("metrics.jsonl", '"loss/divergence": ', '"loss/divergence": null, "x": '),
        ["--out", "{dir}/o"],
        "metrics.jsonl, line 1: loss/divergence",
        "Expected a number",
    ),
    "no metrics": (
        lambda d: (d / "metrics.jsonl").unlink(),
        ["--out", "{dir}/o"],
        "metrics.jsonl: cannot be read",
        "Expected",
    ),
    "half a line of a dump": (
        cut("tokens/step_000001.jsonl", 0.9),
        ["--out", "{dir}/o"],
        "tokens/step_000001.jsonl, line 4: not JSON",
        "",
    ),
    "a shorter column of a dump": (
        shorter_column,
        ["--out", "{dir}/o"],
        "step_000001.jsonl, line 1: reverse_kl is not as long as token_ids",
        "Expected",
    ),
    "a dump without a column": (
        other_columns,
        ["--out", "{dir}/o"],
        "step_000001.jsonl, line 2: it has other columns than the first line",
        "Expected",
    ),
    "garbage in an evaluation": (
        write("eval/step_000002/summary.json", "[]"),
        ["--out", "{dir}/o"],
        "step_000002/summary.json: list, expected the figures of an evaluation",
        "",
    ),
    "out that is a file": (
        nothing,
        ["--out", "{dir}/run/summary.json"],
        "summary.json is a file, expected a folder. Set --out",
        "",
    ),
    "out below a file": (
        nothing,
        ["--out", "{dir}/run/summary.json/x"],
        "summary.json is a file, expected a folder. Set --out",
        "",
    ),
    "an endless out": (nothing, ["--out", f"{{dir}}/{NAME}"], "--out", "at most 255 bytes"),
    "an endless run": (nothing, [f"{{dir}}/{NAME}"], "RUN", "at most 255 bytes"),
    "a run that is a file": (
        nothing,
        ["{dir}/run/summary.json"],
        "summary.json/config.json: cannot be read (Not a directory)",
        "Expected",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_reports_of_damaged_runs(name, run, monkeypatch, capsys):
    change, extra, *wanted = RUNS[name]
    change(run)
    arguments = [run, *(text.replace("{dir}", str(run.parent)) for text in extra)]
    message = refused(report.command, arguments, run.parent, monkeypatch, capsys)
    for text in wanted:
        assert text in message, message


@pytest.mark.parametrize("arguments", [[], ["--example"], ["--example", "--out", "{dir}/o"]])
def test_a_report_of_a_whole_run_works(arguments, run, monkeypatch, capsys):
    arguments = [text.replace("{dir}", str(run.parent)) for text in arguments]
    code, out, err = outcome(report.command, [str(run), *arguments], monkeypatch, capsys)
    assert code == 0 and "Accuracy in % over" in out and "problems of bench" in out, err


def test_metrics_with_lines_missing_still_make_a_report(run, monkeypatch, capsys):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[1] + "\n")
    code, _, err = outcome(report.command, [str(run), "--out", str(run.parent / "o")], monkeypatch, capsys)
    assert code == 0 and (run.parent / "o/report.html").exists(), err


@pytest.mark.parametrize("a", [NAME, "", "a\0b"])
def test_a_comparison_of_no_paths(a, tmp_path, monkeypatch, capsys):
    assert "argument RUN" in refused(compare.command, [a, tmp_path], tmp_path, monkeypatch, capsys)


# --- analysis and tables ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "extra, message",
    [
        (["--out", "{dir}/bench.json"], "bench.json is a file, expected a folder. Set --out"),
        (["--out", f"{{dir}}/{NAME}"], "at most 255 bytes"),
        (["--prompts", "0"], "argument --prompts: got '0', expected a whole number from 1"),
        (["--prompts", "x"], "--prompts"),
        (["--prompts", DIGITS], "--prompts"),
        (["--prompts", "1000000000"], "expected at most half"),
        (["--oracle-tokens", "-1"], "argument --oracle-tokens: got '-1', expected a whole number from 0"),
        ([S, "output_dir={dir}/bench.json"], "bench.json is a file, expected a folder"),
    ],
)
def test_analyses_of_wrong_arguments(extra, message, setup, monkeypatch, capsys):
    arguments = ["--config", setup / "pair.json", *(text.replace("{dir}", str(setup)) for text in extra)]
    assert message in refused(analyze.command, arguments, setup, monkeypatch, capsys)


@pytest.mark.parametrize(
    "extra, message",
    [
        ([S, "output_dir={dir}/bench.json"], "bench.json is a file, expected a folder. Set output_dir"),
        *((["--seeds", text], "--seeds: ") for text in (*SEEDS, "1,,2", "0,", ",", "0 1", "0,2147483648")),
        (["--seeds", "1,1"], "expected different seeds"),
        *((["--only-seed", text], "argument --only-seed: ") for text in SEEDS),
        (["--jobs", "0"], "argument --jobs: got '0', expected a whole number from 1"),
        (["--jobs", DIGITS], "--jobs"),
        (["--table", NAME], "there is no table 'nnn"),
        (["--table", ""], "there is no table ''"),
        (["--table", "../tables/table5"], "there is no table"),
        (["--table", "٣"], "there is no table"),
        (["--table", "a\0b"], "there is no table"),
        (["--arms", NAME], "has no arm"),
        ([S, "seed=1"], "the arms and seeds of a table set seed"),
    ],
)
def test_tables_of_wrong_arguments(extra, message, setup, monkeypatch, capsys):
    table = [] if "--table" in extra else ["--table", "5"]
    arguments = ["--config", setup / "pair.json", *table, *(text.replace("{dir}", str(setup)) for text in extra)]
    assert message in refused(reproduce.command, arguments, setup, monkeypatch, capsys)


# --- data -------------------------------------------------------------------------------------------------------------
ROW = '{"problem": "P", "answer": "5", "unique_id": "u", "question": "Q"}'
SOURCES = {
    "digits": (ROW.replace('"5"', DIGITS), "line 1: " + DIGIT_FAULT),
    "deep": (ROW.replace('"P"', DEEP), DEPTH_FAULT),
    "bottomless": ('{"problem": ' + BOTTOMLESS, DEPTH_FAULT),
    "half a character": (ROW.replace("P", HALF), HALF_FAULT),
    "half a character in an id": (ROW.replace('"u"', f'"{HALF}"'), HALF_FAULT),
    "UTF-16": (ROW.encode("utf-16"), "not UTF-8 text (byte 0)"),
    "a list": ("[1]", "this is a JSON list, and a JSONL file holds one object per line. Let its name end in .json"),
    "no object": ("1", "line 1: int, expected a JSON object"),
    "nothing": ("", "no problems in it"),
    "no JSON": ("{", "not JSON"),
    "no field": ("{}", "no field"),
    "an answer that is no text": (ROW.replace('"5"', "[5]"), "field 'answer' is"),
    "a problem that is no text": (ROW.replace('"P"', "null"), "field 'problem' is"),
}


LISTS = {
    "digits in a list": ("[" + ROW.replace('"5"', DIGITS) + "]", DIGIT_FAULT),
    "a deep list": ("[" + ROW.replace('"P"', DEEP) + "]", DEPTH_FAULT),
    "half a character in a list": ("[" + ROW.replace("P", HALF) + "]", HALF_FAULT),
    "an object": (ROW, "the object in it has no list"),
    "an empty list": ("[]", "no problems in it"),
    "an empty file": ("", "not JSON"),
}


@pytest.mark.parametrize("name", [*SOURCES, *LISTS])
def test_sources_that_hold_no_problems(name, tmp_path, monkeypatch, capsys):
    content, message = (SOURCES | LISTS)[name]
    source = tmp_path / ("source.json" if name in LISTS else "source.jsonl")
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ["math500", "--source", source, "--out", tmp_path / "o"]
    found = refused(prepare.command, arguments, tmp_path, monkeypatch, capsys)
    assert message in found and str(source) in found


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--source", "{dir}"], "bad.parquet: cannot be read"),
        (["--source", "{dir}/none.jsonl"], "cannot be read (No such file or directory)"),
        (["--source", "{dir}/bad.parquet"], "bad.parquet: cannot be read"),
        (["--source", "/dev/zero"], "/dev/zero: is a device"),
        (["--source", ""], "argument --source: '' is empty, expected a path"),
        (["--source", NAME], "at most 255 bytes"),
        (["--source", "a\0b"], "holds a null byte"),
        (["--out", "{dir}/good.jsonl"], "good.jsonl is a file, expected a folder. Set --out"),
        (["--out", f"{{dir}}/{NAME}"], "at most 255 bytes"),
        *((["--seed", text], "argument --split-seed/--seed: ") for text in SEEDS),
    ],
)
def test_preparations_of_wrong_arguments(extra, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "good.jsonl").write_text(ROW)
    (tmp_path / "bad.parquet").write_text(ROW)
    arguments = ["math500", "--source", tmp_path / "good.jsonl", "--out", tmp_path / "o"]
    arguments += [text.replace("{dir}", str(tmp_path)) for text in extra]
    assert message in refused(prepare.command, arguments, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("out", [".", "/", "{dir}", "{dir}/device"])
def test_overlaps_are_written_to_a_file(out, tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "device")
    (tmp_path / "a.jsonl").write_text(ROW)
    arguments = [
        tmp_path / "a.jsonl",
        tmp_path / "a.jsonl",
        "--field",
        "problem",
        "--out",
        out.replace("{dir}", str(tmp_path)),
    ]
    assert "it is a folder or a device, expected a file" in refused(
        contamination.command, arguments, tmp_path, monkeypatch, capsys
    )


@pytest.mark.parametrize("name, value", [("NUM_GPUS", "²"), ("NUM_GPUS", DIGITS), ("NNODES", "0"), ("NNODES", "x")])
def test_numbers_of_processes_that_are_none(name, value, setup, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    arguments = ["tip.train", "--config", setup / "pair.json", S, "engine.kind=deepspeed", S, "engine.deepspeed=zero2"]
    message = refused(launch.command, arguments, setup, monkeypatch, capsys)
    assert f"{name} is '" in message and "expected a whole number from 1" in message


@pytest.mark.parametrize(
    "extra, message",
    [
        *((["--seed", text], "argument --seed: ") for text in SEEDS),
        (["--out", "{dir}/file"], "file is a file, expected a folder. Set --out"),
        (["--out", f"{{dir}}/{NAME}"], "at most 255 bytes"),
        (["--out", "{dir}/full"], "it exists and holds no embedded pair"),
        (["--task", "x"], "invalid choice"),
    ],
)
def test_embedded_pairs_of_wrong_arguments(extra, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    arguments = ["--out", tmp_path / "o", *(text.replace("{dir}", str(tmp_path)) for text in extra)]
    assert message in refused(build.command, arguments, tmp_path, monkeypatch, capsys)


# --- what nobody expected ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("division by zero\nand more"),
        KeyError("\ud800"),
        ValueError(),
        MemoryError(),
        RecursionError("x" * 10_000),
        OSError(errno.EIO, "Input/output error"),
    ],
)
def test_an_unexpected_exception_is_one_line_with_the_path_of_its_traceback(error, setup, monkeypatch, capsys):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(tempfile, "tempdir", str(setup))
    monkeypatch.setattr(opd_train, "run", fail)
    code, out, err = outcome(opd_train.command, ["--config", str(setup / "pair.json")], monkeypatch, capsys)
    (path,) = setup.glob("opd-traceback-*.txt")
    assert code == 1 and out == "" and "Traceback" not in err
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 700 and str(path) in err
    assert "Traceback (most recent call last)" in path.read_text() and "in fail" in path.read_text()


def test_a_full_temporary_directory_does_not_make_it_worse(setup, monkeypatch, capsys):
    def fail(*arguments):
        raise ZeroDivisionError("division by zero")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(opd_train, "run", fail)
    monkeypatch.setattr(cli.tempfile, "mkstemp", full)
    code, out, err = outcome(opd_train.command, ["--config", str(setup / "pair.json")], monkeypatch, capsys)
    assert code == 1 and out == "" and "Traceback" not in err and err.count("\n") == 1
    assert err.startswith("error: ZeroDivisionError: division by zero") and "No space left on device" in err


@pytest.mark.parametrize(
    "name, value",
    [
        ("LOCAL_RANK", "abc"),
        *((name, text) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE") for text in ("²", "-1", "", DIGITS)),
    ],
)
def test_variables_of_a_launcher_that_are_no_numbers(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        cli.main(lambda arguments: pytest.fail("the command was started"))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.startswith(f"error: the environment variable {name} is '{value[:80]}'")
