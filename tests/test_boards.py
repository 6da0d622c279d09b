"""Boards show the names and numbers of metrics.jsonl, after a kill as well, and nothing is sent without a login."""

import json
import os
import signal
import struct
import sys

import pytest
import runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_bad_input import S, outcome, snapshot

from opd import doctor
from opd import train as opd_train
from opd.record import boards

SMALL = (
    "optim.steps=4",
    "optim.warmup_steps=1",
    "eval.k=0",
    "eval.limit=4",
    "checkpoint.every=2",
    "rollout.prompts_per_step=4",
    "log.diagnostics_every=2",
    "log.samples=1",
    "log.token_dump_every=0",
)
BOTH = 'log.to=["tensorboard", "wandb"]'


@pytest.fixture
def offline(monkeypatch, tmp_path_factory):
    """wandb as a user without a login has it who asks for offline mode."""
    for name in {"WANDB_ERROR_REPORTING"} | {name for name in os.environ if name.startswith("WANDB_")}:
        monkeypatch.setenv(name, "")  # so that it is as before when the test ends, whatever sets it
        monkeypatch.delenv(name)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / "user" / name))
    monkeypatch.setenv("WANDB_MODE", "offline")


def records(path):
    """The records of a .wandb file, which is a log of LevelDB: blocks of 32 KiB with pieces of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, text = path.read_bytes(), 7, b""  # seven bytes say what the file is
    while place + 7 < len(content):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        text += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(text)
            text = b""


def history(path):
    """Step -> what a .wandb file has of it."""
    rows = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows[row.pop("_step")] = row
    return rows


def stopped(out, update, signum):
    """The exit code of a run in a child that gets a signal when it comes to that update."""
    original = opd_train.update

    def update_with_signal(run):
        if run.step + 1 == update:
            os.kill(os.getpid(), signum)
        original(run)

    def work():
        opd_train.update = update_with_signal
        runs.train(out, *SMALL, BOTH)

    return runs.status(runs.forked(work, out / "log"))


def test_all_boards_have_the_same_numbers_and_a_killed_run_continues_its_own(tiny_pair, tmp_path, offline):
    assert stopped(tmp_path, 2, signal.SIGTERM) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    assert stopped(tmp_path, 4, signal.SIGKILL) == -signal.SIGKILL, (tmp_path / "log").read_text()
    last = runs.forked(lambda: runs.train(tmp_path, *SMALL, BOTH), tmp_path / "log")
    assert runs.status(last) == 0, (tmp_path / "log").read_text()
    run = tmp_path / "run"
    run_id = (run / "wandb/run_id").read_text().strip()
    files = sorted(run.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 3 == len(list(run.glob("wandb/offline-run-*")))
    parts = [history(path) for path in files]
    assert sorted(parts[0]) == [0, 1] and sorted(parts[2]) == [1, 2, 3, 4]  # with what a killed one may have lost
    shown = {step: {k: v for part in parts for k, v in part.get(step, {}).items()} for step in range(5)}
    rows = {row.pop("step"): row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    assert sorted(rows) == [1, 2, 3, 4]
    for step, row in rows.items():
        assert {name: shown[step][name] for name in row} == row
    board = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "histograms": 0, "tensors": 0})
    board.Reload()
    for name in board.Tags()["scalars"]:
        for event in board.Scalars(name):
            assert shown[event.step][name] == pytest.approx(event.value, rel=1e-6)
    tags = {"eval/tiny/greedy", "teacher/tiny/greedy", *rows[4]}
    assert tags <= set(board.Tags()["scalars"])
    assert {"rollout/0/_type": "table-file"}.items() <= shown[4].items()
    assert any(name.endswith("/_type") and value == "histogram" for name, value in shown[4].items())
    about = next(r.run for r in records(files[2]) if r.WhichOneof("record_type") == "run")
    config = {item.key: json.loads(item.value_json) for item in about.config.update}
    recorded = json.loads((run / "config.json").read_text())["config"]
    assert {name: config[name] for name in recorded} == recorded and about.display_name == "run"
    (text,) = {path.read_text() for path in run.glob("wandb/offline-run-*/files/media/table/rollout/0_4_*.json")}
    assert "reference: `" in json.loads(text)["data"][0][0]


def test_a_run_without_boards_has_its_metrics(tiny_pair, tmp_path):
    run = runs.train(tmp_path, *SMALL, "optim.steps=2", "log.to=[]")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2 and not (run / "tensorboard").exists()
    # a run may continue with other boards, and one of an older version had no such key
    record = json.loads((run / "config.json").read_text())
    del record["config"]["log"]["to"], record["config"]["student"]["chat_template"]
    (run / "config.json").write_text(json.dumps(record))
    (run / "summary.json").unlink()
    assert runs.train(tmp_path, *SMALL, "optim.steps=2") == run and (run / "summary.json").exists()


def refused(setup, setting, monkeypatch, capsys, *more):
    before = snapshot(setup)
    arguments = ["--config", str(setup / "pair.json"), *S, setting, *more]
    code, out, err = outcome(opd_train.command, arguments, monkeypatch, capsys)
    assert code == 2 and out == "" and "Traceback" not in err, err
    assert snapshot(setup) == before
    return err


def test_wandb_that_is_not_installed_is_one_message(setup, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = refused(setup, BOTH, monkeypatch, capsys)
    assert "error: log.to names wandb, which is not installed. Install it with pip install wandb, or take" in message


def test_nothing_is_sent_without_a_login(setup, offline, monkeypatch, capsys):
    import wandb

    wandb.teardown()  # what this process knows of modes and logins
    monkeypatch.delenv("WANDB_MODE")
    message = refused(setup, BOTH, monkeypatch, capsys)
    assert not wandb.env.error_reporting_enabled()
    assert "error: log.to names wandb, which cannot log in (No API key configured." in message
    assert message == refused(setup, BOTH, monkeypatch, capsys, "--dry-run")
    report = outcome(doctor.command, ["--config", str(setup / "pair.json"), *S, BOTH], monkeypatch, capsys)[1]
    assert "mend  boards: log.to names wandb, which cannot log in (No API key configured." in report
    assert "Run wandb login, set WANDB_MODE=offline, which sends nothing, or take wandb out" in message
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "somewhere")
    assert "cannot log in" in refused(setup, BOTH, monkeypatch, capsys)
    wandb.teardown()


@pytest.mark.parametrize(
    "setting, message",
    [
        ('log.to=["mlflow"]', "log.to.0 is \"mlflow\". Expected: input should be 'tensorboard' or 'wandb'"),
        ("log.to=wandb", 'log.to is "wandb"'),
        ('log.to=["wandb", "wandb"]', "log.to names a board twice: ['wandb', 'wandb']"),
    ],
)
def test_boards_that_are_not_there(setting, message, setup, monkeypatch, capsys):
    assert message in refused(setup, setting, monkeypatch, capsys)


def test_a_run_keeps_the_id_that_wandb_knows_it_by(tmp_path):
    first = boards.run_id(tmp_path / "run_id")
    assert boards.run_id(tmp_path / "run_id") == first
    (tmp_path / "run_id").write_bytes(b"\xff")
    assert boards.run_id(tmp_path / "run_id") not in (first, "")
