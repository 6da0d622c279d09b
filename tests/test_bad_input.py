"""Wrong input: one clear message on stderr, exit code 2, no traceback, and a disk as it was.

A case is (what is broken in a copy of a working setup, what is added to the command line, what the message must say).
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opd import cli, evaluate, grading
from opd import train as opd_train
from opd.files import sha256
from opd.teacher.local import LocalTeacher
from tip import report
from tip import train as tip_train

COMMANDS = {"tip": tip_train.command, "opd": opd_train.command, "evaluate": evaluate.command, "report": report.command}


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def outcome(command, arguments, monkeypatch, capsys):
    """(exit code, stdout, stderr) of a command run in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    code = 0
    try:
        cli.main(command)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- what can be broken -----------------------------------------------------------------------------------------------
def nothing(d):
    pass


def edit(name, **changes):
    """Changes keys of a JSON file; None as a value of `drop` removes them."""

    def change(d):
        path = d / name
        values = json.loads(path.read_text())
        for key in changes.pop("drop", ()):
            values.pop(key, None)
        path.write_text(json.dumps(values | changes))

    return change


def write(name, text):
    def change(d):
        (d / name).write_text(text) if isinstance(text, str) else (d / name).write_bytes(text)

    return change


def remove(name):
    def change(d):
        shutil.rmtree(d / name) if (d / name).is_dir() else (d / name).unlink()

    return change


def pickled(d):
    os.rename(d / "pair/student/model.safetensors", d / "pair/student/pytorch_model.bin")


def other_tokenizer(d):
    path = d / "pair/teacher/tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["+"], vocabulary["-"] = vocabulary["-"], vocabulary["+"]
    path.write_text(json.dumps(values))


def without_template(d):
    for path in (d / "pair/student").glob("*template*"):
        path.unlink()
    edit("pair/student/tokenizer_config.json", drop=("chat_template",))(d)


def remote_code(d):
    edit("pair/student/config.json", model_type="my_model", auto_map={"AutoModelForCausalLM": "mine.My"})(d)
    (d / "pair/student/mine.py").write_text("raise SystemExit('remote code ran')")


def truncated_weights(d):
    os.truncate(d / "pair/student/model.safetensors", 1000)


def without_eos(d):
    edit("pair/student/tokenizer_config.json", eos_token=None)(d)
    edit("pair/student/config.json", eos_token_id=None)(d)
    (d / "pair/student/generation_config.json").write_text("{}")


def finished_run(d):
    (d / "out/tiny").mkdir(parents=True)
    config = json.loads((d / "pair.json").read_text())
    del config["$schema"]
    benchmarks = {"bench": json.loads((d / "bench.json").read_text())}
    del benchmarks["bench"]["$schema"]
    files = {path: sha256(Path(path)) for path in (*config["data"]["train"], benchmarks["bench"]["file"])}
    record = {
        "config": config,
        "benchmarks": benchmarks,
        "grader": grading.VERSION,
        "files": files,
        "weighter": "opd.hooks.UniformWeighter",
        "weighter_settings": {},
    }
    (d / "out/tiny/config.json").write_text(json.dumps(record))


def foreign_folder(d):
    (d / "out/tiny").mkdir(parents=True)
    (d / "out/tiny/thesis.tex").write_text("")


def run_is_a_file(d):
    (d / "out").mkdir()
    (d / "out/tiny").write_text("")


def output_is_a_file(d):
    (d / "out").write_text("")


def long_problems(d):
    text = "".join(json.dumps({"problem": "1+2" * 60 + " mod10?", "answer": "1"}) + "\n" for _ in range(3))
    (d / "pair/train.jsonl").write_text(text)


def few_problems(d):
    path = d / "pair/train.jsonl"
    path.write_text("".join(text + "\n" for text in path.read_text().splitlines()[:3]))


def line(text):
    return write("pair/train.jsonl", '{"problem": "1+1+1+1+1 mod10?", "answer": "5"}\n' + text + "\n")


def twice(d):
    path = d / "pair/test.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n" + path.read_text())


