"""One writer a folder: who comes second is refused or waits, whatever happens to the first; and nothing is left
behind."""

import json
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from runs import configured, forked, status

from data import prepare
from data.tiny import build
from opd import evaluate, files
from opd.errors import InputError, Interrupted
from opd.train import run
from tip import analyze, report, reproduce

OWNER = rf"is being written by process {os.getpid()} on {socket.gethostname()}\. Two writers"


def until(holds):
    deadline = time.monotonic() + 120  # only so that a fault does not hang the tests
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_second_is_refused_and_nothing_is_left(tmp_path):
    folder = tmp_path / "new" / "deeper" / "run"
    with files.lock(folder, "output_dir"):
        assert [p.name for p in folder.parent.iterdir()] == [".run.lock"]
        for same in (folder, tmp_path / "new" / "x" / ".." / "deeper" / "run"):
            message = OWNER + r".*choose another folder \(output_dir\)"
            with pytest.raises(InputError, match=message), files.lock(same, "output_dir"):
                pass
        assert files.is_locked(folder) and not files.is_locked(folder.with_name("other"))
        with files.lock(folder.with_name("other"), "output_dir"):
            pass
    assert not list(tmp_path.iterdir())
    with files.lock(folder, "output_dir"):
        folder.mkdir()
    assert [p.name for p in folder.parent.iterdir()] == ["run"]


def test_a_link_to_a_folder_is_the_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    refused = pytest.raises(InputError, match=OWNER)
    with files.lock(tmp_path / "run", "output_dir"), refused, files.lock(tmp_path / "link", "output_dir"):
        pass


def test_a_killed_owner_keeps_nobody_away(tmp_path):
    def work():
        with files.lock(tmp_path / "run", "output_dir"):
            time.sleep(600)

    child = forked(work)
    until(lambda: (tmp_path / ".run.lock").exists() and (tmp_path / ".run.lock").read_text())
    with pytest.raises(InputError, match=f"is being written by process {child} on"), files.lock(tmp_path / "run", "x"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / ".run.lock").exists()  # what a killed process leaves is no obstacle
    with files.lock(tmp_path / "run", "output_dir"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_and_a_folder_that_nobody_may_make(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"file is a file, expected a folder. Set --out"),
        files.lock(tmp_path / "file", "--out"),
    ):
        pass
    with (
        pytest.raises(InputError, match="file is a file, expected a folder"),
        files.lock(tmp_path / "file" / "run", "output_dir"),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_many_that_wait_come_one_after_another(tmp_path):
    """The lock's file is removed and made again all the time; two owners at once would lose a count."""
    counter, times, children = tmp_path / "counter", 40, 4
    counter.write_text("0")

    def work():
        for _ in range(times):
            with files.lock(tmp_path / "deep" / "run", "output_dir", wait=lambda: None):
                number = int(counter.read_text())
                os.sched_yield()
                counter.write_text(str(number + 1))

    files_sleep = time.sleep
    time.sleep = lambda seconds: files_sleep(0.0005)  # in the children, which are forked from here
    try:
        started = [forked(work) for _ in range(children)]
    finally:
        time.sleep = files_sleep
    assert [status(child) for child in started] == [0] * children
    assert counter.read_text() == str(times * children)
    assert not list(tmp_path.rglob(".*"))


def test_waiting_can_be_given_up(tmp_path, capsys):
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted(signal.SIGTERM)

    run_folder, stopped = tmp_path / "run", pytest.raises(Interrupted)
    with files.lock(run_folder, "output_dir"), stopped, files.lock(run_folder, "output_dir", wait=stop):
        pass
    assert capsys.readouterr().err.count("waiting for process") == 1


SMALL = (
    "optim.steps=4",
    "optim.warmup_steps=1",
    "eval.k=0",
    "eval.limit=4",
    "eval.every=2",
    "checkpoint.every=2",
    "rollout.prompts_per_step=8",
    "log.token_dump_every=0",
    "log.samples=0",
    "log.diagnostics_every=0",
)


def small(out, *more):
    return configured(out, *SMALL, *more)[0]


@pytest.mark.parametrize("later", [0.0, 0.3, 1.0])
def test_the_same_run_started_twice_is_made_once(tiny_pair, tmp_path, later, capfd):
    first = forked(lambda: run(small(tmp_path)))
    if later:
        until(lambda: (tmp_path / ".run.lock").exists())
        time.sleep(later)
    second = forked(lambda: run(small(tmp_path)))
    codes = sorted([status(first), status(second)])
    said = capfd.readouterr().out
    assert codes == [0, 2] and said.count("error: ") == 1 and "is being written by process" in said
    rows = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4] and json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_every_command_that_writes_a_folder_is_its_only_writer(tiny_pair, tmp_path):
    config = ["--config", "configs/tiny.json"]
    commands = {
        tmp_path / "e": lambda: evaluate.command(
            [*config, "--model", str(tiny_pair / "student"), "--out", str(tmp_path / "e")]
        ),
        tmp_path / "a": lambda: analyze.command([*config, "--out", str(tmp_path / "a")]),
        tmp_path / "math500": lambda: prepare.command(["math500", "--source", "none", "--out", str(tmp_path)]),
        tmp_path / "tiny-reproduce": lambda: reproduce.command(
            [*config, "--table", "main", "--set", f"output_dir={tmp_path}"]
        ),
    }
    for folder, command in commands.items():
        with files.lock(folder, "--out"), pytest.raises(InputError, match=OWNER):
            command()
    assert not list(tmp_path.iterdir())
    finished = run(small(tmp_path))
    with files.lock(tmp_path / "r", "--out"), pytest.raises(InputError, match=OWNER):
        report.command([str(finished), "--out", str(tmp_path / "r")])


