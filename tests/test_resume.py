"""Exact resume: a run that was killed anywhere ends bit for bit like one that was not.

A child is forked from this process (so that it need not import torch again), runs the training command and is killed;
the same command is then given again. Compared are weights, optimizer moments, metrics and every evaluated response.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import runs
import torch
from helpers import engine_for, one_each, pair_of, random_lm, random_rollouts
from runs import status
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd.errors import RunError
from opd.record import checkpoint, metrics
from opd.record import folder as run_folder
from opd.step import train_step
from tip.config import TipConfig
from tip.weighter import TipWeighter

SETTINGS = (
    "optim.steps=8",
    "optim.warmup_steps=2",
    "eval.k=1",
    "eval.limit=16",
    "eval.every=3",
    "checkpoint.every=2",
    "checkpoint.keep=2",
    "log.diagnostics_every=4",
    "log.token_dump_every=3",
    "tip.rule=soft_or_sampling",
    "tip.scope=running",
)


def train(out, *more, resume="auto"):
    return runs.train(out, *SETTINGS, *more, resume=resume)


def forked(out, prepare=lambda: None, resume="auto"):
    """Starts the run in a forked child; returns its process id."""
    return runs.forked(lambda: (prepare(), train(out, resume=resume)))


def finish(out):
    """Gives the same command until it is done."""
    assert status(forked(out)) == 0


def fingerprint(folder):
    """Everything of a run that must repeat."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 9))  # no step twice, none lost
    found = {"rows": [{k: v for k, v in r.items() if not k.startswith(("time/", "memory/"))} for r in rows]}
    for path in sorted([*(folder / "eval").rglob("*.jsonl"), *(folder / "tokens").glob("*.jsonl")]):
        found[str(path.relative_to(folder))] = path.read_bytes()
    last = folder / "checkpoints" / "step_000008"
    for name in ("model", "trainer/optimizer", "trainer/weighter"):
        tensors = load_file(last / f"{name}.safetensors")
        found[name] = {k: (v.dtype, v.numpy().tobytes()) for k, v in tensors.items()}
    assert (folder / "checkpoints" / "latest").read_text() == "step_000008\n"
    kept = sorted(p.name for p in (folder / "checkpoints").glob("[!.]*"))
    assert len(kept) == 3 and {"latest", "step_000008"} < set(
        kept
    )  # SIGTERM saves at its own step, so the other varies
    checkpoint.verify(last)
    return found


@pytest.fixture(scope="module")
def whole(tiny_pair, tmp_path_factory):
    """The uninterrupted run, and how long it takes."""
    out = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    finish(out)
    return fingerprint(out / "run"), time.monotonic() - begin


@pytest.mark.slow
@pytest.mark.parametrize("point", range(7))
def test_killed_at_a_random_moment(whole, tmp_path, point):
    """SIGKILL (twice in a row) or SIGTERM, anywhere between the first line written and the end."""
    rng = random.Random(point)
    expected, seconds = whole
    signum = signal.SIGTERM if point % 3 == 0 else signal.SIGKILL
    for _ in range(1 if signum == signal.SIGTERM else 2):
        child = forked(tmp_path)
        time.sleep(rng.uniform(0.05, seconds))
        os.kill(child, signum)
        assert status(child) in (-signum, 128 + signum, 0)
    finish(tmp_path)
    assert fingerprint(tmp_path / "run") == expected


KILL_AT = (
    [("os.replace", n) for n in range(1, 9)]
    + [("os.fsync", n) for n in (2, 5, 9, 14, 20, 31, 40)]
    + [("shutil.rmtree", n) for n in (1, 2)]
    + [("MetricsLog.write", n) for n in (1, 4, 8)]
)


@pytest.mark.parametrize("where,count", KILL_AT[::4])
def test_killed_inside_a_write(whole, tmp_path, where, count):
    _killed_inside(whole, tmp_path, where, count)


@pytest.mark.slow
@pytest.mark.parametrize("where,count", KILL_AT[1::2])
def test_killed_inside_every_kind_of_write(whole, tmp_path, where, count):
    _killed_inside(whole, tmp_path, where, count)