S = ["--set"]
CASES = {
    # keys and values
    "unknown key": (nothing, "tip", [*S, "optim.learning_rate=1"], r"optim.learning_rate is not a known key"),
    "unknown key, near": (nothing, "tip", [*S, "rollout.temprature=1"], "Did you mean rollout.temperature"),
    "unknown section": (nothing, "tip", [*S, "optimizer.lr=1"], "optimizer is not a known key. Did you mean optim"),
    "key without its section": (nothing, "tip", [*S, "retention=0.5"], "retention is not a known key"),
    "unknown tip key": (nothing, "tip", [*S, "tip.rho=0.5"], "tip: rho is not a known key"),
    "missing key": (edit("pair.json", drop=("seed",)), "tip", [], "seed is missing. Every key must be there"),
    "missing section": (edit("pair.json", drop=("loss",)), "tip", [], "loss is missing"),
    "wrong type": (
        nothing,
        "tip",
        [*S, "optim.lr=high"],
        'optim.lr is "high". Expected: input should be a valid number',
    ),
    "float for int": (nothing, "tip", [*S, "rollout.n=1.5"], "rollout.n is 1.5. Expected"),
    "bool for int": (nothing, "tip", [*S, "seed=true"], "seed is true. Expected"),
    "string for list": (nothing, "tip", [*S, "eval.benchmarks=tiny"], 'eval.benchmarks is "tiny"'),
    "null for number": (nothing, "tip", [*S, "optim.lr=null"], "optim.lr is null"),
    "not a number": (
        nothing,
        "tip",
        [*S, "optim.lr=NaN"],
        "optim.lr is NaN. Expected: input should be a finite number",
    ),
    "unknown choice": (
        nothing,
        "tip",
        [*S, "loss.divergence=kl"],
        "'reverse_kl', 'forward_kl', 'jsd' or 'total_variation'",
    ),
    "unknown rule": (nothing, "tip", [*S, "tip.rule=best"], 'rule is "best". Expected: one of all, random'),
    "engine of later": (nothing, "tip", [*S, "rollout.engine=sglang"], 'rollout.engine is "sglang". Expected'),
    "negative rate": (nothing, "tip", [*S, "optim.lr=-1"], "optim.lr is -1. Expected: input should be greater than 0"),
    "beta 0": (nothing, "tip", [*S, "loss.jsd_beta=0"], "loss.jsd_beta is 0. Expected: input should be greater than 0"),
    "beta 1": (nothing, "tip", [*S, "loss.jsd_beta=1"], "loss.jsd_beta is 1. Expected: input should be less than 1"),
    "retention 0": (nothing, "tip", [*S, "tip.retention=0"], "retention is 0. Expected"),
    "retention 50": (
        nothing,
        "tip",
        [*S, "tip.retention=50"],
        "retention is 50. Expected: input should be less than or equal",
    ),
    "top_p 0": (nothing, "tip", [*S, "rollout.top_p=0"], "rollout.top_p is 0"),
    "quantile 98": (nothing, "tip", [*S, "tip.entropy_clip_quantile=98"], "entropy_clip_quantile is 98"),
    "adam beta 1": (nothing, "tip", [*S, "optim.betas=[0.9,1]"], "optim.betas.1 is 1"),
    "run name with a slash": (nothing, "tip", [*S, "run_name=a/b"], 'run_name is "a/b". Expected'),
    "empty path": (nothing, "tip", [*S, "student.path="], 'student.path is "". Expected'),
    "greedy repeated": (
        nothing,
        "tip",
        [*S, "rollout.temperature=0", *S, "rollout.n=4"],
        "rollout.temperature is 0 and rollout.n is 4",
    ),
    "steps and epochs": (nothing, "tip", [*S, "data.epochs=1"], "optim.steps is 60 and data.epochs is 1: give one"),
    "neither steps nor epochs": (nothing, "tip", [*S, "optim.steps=null"], "give one, set the other to null"),
    "warm-up beyond the end": (nothing, "tip", [*S, "optim.warmup_steps=99"], "optim.warmup_steps is 99, not below"),
    "a launcher of many processes": (lambda d: os.environ.update(WORLD_SIZE="2"), "tip", [], "trains in one process"),
    "cuda without a GPU": (nothing, "tip", [*S, "engine.device=cuda"], "engine.device is 'cuda' and torch sees no GPU"),
    # the command line
    "no config": (nothing, "tip", ["NO CONFIG"], "required: --config"),
    "set without a value": (nothing, "tip", [*S, "seed"], "--set 'seed': expected KEY=VALUE"),
    "set into a value": (nothing, "tip", [*S, "seed.x=1"], "'seed' is a value, not a section"),
    "unknown argument": (nothing, "tip", ["--lr", "1"], "unrecognized arguments: --lr 1"),
    "plain training of a selection": (
        nothing,
        "opd",
        [*S, "tip.rule=soft_or"],
        "section 'tip' belongs to an extension",
    ),
    "resume from nowhere": (nothing, "tip", ["--resume", "x"], "has no run to continue"),
    "resume from what is no checkpoint": (
        finished_run,
        "opd",
        ["--resume", "x"],
        "--resume x: x does not stand in {dir}/out/tiny/checkpoints",
    ),
    "resume none onto a run": (finished_run, "opd", ["--resume", "none"], "--resume none starts a new run"),
    # files
    "config that is not JSON": (
        write("pair.json", "{'a': 1}"),
        "tip",
        [],
        "pair.json: not JSON (Expecting property name enclosed in double quotes, column 2)",
    ),
    "config that is not an object": (write("pair.json", "[]"), "tip", [], "the file is list, expected an object"),
    "config that is not text": (write("pair.json", b"\xff\xfe\x00"), "tip", [], "pair.json: not UTF-8 text (byte 0)"),
    "config with a key twice": (write("pair.json", '{"seed": 1, "seed": 2}'), "tip", [], "key 'seed' stands twice"),
    "answer that is null": (
        line('{"problem": "1", "answer": null}'),
        "tip",
        [],
        "line 2: field 'answer' is null, expected",
    ),
    "answer that is no number": (
        line('{"problem": "1", "answer": NaN}'),
        "tip",
        [],
        "field 'answer' is NaN, expected a string or a number",
    ),
    "answer that is a list": (
        line('{"problem": "1", "answer": [1]}'),
        "tip",
        [],
        "field 'answer' is [1], expected a string or a number",
    ),
    "warm-up beyond one epoch": (
        nothing,
        "tip",
        [*S, "optim.steps=null", *S, "data.epochs=1", *S, "optim.warmup_steps=300"],
        "optim.warmup_steps is 300, not below the run's 256 steps",
    ),
    "missing config": (remove("pair.json"), "tip", [], "pair.json: no such file"),
    "no data file": (nothing, "tip", [*S, "data.train=[]"], "data.train is []"),
    "one file for a list": (nothing, "tip", [*S, "data.train=x.jsonl"], 'data.train is "x.jsonl"'),
    "all prompts held out": (nothing, "tip", [*S, "data.validation=8192"], "data.validation is 8192 of 8192 prompts"),
    "validation without answers": (
        nothing,
        "tip",
        [*S, "data.validation=5", *S, "data.answer_field=null"],
        "nothing to validate",
    ),
    "missing data": (remove("pair/train.jsonl"), "tip", [], "train.jsonl: cannot be read"),
    "empty data": (write("pair/train.jsonl", "\n\n"), "tip", [], "train.jsonl: no problems in it"),
    "data that is not JSON": (line("{oops}"), "tip", [], r"train.jsonl, line 2: not JSON"),
    "data line that is no object": (line("[1]"), "tip", [], "line 2: list, expected a JSON object"),
    "data without the field": (line('{"question": "1"}'), "tip", [], "line 2: no field 'problem'; it has ['question']"),
    "data without the answer": (line('{"problem": "1"}'), "tip", [], "line 2: no field 'answer'"),
    "data with an empty prompt": (line('{"problem": " ", "answer": "1"}'), "tip", [], "field 'problem' is \" \""),
    "data with a number": (
        line('{"problem": 3, "answer": "1"}'),
        "tip",
        [],
        "field 'problem' is 3, expected a non-empty",
    ),
    "data with bad messages": (
        line('{"problem": [{"role": "user"}], "answer": "1"}'),
        "tip",
        [],
        "train.jsonl, line 2: field 'problem', message 1 has the content null, expected a text",
    ),
    "data that is not text": (
        write("pair/train.jsonl", b"\xff\xff\n"),
        "tip",
        [],
        "train.jsonl: not UTF-8 text (byte 0)",
    ),
    "all prompts too long": (long_problems, "tip", [], "all 3 prompts are longer than data.max_prompt_tokens = 24"),
    "fewer prompts than a step in one epoch": (
        few_problems,
        "tip",
        [*S, "optim.steps=null", *S, "data.epochs=1"],
        "3 prompts x 1 epochs are fewer than rollout.prompts_per_step = 32",
    ),
    "missing benchmark": (nothing, "tip", [*S, 'eval.benchmarks=["math5000"]'], "no benchmark 'math5000'; there are ["),
    "benchmark with an unknown key": (edit("bench.json", shots=3), "tip", [], "bench.json: shots is not a known key"),
    "benchmark without problems": (remove("pair/test.jsonl"), "tip", [], "test.jsonl: cannot be read"),
    "benchmark with an id twice": (twice, "tip", [*S, "eval.limit=null"], "the id 'test-0' stands twice"),
    # models
    "missing student": (remove("pair/student"), "tip", [], "student.path '{dir}/pair/student': no such folder"),
    "missing teacher": (remove("pair/teacher"), "tip", [], "teacher.path '{dir}/pair/teacher': no such folder"),
    "student without config.json": (remove("pair/student/config.json"), "tip", [], "the folder has no config.json"),
    "servers without vLLM": (
        nothing,
        "tip",
        [*S, 'rollout.servers=["10.0.0.2:8500"]'],
        "servers and tensor_parallel are vLLM's",
    ),
    "tensor parallel without vLLM": (
        nothing,
        "tip",
        [*S, "rollout.tensor_parallel=2"],
        "servers and tensor_parallel are vLLM's",
    ),
    "a server without a port": (
        nothing,
        "tip",
        [*S, "rollout.engine=vllm", *S, 'rollout.servers=["10.0.0.2"]'],
        "'10.0.0.2' is no address of a server, expected HOST:PORT",
    ),
    "a server twice": (
        nothing,
        "tip",
        [*S, "rollout.engine=vllm", *S, 'rollout.servers=["a:1", "a:1"]'],
        "rollout.servers names a server twice",
    ),
    "two phases beside DeepSpeed": (
        nothing,
        "tip",
        [*S, "engine.phases=2", *S, "engine.kind=deepspeed", *S, "engine.deepspeed=zero2"],
        "engine.phases is 2 and engine.kind is 'deepspeed'",
    ),
    "three phases": (nothing, "tip", [*S, "engine.phases=3"], "engine.phases is 3"),
    "servers without their key": (
        nothing,
        "tip",
        [*S, "rollout.engine=vllm", *S, 'rollout.servers=["10.0.0.2:8500"]'],
        "rollout.servers is set and OPD_VLLM_KEY is not",
    ),
    "student without weights": (remove("pair/student/model.safetensors"), "tip", [], "no safetensors weights"),
    "pickle weights": (
        pickled,
        "tip",
        [],
        "only pytorch_model.bin, a pickle, which can run code when read and is refused",
    ),
    "weights cut off": (truncated_weights, "tip", [], "does not load as a causal language model"),
    "config.json that is not JSON": (write("pair/student/config.json", "{"), "tip", [], "does not load as a causal"),
    "unknown architecture": (
        edit("pair/student/config.json", model_type="nonesuch"),
        "tip",
        [],
        "does not load as a causal",
    ),
    "remote code": (remote_code, "tip", [], "does not load as a causal"),
    "weights of another size": (
        edit("pair/student/config.json", hidden_size=128),
        "tip",
        [],
        "does not load as a causal",
    ),
    "weights of fewer layers": (
        edit("pair/student/config.json", num_hidden_layers=3),
        "tip",
        [],
        "does not load as a causal",
    ),
    "dropout": (
        edit("pair/student/config.json", attention_dropout=0.1),
        "tip",
        [],
        "attention_dropout = 0.1, expected 0",
    ),
    "missing tokenizer": (remove("pair/student/tokenizer.json"), "tip", [], "does not load as a causal language model"),
    "no chat template": (without_template, "tip", [], "the tokenizer has no chat template"),
    "tokenizers that differ": (other_tokenizer, "tip", [], r"student and teacher tokenizers differ: id"),
    "a chat template that refuses": (
        write("pair/student/chat_template.jinja", "{{ raise_exception('no system') }}"),
        "tip",
        [],
        "the chat template refuses it (no system)",
    ),
    "context too short": (
        nothing,
        "tip",
        [*S, "rollout.max_response_tokens=120"],
        "prompt has 19 tokens and rollout.max_response_tokens is 120: together 139, more than the student's context of "
        "128",
    ),
    "benchmark beyond the context": (
        edit("bench.json", max_response_tokens=500),
        "tip",
        [],
        "of benchmark bench is 500",
    ),
    # folders
    "run of another configuration": (
        finished_run,
        "opd",
        [*S, "optim.lr=1"],
        "differs in optim.lr (there 0.0003, here 1.0)",
    ),
    "a selection onto a baseline": (finished_run, "tip", [], "holds a run of another configuration; it differs in tip"),
    "a folder that is not a run": (foreign_folder, "tip", [], "exists and is not a run folder"),
    "a run folder that is a file": (run_is_a_file, "tip", [], "out/tiny is a file, expected a folder"),
    "an output folder that is a file": (
        output_is_a_file,
        "tip",
        [],
        "{dir}/out is a file, expected a folder. Set output_dir",
    ),
    # the other commands
    "evaluation of nothing": (nothing, "evaluate", ["--model", "{dir}/none"], "no such folder"),
    "evaluation without a model": (nothing, "evaluate", [], "required: --model"),
    "evaluation of zero problems": (
        nothing,
        "evaluate",
        ["--model", "{dir}/pair/student", "--limit", "0"],
        "argument --limit: got '0', expected a whole number from 1",
    ),
    "evaluation beyond the context": (
        edit("bench.json", max_response_tokens=500),
        "evaluate",
        ["--model", "{dir}/pair/student"],
        "max_response_tokens of benchmark bench is 500: together 519",
    ),
    "evaluation on an unknown benchmark": (
        nothing,
        "evaluate",
        ["--model", "{dir}/pair/student", "--benchmark", "x"],
        "no benchmark 'x'",
    ),
    "report of what is no run": (
        nothing,
        "report",
        ["REPORT", "{dir}/pair"],
        "pair/config.json: cannot be read (No such file or directory). Expected what a run was started with",
    ),
    "dry run without a model": (remove("pair/student"), "tip", ["--dry-run"], "no such folder"),
    "dry run of a broken config": (
        write("pair/student/config.json", "{"),
        "tip",
        ["--dry-run"],
        "is not a valid JSON file",
    ),
}