def test_two_that_want_the_same_student_build_it_once(tiny_pair, tmp_path, monkeypatch, capfd):
    pair = build.PAIRS["chain"]
    monkeypatch.setitem(build.PAIRS, "chain", replace(pair, student=replace(pair.student, steps=3, batch=4)))
    children = [forked(lambda: build.student(tiny_pair, 3, tmp_path)) for _ in range(3)]
    assert [status(child) for child in children] == [0, 0, 0]
    assert capfd.readouterr().err.count("training the student of seed 3") == 1
    assert sorted(p.name for p in (tmp_path / "chain").iterdir()) == ["seed_3"]


def test_arms_side_by_side_share_the_evaluation_of_their_start(tiny_pair, tmp_path, capfd):
    """Two runs that differ in their learning rate start alike."""
    children = [
        forked(lambda n=n: run(small(tmp_path, f"run_name=arm{n}", f"optim.lr={n}e-4"), shared=tmp_path / "shared"))
        for n in (1, 2)
    ]
    assert [status(child) for child in children] == [0, 0]
    (start,) = (tmp_path / "shared").iterdir()
    assert sorted(p.name for p in start.iterdir()) == ["step_000000", "teacher"]
    for name in ("teacher", "step_000000"):
        copies = [(tmp_path / folder / "eval" / name / "summary.json").read_bytes() for folder in ("arm1", "arm2")]
        assert copies[0] == copies[1] == (start / name / "summary.json").read_bytes()  # its seconds were measured once


@pytest.mark.parametrize(("name", "updates"), [("step_000000", 0), ("teacher", 4)])
def test_a_second_arm_waits_for_an_evaluation_when_nothing_else_is_left_to_do(
    name, updates, tiny_pair, tmp_path, capfd
):
    run(small(tmp_path, "run_name=first"), shared=tmp_path / "shared")
    (start,) = (tmp_path / "shared").iterdir()
    with files.lock(start / name, "output_dir"):
        child = forked(lambda: run(small(tmp_path, "run_name=second"), shared=tmp_path / "shared"))
        said = ""

        def waits():
            nonlocal said
            said += capfd.readouterr().err
            return f"waiting for process {os.getpid()}" in said

        until(waits)
        assert not (tmp_path / "second" / "eval" / name).exists()
        assert (tmp_path / "second" / "metrics.jsonl").read_text().count("\n") == updates
    assert status(child) == 0 and (Path(tmp_path) / "second" / "summary.json").exists()
