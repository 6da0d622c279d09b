"""Runs of two processes from the command line: the same gains, killed and continued, evaluated, stopped, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SMALL = [
    "eval.limit=24",
    "eval.k=1",
    "checkpoint.every=2",
    "optim.steps=6",
    "optim.warmup_steps=0",
    "log.token_dump_every=3",
    "log.diagnostics_every=2",
    "rollout.prompts_per_step=9",
    "optim.micro_batch_tokens=150",
]


def start(module, output_dir, name, *settings, processes=2, options=(), deepspeed="zero2", **environment):
    engine = ["engine.kind=deepspeed", f"engine.deepspeed={deepspeed}"] if deepspeed else []
    chosen = [*engine, f"output_dir={output_dir}", f"run_name={name}", *settings]
    command = [
        sys.executable,
        "-m",
        "opd.launch",
        module,
        "--config",
        "configs/tiny.json",
        *options,
        *(x for s in chosen for x in ("--set", s)),
    ]
    environment = os.environ | {"NUM_GPUS": str(processes)} | environment
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, code=0, seconds=300):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, err[-4000:]
    return out, err


def workers(process, count=2):
    while True:
        found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "tip.train"], capture_output=True, text=True)
        pids = [int(pid) for pid in found.stdout.split()]
        if len(pids) == count:
            return sorted(pids)
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def results(run):
    """Everything a run leaves behind that is not a time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]
    last = sorted((run / "checkpoints").glob("step_*"))[-1]
    tensors = {f"{p.name} {n}": v for p in last.rglob("*.safetensors") for n, v in load_file(p).items()}
    files = {
        str(p.relative_to(run)): p.read_text() for p in (*run.glob("eval/*/tiny.jsonl"), *run.glob("tokens/*.jsonl"))
    }
    return rows, tensors, files


def assert_same(one, other):
    assert one[0] == other[0] and one[2] == other[2]
    assert one[1].keys() == other[1].keys() and all(torch.equal(one[1][n], other[1][n]) for n in one[1])


@pytest.fixture(scope="module")
def unbroken(tiny_pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    out, err = finish(start("tip.train", folder, "run", *SMALL))
    assert out.split() == [str(folder / "run")]  # one process speaks
    assert err.count("update 6/6") == 1 and (folder / "run" / "summary.json").exists()
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_killed_ends_the_other_and_the_run_continues_bit_for_bit(victim, unbroken, tmp_path):
    process = start("tip.train", tmp_path, "run", *SMALL)
    wait_for(tmp_path / "run" / "checkpoints" / "step_000002", process)
    os.kill(workers(process)[victim], signal.SIGKILL)
    begin = time.monotonic()
    _, err = finish(process, 1)
    assert time.monotonic() - begin < 60
    assert f"process {victim} (pid" in err and "was killed by signal 9" in err and "the same command continues" in err
    if victim == 1:
        assert "error: process 0: after step" in err and "another process of this run has ended" in err
    assert not (tmp_path / "run" / "summary.json").exists()
    _, err = finish(start("tip.train", tmp_path, "run", *SMALL))
    assert "continuing after step" in err
    assert_same(results(tmp_path / "run"), results(unbroken))


@pytest.mark.slow
def test_stopped_by_a_signal_it_writes_a_checkpoint_and_continues_bit_for_bit(unbroken, tmp_path):
    process = start("tip.train", tmp_path, "run", *SMALL)
    wait_for(tmp_path / "run" / "eval/step_000000/summary.json", process)  # both have their handlers by then
    process.send_signal(signal.SIGTERM)
    _, err = finish(process, 143)
    assert "checkpoint of step" in err
    finish(start("tip.train", tmp_path, "run", *SMALL))
    assert_same(results(tmp_path / "run"), results(unbroken))


def test_a_run_continues_on_another_number_of_processes_and_says_so(unbroken, tmp_path):
    first = start("tip.train", tmp_path, "run", *SMALL)
    wait_for(tmp_path / "run" / "checkpoints" / "step_000004", first)
    os.kill(workers(first)[0], signal.SIGKILL)
    finish(first, 1)
    _, err = finish(start("tip.train", tmp_path, "run", *SMALL, processes=1))
    assert "2 processes wrote this checkpoint and 1 continue it" in err
    (rows, tensors, _), (expected, wanted, _) = results(tmp_path / "run"), results(unbroken)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, other in zip(rows, expected, strict=True):
        assert row["loss/divergence"] == pytest.approx(other["loss/divergence"], rel=1e-3)
        assert row["tokens/response"] == other["tokens/response"]  # the data goes on where it stopped
    for name in wanted:
        torch.testing.assert_close(tensors[name], wanted[name], rtol=1e-2, atol=1e-4)


def test_two_processes_do_what_one_does(unbroken, tmp_path):
    """Own rollouts: the same responses, selections to rounding, evaluations and dumps as the plain engine."""
    finish(start("tip.train", tmp_path, "run", *SMALL, deepspeed=None))
    (rows, tensors, files), (expected, wanted, other_files) = results(tmp_path / "run"), results(unbroken)
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for key in ("loss/divergence", "rollout/length_mean", "tokens/kept", "optim/grad_norm", "tip/mass_covered"):
            if key in other:
                assert row[key] == pytest.approx(other[key], rel=1e-3), key
    assert files.keys() == other_files.keys()
    for step in ("teacher", "step_000000"):  # nothing is trained yet
        ours, theirs = (f[f"eval/{step}/tiny.jsonl"].splitlines() for f in (files, other_files))
        ours, theirs = ([json.loads(x) for x in f] for f in (ours, theirs))
        values = [[row.pop("reverse_kl", 0.0) for row in f] for f in (ours, theirs)]  # not of the teacher to itself
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6) and (max(values[0]) > 0) == (step != "teacher")
        assert ours == theirs
    for name in wanted:
        if not name.startswith("optimizer.safetensors step"):
            torch.testing.assert_close(tensors[name], wanted[name], rtol=1e-2, atol=2e-4)