def test_there_are_enough_of_them():
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, setup, monkeypatch, capsys):
    change, command, extra, message = CASES[name]
    monkeypatch.setenv("WORLD_SIZE", "1")  # so that it is restored after the case that sets it
    change(setup)
    extra = [text.replace("{dir}", str(setup)) for text in extra]
    alone = extra[:1] in (["NO CONFIG"], ["REPORT"])
    arguments = extra[1:] if alone else ["--config", str(setup / "pair.json"), *extra]
    before = snapshot(setup)
    code, out, err = outcome(COMMANDS[command], arguments, monkeypatch, capsys)
    assert code == 2, err
    assert message.replace("{dir}", str(setup)) in err, err
    faults = [text for text in err.splitlines() if text.startswith("error: ")]
    assert len(faults) == 1 and "Traceback" not in err and out == ""
    assert snapshot(setup) == before


def test_a_working_setup_works(setup, monkeypatch, capsys):
    arguments = ["--config", str(setup / "pair.json"), "--set", "optim.steps=1", "--set", "optim.warmup_steps=0"]
    code, out, err = outcome(tip_train.command, arguments, monkeypatch, capsys)
    assert code == 0 and out == f"{setup}/out/tiny\n", err


def test_some_long_prompts_are_dropped_and_counted(setup, monkeypatch, capsys):
    path = setup / "pair/train.jsonl"
    path.write_text(path.read_text() + json.dumps({"problem": "1+2" * 40, "answer": "1"}) + "\n")
    arguments = ["--config", str(setup / "pair.json"), "--set", "optim.steps=1", "--set", "optim.warmup_steps=0"]
    code, _, err = outcome(tip_train.command, arguments, monkeypatch, capsys)
    assert code == 0 and "1 of 8193 prompts dropped, longer than 24 tokens" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(setup, monkeypatch, capsys):
    (setup / "out").mkdir(mode=0o500)
    code, _, err = outcome(tip_train.command, ["--config", str(setup / "pair.json")], monkeypatch, capsys)
    assert code == 2 and "cannot be written (Permission denied)" in err


