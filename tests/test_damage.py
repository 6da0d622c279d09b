"""Damaged run folders: a resumed run ends in the unbroken run's weights, or in one clear message; never otherwise.

A run is stopped at several places; copies of its folder are damaged at random (cut off, bits flipped, removed, foreign
files at every path) and the same command is given again. OPD_DAMAGES sets how many damages are tried.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
from runs import forked, status, words
from safetensors.torch import load_file

from opd import cli, train
from opd.errors import Interrupted
from opd.record import checkpoint, evaluation

DAMAGES = int(os.environ.get("OPD_DAMAGES", "24"))
SETTINGS = (
    "optim.steps=6",
    "optim.warmup_steps=1",
    "eval.k=1",
    "eval.limit=6",
    "eval.every=2",
    "checkpoint.every=2",
    "checkpoint.keep=2",
    "rollout.prompts_per_step=8",
    "rollout.batch_size=4",
    "log.diagnostics_every=3",
    "log.token_dump_every=2",
    "log.token_dump_rollouts=2",
    "teacher.cache_gb=0.00001",
)
ROWS = range(1, 7)
EVALUATIONS = ("step_000000", "step_000002", "step_000004", "step_000006", "teacher")


def command(out, log=None, prepare=lambda: None):
    """Gives the training command in a forked child; returns its exit code. What it says goes to the file `log`."""

    def work():
        prepare()
        sys.argv = ["opd.train", *words(f"output_dir={out}", "run_name=run", *SETTINGS)]
        cli.main(train.command)

    return status(forked(work, log or os.devnull))


def killed_before(update):
    def prepare():
        original = train.update

        def dying(run):
            if run.step + 1 == update:
                os.kill(os.getpid(), signal.SIGKILL)
            original(run)

        train.update = dying

    return prepare


def killed_in_an_evaluation():
    """In the evaluation after update 4, with one of its two requests of responses on disk."""
    original, evaluated = train.evaluate.evaluate, []

    def dying(subject, *rest):
        evaluated.append(1)
        if len(evaluated) == 4:  # after teacher, step 0 and step 2
            subject = dataclasses.replace(subject, sampler=Dying(subject.sampler))
        return original(subject, *rest)

    train.evaluate.evaluate = dying


class Dying:
    """A sampler with which the process is killed at its second request."""

    def __init__(self, sampler):
        self.sampler, self.requests = sampler, 0

    def sample(self, *arguments):
        self.requests += 1
        if self.requests == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.sampler.sample(*arguments)


def stopped_in_the_last_evaluation():
    original = train.evaluate.evaluate

    def stopping(subject, benchmarks, config, out, *rest):
        if out.name == "step_000006":
            raise Interrupted(signal.SIGTERM)
        return original(subject, benchmarks, config, out, *rest)

    train.evaluate.evaluate = stopping


@pytest.fixture(scope="module")
def stages(tiny_pair, tmp_path_factory):
    """Where the run lies, and copies of it: stopped before, between and after checkpoints, in an evaluation, and
    finished."""
    base = tmp_path_factory.mktemp("damage")
    found = {}
    for name, prepare in {
        "before the first checkpoint": killed_before(2),
        "behind a checkpoint": killed_before(4),
        "after two checkpoints": killed_before(5),
        "in an evaluation": killed_in_an_evaluation,
        "in the last evaluation": stopped_in_the_last_evaluation,
        "finished": lambda: None,
    }.items():
        code = command(base / "out", prepare=prepare)
        assert code == (0 if name == "finished" else 143 if "last" in name else -9), name
        found[name] = (base / "out" / "run").rename(base / name)
    assert list((found["in an evaluation"] / "eval").rglob("*.partial.jsonl"))
    return base / "out", found


def put(stages, name):
    """The run as it was at a stage; returns its folder."""
    out, copies = stages
    shutil.rmtree(out, ignore_errors=True)
    return Path(shutil.copytree(copies[name], out / "run"))


def weights(folder):
    return {k: v.numpy().tobytes() for k, v in load_file(folder / "checkpoints/step_000006/model.safetensors").items()}


def cut(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size) if path.stat().st_size else 0)


def flip(path, rng):
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 8))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def append(path, rng):
    with path.open("ab") as file:
        file.write(rng.choice((b'{"step": 3, "los', b"\xff\xfe\x00", b"\n\n[]\n", b"{}\n", rng.randbytes(50))))


def garbage(path, rng):
    path.write_bytes(
        rng.choice(
            (b"", b"{}", b"[]", b"null", b'{"config": null}', b"\xff\xfe{\x00}\x00", b"[" * 5000, rng.randbytes(200))
        )
    )


def remove(path, rng):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def turn_over(path, rng):
    """A folder where a file was, a file where a folder was."""
    folder = path.is_dir()
    remove(path, rng)
    path.write_bytes(b"foreign") if folder else path.mkdir()


def foreign(path, rng):
    """A file or folder that the run did not write, beside any other."""
    names = (
        "step_foo",
        "step_x.jsonl",
        "step_000007",
        "step_000001",
        "step_000003.jsonl",
        ".step_000009.tmp",
        "notes.txt",
        "summary.json",
        "responses.partial.jsonl",
        "x.safetensors",
        "latest",
        "config.json",
        "teacher",
        "\u00e9t\u00e9",
        "-x",
    )
    target = (path if path.is_dir() else path.parent) / rng.choice(names)
    if not target.exists():
        target.write_bytes(rng.choice((b"", b"{}", b"foreign"))) if rng.random() < 0.6 else target.mkdir()


KINDS = (cut, flip, append, garbage, remove, turn_over, foreign)


def damage(folder, rng):
    """Damages one file or folder at random; returns what was done."""
    kind = rng.choice(KINDS)
    every = [p for p in sorted(folder.rglob("*")) if "tensorboard" not in p.parts]
    files = [p for p in every if p.is_file()]
    path = rng.choice(files if kind in (cut, flip, append, garbage) else every)
    kind(path, rng)
    return f"{kind.__name__} {path.relative_to(folder)}"


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def check_right(folder, finished):
    """The run in the folder is the unbroken one."""
    assert weights(folder) == weights(finished)
    rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(ROWS) and json.loads((folder / "summary.json").read_text())["steps"] == len(ROWS)
    assert all(evaluation.finished(folder / "eval" / name, ["tiny"]) for name in EVALUATIONS)
    assert checkpoint.newest(folder).name == "step_000006"


def test_undamaged_it_ends_right_from_every_stage(stages, tmp_path):
    out, copies = stages
    for name in copies:
        folder = put(stages, name)
        assert command(out, tmp_path / "log") == 0, (tmp_path / "log").read_text()
        check_right(folder, copies["finished"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(DAMAGES))
def test_damaged_it_ends_right_or_in_one_message(stages, tmp_path, seed):
    (out, copies), rng = stages, random.Random(seed)
    stage = rng.choice(sorted(copies))
    folder = put(stages, stage)
    done = " and ".join(damage(folder, rng) for _ in range(rng.choice((1, 1, 2))))
    before = snapshot(folder)
    code = command(out, tmp_path / "log")
    said = (tmp_path / "log").read_text()
    print(f"{stage}: {done}: exit code {code}\n{said}")
    assert "Traceback" not in said and "the program did not expect" not in said
    assert code in (0, 1, 2) and said.count("error: ") == (code != 0)
    if code == 2:
        assert snapshot(folder) == before
    elif code == 0 and "this run is complete" not in said:
        check_right(folder, copies["finished"])
    elif code == 0:
        if checkpoint.folder(folder, ROWS[-1]).exists():
            assert weights(folder) == weights(copies["finished"])
        else:
            assert f"step_{ROWS[-1]:06d} was removed" in said
    assert not list(out.glob(".*"))