def _killed_inside(whole, out, where, count):
    """The child kills itself right before its n-th call of a function that changes the disk."""

    def prepare():
        owner, name = {
            "os.replace": (os, "replace"),
            "os.fsync": (os, "fsync"),
            "shutil.rmtree": (shutil, "rmtree"),
            "MetricsLog.write": (metrics.MetricsLog, "write"),
        }[where]
        original, calls = getattr(owner, name), []

        def dying(*args, **kwargs):
            calls.append(1)
            if len(calls) == count:
                if where == "MetricsLog.write":  # half a line is on disk
                    args[0].file.write('{"step": 4, "loss/diver')
                    args[0].file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, dying)

    assert status(forked(out, prepare)) == -signal.SIGKILL
    finish(out)
    assert fingerprint(out / "run") == whole[0]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(whole, tmp_path, capfd):
    def prepare():
        original = checkpoint.save

        def stop_after_six(run_dir, step, *rest):
            original(run_dir, step, *rest)
            if step == 6:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.save = stop_after_six

    assert status(forked(tmp_path, prepare)) == -signal.SIGKILL
    damaged = tmp_path / "run" / "checkpoints" / "step_000006" / "model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-100] ^= 1
    damaged.write_bytes(data)
    finish(tmp_path)
    said = capfd.readouterr().err
    assert "step_000006 is damaged: model.safetensors is not what was written; trying the one before" in said
    assert "continuing after step 4 of 8" in said
    assert fingerprint(tmp_path / "run") == whole[0]


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest", "unmanifested"])
def test_every_kind_of_damage_is_found(whole, tiny_pair, tmp_path, damage):
    folder = train(tmp_path, "optim.steps=2", "optim.warmup_steps=0", "eval.every=0", "eval.benchmarks=[]", "eval.k=0")
    last = folder / "checkpoints" / "step_000002"
    assert checkpoint.verify(last) == 2 and checkpoint.newest(folder) == last
    if damage == "truncate":
        os.truncate(last / "trainer/optimizer.safetensors", 100)
    elif damage == "remove":
        (last / "trainer.json").unlink()
    elif damage == "manifest":
        (last / "manifest.json").write_text("{")
    else:
        (last / "manifest.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="step_000002"):
        checkpoint.verify(last)
    assert checkpoint.newest(folder) is None


def disk(free):
    return lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free)


def test_a_full_disk_stops_the_run_and_leaves_the_earlier_checkpoints(tiny_pair, tmp_path, monkeypatch):
    original = shutil.disk_usage

    def usage(path):
        written = (tmp_path / "run" / "checkpoints" / "step_000004").exists()
        return disk(1000)(path) if written else original(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(
        RunError,
        match=r"no room for the checkpoint of step 6: it takes 1 MiB and .* has 1000 B free. Earlier checkpoints are",
    ):
        train(tmp_path)
    assert checkpoint.newest(tmp_path / "run").name == "step_000004"
    monkeypatch.setattr(shutil, "disk_usage", original)
    train(tmp_path)
    assert checkpoint.newest(tmp_path / "run").name == "step_000008"


@pytest.mark.parametrize("file", ["model", "optimizer"])
def test_a_write_that_fails_stops_the_run_and_leaves_the_earlier_checkpoints(tiny_pair, tmp_path, monkeypatch, file):
    if file == "optimizer":
        original = checkpoint.save_file

        def failing(tensors, path):
            if "step_000004" in str(path):
                raise OSError(28, "No space left on device")
            original(tensors, path)

        monkeypatch.setattr(checkpoint, "save_file", failing)
    else:
        original_flush = checkpoint.flush

        def failing_flush(path):
            if "step_000004" in str(path):
                raise OSError(5, "Input/output error")
            original_flush(path)

        monkeypatch.setattr(checkpoint, "flush", failing_flush)
    with pytest.raises(RunError, match=r"checkpoint of step 4 could not be written .* Earlier checkpoints are intact"):
        train(tmp_path)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step_000002"]
    assert checkpoint.newest(tmp_path / "run").name == "step_000002"


def test_continuing_from_an_older_checkpoint_by_name(whole, tmp_path):
    finish(tmp_path)
    folder: Path = tmp_path / "run"
    train(tmp_path, resume=str(folder / "checkpoints" / "step_000006"))
    assert fingerprint(folder) == whole[0]


def test_killed_after_going_back_to_an_older_checkpoint(whole, tmp_path):
    """The future is abandoned at once: a kill before the next save must not find it again."""
    finish(tmp_path)
    folder = tmp_path / "run"

    def prepare():
        def dying(self, step, values):
            os.kill(os.getpid(), signal.SIGKILL)

        metrics.MetricsLog.write = dying

    child = forked(tmp_path, prepare, resume=str(folder / "checkpoints" / "step_000006"))
    assert status(child) == -signal.SIGKILL and not (folder / "checkpoints" / "step_000008").exists()
    finish(tmp_path)
    assert fingerprint(folder) == whole[0]


def test_a_saved_student_gives_the_logits_of_the_one_in_memory(tiny_pair, tmp_path):
    lm = random_lm(3)
    engine = engine_for(lm)
    train_step(
        pair_of(lm, random_lm(4, name="teacher")),
        engine,
        one_each(random_rollouts(lm)),
        TipWeighter(TipConfig()),
        step=1,
        seed=0,
    )
    saved = checkpoint.save(tmp_path, 1, lm, engine, {}, 1)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(
            AutoModelForCausalLM.from_pretrained(saved)(input_ids=ids).logits, lm.model(input_ids=ids).logits
        )


def test_going_back_forgets_later_warnings_and_dumps(tmp_path):
    (tmp_path / "tokens").mkdir()
    for step in (2, 4):
        (tmp_path / "tokens" / f"step_{step:06d}.jsonl").write_text("{}\n")
    rows = [json.dumps({"step": step, "kind": "little_mass", "message": "m"}) + "\n" for step in (1, 3, 4)]
    (tmp_path / "warnings.jsonl").write_text("".join(rows))
    run_folder.rewind(tmp_path, 3, None)
    assert (tmp_path / "warnings.jsonl").read_text() == "".join(rows[:2])
    assert [p.name for p in (tmp_path / "tokens").iterdir()] == ["step_000002.jsonl"]