def test_evaluation_is_shared_by_two_processes(unbroken, tmp_path):
    options = ("--model", str(unbroken / "checkpoints" / "step_000006"), "--limit", "24")
    out, _ = finish(start("opd.evaluate", tmp_path, "run", "eval.k=1", options=options))
    assert len(out.split()) == 1
    shared = json.loads(Path(out.strip()).read_text())["tiny"]
    trained = json.loads((unbroken / "eval" / "step_000006" / "summary.json").read_text())["tiny"]
    for key in ("problems", "greedy", "mean_at_k", "length_mean"):
        assert shared[key] == trained[key]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["engine.deepspeed=zero7"], "engine.deepspeed: no file 'zero7'; there are"),
        (["engine.deepspeed=null"], 'the file belongs to kind "deepspeed"'),
        (["engine.deepspeed=zero0", "student.dtype=bfloat16"], "DeepSpeed then adds gradients up in bfloat16"),
        (["student.path=nowhere"], "student.path 'nowhere': no such folder"),
    ],
)
def test_wrong_input_is_said_once_with_exit_code_2(settings, words, tiny_pair, tmp_path):
    out, err = finish(start("tip.train", tmp_path, "run", *settings), 2)
    assert out == "" and err.count("error:") == 1 and words in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"NUM_GPUS": "many"}, "NUM_GPUS is 'many', expected a whole number from 1"),
        ({"NNODES": "2"}, "NNODES is 2 and MASTER_ADDR is not set"),
        (
            {"NNODES": "2", "MASTER_ADDR": "127.0.0.1"},
            "NNODES is 2 and NODE_RANK is not set: give every machine its number, 0 to 1",
        ),
        (
            {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "NODE_RANK": "2"},
            "NODE_RANK is 2: give every machine its number, 0 to 1",
        ),
    ],
)
def test_a_wrong_environment_is_refused(environment, words, tmp_path):
    _, err = finish(start("tip.train", tmp_path, "run", **environment), 2)
    assert words in err


def test_two_machines_are_one_run(tiny_pair, unbroken, tmp_path):
    """Two launchers with one process each, as on two machines that share a disk."""
    machines = [
        start(
            "tip.train",
            tmp_path,
            "run",
            *SMALL,
            processes=1,
            NNODES="2",
            NODE_RANK=str(n),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT="29617",
        )
        for n in (0, 1)
    ]
    for process in machines:
        finish(process)
    assert_same(results(tmp_path / "run"), results(unbroken))