def test_no_permission_as_told_by_the_system(setup, monkeypatch, capsys):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    before = snapshot(setup)
    monkeypatch.setattr(Path, "mkdir", refuse)
    code, _, err = outcome(tip_train.command, ["--config", str(setup / "pair.json")], monkeypatch, capsys)
    assert code == 2 and re.search(r"out/tiny cannot be written \(Permission denied\). Set output_dir", err)
    assert snapshot(setup) == before


def test_the_message_of_a_real_process(setup):
    result = subprocess.run(
        [sys.executable, "-m", "tip.train", "--config", str(setup / "pair.json"), "--set", "optim.lrr=1"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == f"error: {setup}/pair.json: optim.lrr is not a known key. Did you mean optim.lr?\n"


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_rollouts(setup, monkeypatch, capsys):
    """The teacher overflows on one rollout of step 5."""
    original, calls = LocalTeacher.hidden_states, []

    def overflow(teacher, batches, *rest):
        found = original(teacher, batches, *rest)
        calls.append(1)
        if len(calls) >= 5:
            for batch, states in zip(batches, found, strict=True):
                states[batch.sequence_id == 7] = float("inf")
        return found

    monkeypatch.setattr(LocalTeacher, "hidden_states", overflow)
    arguments = [
        "--config",
        str(setup / "pair.json"),
        "--set",
        "checkpoint.every=2",
        "--set",
        "eval.every=0",
        "--set",
        "eval.reverse_kl=false",
        "--set",
        "tip.rule=all",
    ]
    code, _, err = outcome(tip_train.command, arguments, monkeypatch, capsys)
    assert code == 1 and "Traceback" not in err
    dump = setup / "out/tiny/not_finite_step_000005.jsonl"
    message = err[err.index("error: ") :]
    assert (
        "step 5: the loss is nan; rollouts [7] have statistics that are not finite" in message and str(dump) in message
    )
    assert "The newest checkpoint is" in message and "step_000004" in message
    records = [json.loads(text) for text in dump.read_text().splitlines()]
    assert (
        [r["sequence_id"] for r in records if not r["finite"]] == [7]
        and len(records) == 32
        and records[7]["response_ids"]
    )


def test_a_student_that_is_not_finite_ends_the_run(setup, monkeypatch, capsys):
    original, calls = torch.optim.AdamW.step, []

    def poison(self, *args, **kwargs):
        original(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 4:
            self.param_groups[1]["params"][0].data[0] = float("nan")

    monkeypatch.setattr(torch.optim.AdamW, "step", poison)
    arguments = ["--config", str(setup / "pair.json"), *S, "checkpoint.every=3"]
    code, _, err = outcome(tip_train.command, arguments, monkeypatch, capsys)
    assert code == 1 and "Traceback" not in err
    assert (
        "error: after step 4: the model's logits are not finite. The newest checkpoint is" in err
        and "step_000003" in err
    )


def test_a_gradient_that_is_not_finite_leaves_weights_and_moments_alone(setup, monkeypatch, capsys):
    saved = {}

    def infinite(parameters, limit):
        saved["weights"] = [p.detach().clone() for p in parameters]
        return torch.tensor(float("inf"))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", infinite)
    code, _, err = outcome(tip_train.command, ["--config", str(setup / "pair.json")], monkeypatch, capsys)
    assert code == 1 and "step 1: the norm of the gradient is inf; every rollout's statistics are finite" in err
    assert "There is no checkpoint yet" in err and len(saved["weights"]) > 5
