"""A teacher in other processes: the same bits as a local one, and what happens when its servers fail.

Servers are real processes with the embedded pair's teacher. A relay stands between trainer and server where a test must
see or damage what travels.
"""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Client, Connection
from pathlib import Path

import pytest
import torch
from helpers import engine_for, random_rollouts, tiny_config, with_privileged
from runs import forked, status
from runs import train as trained
from safetensors.torch import load_file, save, save_file

from opd import doctor, evaluate, models, plan, teacher_server
from opd import train as training
from opd.batch import empty_micro_batch, make_micro_batches
from opd.config import ROOT, load_config
from opd.errors import InputError, RunError
from opd.hooks import STAT_FIELDS, UniformWeighter
from opd.step import Pair, score_update, train_step
from opd.teacher import served
from opd.teacher.cache import Cache
from opd.teacher.choose import open_teacher, scoring_teacher
from opd.teacher.facts import KEY, weights_digest
from opd.teacher.server import MOST_IDS, TeacherServer
from tip import analyze

TEACHER = "data/tiny/pairs/chain/teacher"
CPU = torch.device("cpu")
STARTED = []  # process ids of servers; none outlives the tests, also where one fails


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(address, *settings):
    """A server process; forked, so that it need not import torch again."""
    words = [word for setting in settings for word in ("--set", setting)]
    arguments = ["--config", "configs/tiny.json", "--listen", address, *words]
    STARTED.append(forked(lambda: teacher_server.command(arguments), os.devnull))
    return STARTED[-1]


def end(process, how=signal.SIGKILL):
    if process in STARTED:
        STARTED.remove(process)  # its id may be another process's from now on
    os.kill(process, how)
    return status(process)


@contextmanager
def server(*settings):
    address = free_address()
    process = start(address, *settings)
    try:
        yield address, process
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            end(process)


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv(KEY, "secret")


@pytest.fixture(scope="module")
def addresses():
    """Two servers that no test harms."""
    os.environ[KEY] = "secret"
    with server() as (a, _), server() as (b, _):
        yield a, b
    del os.environ[KEY]
    for process in list(STARTED):
        with suppress(ProcessLookupError, ChildProcessError):
            end(process)


def config_of(*addresses, settings=()):
    return tiny_config("teacher.mode=server", f"teacher.servers={json.dumps(addresses)}", *settings)


@contextmanager
def opened(*addresses, settings=()):
    config = config_of(*addresses, settings=settings)
    teacher = scoring_teacher(config, open_teacher(config, None, CPU), CPU)
    try:
        yield teacher
    finally:
        teacher.close()


def local_teacher():
    config = tiny_config()
    return scoring_teacher(config, open_teacher(config, None, CPU), CPU)


def batches_of(count=48, privileged=False):
    student = models.load(tiny_config().student, CPU, "student")
    rollouts = random_rollouts(student, count, seed=3, response=(1, 60))
    rollouts = with_privileged(rollouts) if privileged else rollouts
    return make_micro_batches(rollouts, 250, 0, "keep", 128)


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True)
    )


# --- the same as a local teacher --------------------------------------------------------------------------------------
@pytest.mark.parametrize("privileged", [False, True])
def test_states_statistics_and_gradient_are_those_of_a_local_teacher_bit_for_bit(addresses, privileged):
    batches = batches_of(privileged=privileged)
    assert len(batches) > 4 and any(b.for_teacher.position_ids is not None for b in batches)
    needs, results = frozenset(STAT_FIELDS), []
    with opened(*addresses) as elsewhere:
        for teacher in (local_teacher(), elsewhere):
            student = models.load(tiny_config().student, CPU, "student")
            pair = Pair(student, teacher, 35, tiny_config().loss)
            states = [hidden.clone() for hidden in teacher.hidden_states(batches)]
            stats = score_update(pair, batches, needs, 1)
            engine = engine_for(student)
            update = train_step(pair, engine, batches, UniformWeighter(), step=1, seed=0)
            results.append((states, stats, update.loss, [p.detach().clone() for p in student.model.parameters()]))
            assert teacher.packed_row > 0
    (states, stats, loss, weights), (theirs, their_stats, their_loss, their_weights) = results
    assert same(states, theirs) and loss == their_loss and same(weights, their_weights)
    for name in needs:
        assert torch.equal(getattr(stats, name), getattr(their_stats, name)), name


def test_a_bfloat16_teacher_sends_bfloat16_and_the_ids_are_small_beside_it(monkeypatch):
    """2 H bytes a token of what counts, and about 4 for every id, position and place that is asked about."""
    sent, batches = [], batches_of()
    monkeypatch.setattr(served, "save", lambda tensors: sent.append(save(tensors)) or sent[-1])
    with server("teacher.dtype=bfloat16") as (address, _), opened(address, settings=["teacher.dtype=bfloat16"]) as far:
        states = far.hidden_states(batches)
        assert far.head(35).weight.dtype == torch.bfloat16
    hidden = far.head(35).weight.shape[1]
    for batch, states_NH in zip(batches, states, strict=True):
        assert states_NH.dtype == torch.bfloat16 and states_NH.nbytes == 2 * hidden * len(batch.token_ids)
    assert sum(map(len, sent)) < 4 * sum(2 * b.input_ids.numel() + 2 * len(b.token_ids) for b in batches) + 400 * len(
        sent
    )


def test_micro_batches_of_no_token_are_not_asked_for(addresses, monkeypatch):
    with opened(addresses[0]) as teacher:
        monkeypatch.setattr(served.Line, "ask", None)
        (states,) = teacher.hidden_states([empty_micro_batch(0)])
        (expected,) = local_teacher().hidden_states([empty_micro_batch(0)])
    assert states.shape == expected.shape and states.dtype == expected.dtype


def test_states_beyond_the_limit_go_to_disk_as_those_of_a_local_teacher(addresses, tmp_path):
    config = config_of(*addresses)
    teacher = scoring_teacher(config, open_teacher(config, None, CPU), CPU, Cache(2000, tmp_path / "states"))
    batches = batches_of()
    states = teacher.hidden_states(batches)
    assert list((tmp_path / "states").iterdir()) and same(states, local_teacher().hidden_states(batches))
    assert same(teacher.in_memory().hidden_states(batches), states)
    teacher.cache.clear()
    teacher.close()


def test_several_servers_share_the_micro_batches(addresses, monkeypatch):
    asked, ask = [], served.Line.ask
    monkeypatch.setattr(served.Line, "ask", lambda line, *a, **k: asked.append(line.where) or ask(line, *a, **k))
    with opened(*addresses) as teacher:
        batches = batches_of()
        assert same(teacher.hidden_states(batches), local_teacher().hidden_states(batches))
    assert set(asked) == set(addresses) and len(asked) == len(batches) + 1


# --- what travels, seen and damaged -----------------------------------------------------------------------------------
class Relay:
    """Passes messages on, one by one. `answer` gets each one of the server, and returns what the trainer receives.

    None breaks the connection instead, and so does a message that is longer than what follows.
    """

    def __init__(self, target, answer=lambda data: data, request=lambda data: None):
        self.target, self.answer, self.request = target, answer, request
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        host, port = self.target.split(":")
        while True:
            try:
                near = self.listener.accept()[0]
            except OSError:  # the relay is closed
                return
            try:
                far = socket.create_connection((host, int(port)))
            except OSError:  # the server is not there yet, and the trainer tries again
                near.close()
                continue
            for source, sink, change in ((near, far, self._seen), (far, near, self.answer)):
                threading.Thread(target=self._pass, args=(source, sink, change), daemon=True).start()

    def _seen(self, data):
        self.request(data)
        return data

    def _pass(self, source, sink, change):
        try:
            while True:
                size = self._read(source, 4)
                data = self._read(source, struct.unpack("!i", size)[0])
                changed = change(data)
                sink.sendall(size + (changed or b""))
                if changed is None or len(changed) < len(data):
                    break
        except OSError:
            pass
        for end_of_line in (source, sink):
            with suppress(OSError):
                end_of_line.shutdown(socket.SHUT_RDWR)

    def _read(self, source, count):
        data = b""
        while len(data) < count:
            more = source.recv(count - len(data))
            if not more:
                raise OSError
            data += more
        return data


def test_the_next_micro_batch_is_asked_for_while_an_answer_is_on_its_way(addresses):
    """The first answer is held back until a second request has come. Who waited for it would wait forever."""
    second, requests = threading.Event(), []

    def request(data):
        if b'"states"' in data:
            requests.append(data)
            if len(requests) == 2:
                second.set()

    def answer(data):
        if b'"states"' in data[:200]:
            assert second.wait(30)
        return data

    relay = Relay(addresses[0], answer, request)
    with opened(relay.address, settings=["teacher.timeout=20"]) as teacher:
        batches = batches_of()
        assert same(teacher.hidden_states(batches), local_teacher().hidden_states(batches))
    assert second.is_set() and len(requests) == len(batches)


@pytest.mark.parametrize("fault", ["half", "none", "other shape", "no tensors"])
def test_a_damaged_answer_is_asked_for_again_once(fault, addresses, capsys):
    damaged = []

    def answer(data):
        if b'"states"' not in data[:200] or damaged:
            return data
        damaged.append(data)
        return {
            "half": data[: len(data) // 2],
            "none": None,
            "other shape": data.replace(b"[", b"[1,", 1),
            "no tensors": b"x" * len(data),
        }[fault]

    relay = Relay(addresses[0], answer)
    with opened(relay.address) as teacher:
        batches = batches_of()
        assert same(teacher.hidden_states(batches), local_teacher().hidden_states(batches))
    assert damaged and capsys.readouterr().err.count("warning: the teacher server") == 1


def test_answers_that_stay_damaged_end_the_run_with_one_message(addresses):
    relay = Relay(addresses[0], lambda data: None if b'"states"' in data[:200] else data)
    with (
        opened(relay.address) as teacher,
        pytest.raises(RunError, match=r"for the second time.*Checkpoints are intact"),
    ):
        teacher.hidden_states(batches_of())


# --- servers that fail ------------------------------------------------------------------------------------------------
def test_a_killed_server_that_is_started_again_is_asked_again_and_the_second_time_ends_the_run(monkeypatch):
    batches, expected = batches_of(), local_teacher().hidden_states(batches_of())
    address = free_address()
    process = start(address)
    with opened(address) as teacher:
        assert same(teacher.hidden_states(batches), expected)
        end(process)
        process = start(address)
        assert same(teacher.hidden_states(batches), expected)  # nothing is lost
        end(process)
        with pytest.raises(RunError, match=f"teacher server {address} is lost for the second time"):
            teacher.hidden_states(batches)


def test_a_server_that_does_not_come_back_ends_the_run(monkeypatch):
    with server() as (address, process), opened(address) as teacher:
        monkeypatch.setattr(served, "CONNECTING", 0.3)
        end(process)
        with pytest.raises(
            RunError, match=r"was lost .* and does not come back: it is not reached.*same command again"
        ):
            teacher.hidden_states(batches_of())


def test_a_hung_server_is_lost_after_the_patience_and_used_again_when_it_goes_on():
    batches, expected = batches_of(), local_teacher().hidden_states(batches_of())
    with server() as (address, process), opened(address, settings=["teacher.timeout=1"]) as teacher:
        os.kill(process, signal.SIGSTOP)
        threading.Timer(2.5, lambda: os.kill(process, signal.SIGCONT)).start()
        assert same(teacher.hidden_states(batches), expected)
        assert any(line.was_lost for line in teacher.servers.lines)


def test_a_slow_server_is_waited_for(addresses):
    def answer(data):
        if b'"states"' in data[:200]:
            time.sleep(0.3)
        return data

    with opened(Relay(addresses[0], answer).address, settings=["teacher.timeout=5"]) as teacher:
        batches = batches_of(4)
        assert same(teacher.hidden_states(batches), local_teacher().hidden_states(batches))
        assert not any(line.was_lost for line in teacher.servers.lines)


def test_one_of_two_servers_that_dies_costs_nothing_when_it_is_back(addresses):
    batches, expected = batches_of(), local_teacher().hidden_states(batches_of())
    address = free_address()
    process = start(address)
    with opened(addresses[0], address) as teacher:
        end(process)
        process = start(address)
        assert same(teacher.hidden_states(batches), expected)
    end(process)


def test_another_teacher_in_the_place_of_a_lost_one_ends_the_run(tmp_path):
    address = free_address()
    process = start(address)
    with opened(address) as teacher:
        end(process)
        process = start(address, f"teacher.path={moved_teacher(tmp_path)}")
        with pytest.raises(RunError, match="does not come back: it has other weights: digest"):
            teacher.hidden_states(batches_of())
    end(process)


def test_a_failure_of_the_model_is_said_and_the_server_goes_on(monkeypatch):
    """As when its memory is full."""
    lm = models.load(tiny_config().teacher, CPU, "teacher")
    told, full = [], [True, False]

    def states(batch):
        if full.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(1)

    far = TeacherServer(lm, tiny_config())
    monkeypatch.setattr(far, "hidden_states", states)
    near, other = socket.socketpair()
    ours, theirs = Connection(near.detach()), Connection(other.detach())
    threading.Thread(target=lambda: far.answer_all(theirs), daemon=True).start()
    assert json.loads(ours.recv_bytes())["weights"] == weights_digest(lm)
    batch = batches_of(1)[0]
    for _ in range(2):
        ours.send_bytes(json.dumps({"do": "states"}).encode())
        ours.send_bytes(save({"input_ids": batch.input_ids, "rows": batch.rows, "columns": batch.columns}))
        told.append(json.loads(ours.recv_bytes()))
    assert told == [{"failed": "OutOfMemoryError: CUDA out of memory"}, {"done": True}]
    ours.close()


# --- wrong input ------------------------------------------------------------------------------------------------------
def moved_teacher(folder):
    """A checkpoint that differs from the teacher in one number of its norm."""
    shutil.copytree(TEACHER, folder / "moved")
    weights = load_file(folder / "moved/model.safetensors")
    weights["model.norm.weight"][3] += 0.5
    save_file(weights, folder / "moved/model.safetensors", {"format": "pt"})
    return folder / "moved"


def renamed_teacher(folder):
    """A checkpoint whose tokenizer has another string for one id."""
    shutil.copytree(TEACHER, folder / "renamed")
    text = (folder / "renamed/tokenizer.json").read_text()
    vocab = json.loads(text)["model"]["vocab"]
    word = max(vocab, key=vocab.get)
    (folder / "renamed/tokenizer.json").write_text(text.replace(json.dumps(word), json.dumps(word + "x")))
    return folder / "renamed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: "teacher.path=data/tiny/pairs/chain/student", "another teacher: its parameters is"),
        (lambda _: "teacher.dtype=bfloat16", "another teacher: its dtype is 'bfloat16', expected 'float32'"),
        (lambda tmp: f"teacher.path={renamed_teacher(tmp)}", r"another teacher: its vocabulary \(digest\) is"),
        (lambda _: "optim.micro_batch_tokens=64", "is 2048, and the teacher servers take at most 64"),
    ],
)
def test_a_server_with_another_teacher_is_refused(change, message, tmp_path):
    with server(change(tmp_path)) as (address, _), pytest.raises(InputError, match=message), opened(address):
        pass


def test_two_servers_have_one_teacher(addresses, tmp_path):
    with (
        server(f"teacher.path={moved_teacher(tmp_path)}") as (address, _),
        pytest.raises(InputError, match=f"{address} has other weights: digest .*, expected "),
        opened(addresses[0], address),
    ):
        pass


def test_a_wrong_key_no_key_and_nobody_are_each_said(addresses, monkeypatch):
    monkeypatch.setenv(KEY, "wrong")
    refused = pytest.raises(InputError, match=f"{addresses[0]} does not accept the key: {KEY} is another one there")
    with refused, opened(addresses[0]):
        pass
    monkeypatch.delenv(KEY)
    with pytest.raises(InputError, match=f"teacher.mode is 'server' and {KEY} is not set"), opened(addresses[0]):
        pass
    monkeypatch.setenv(KEY, "secret")
    monkeypatch.setattr(served, "CONNECTING", 0.1)
    nobody = pytest.raises(InputError, match=r"does not answer: nobody there.*opd\.teacher_server --config")
    with nobody, opened(free_address()):
        pass


def test_another_program_at_the_address_is_no_teacher_server(addresses, monkeypatch):
    relay = Relay(addresses[0], lambda data: data.replace(b'"protocol": 1', b'"protocol": 9'))
    with pytest.raises(InputError, match="speaks protocol 9, expected 1"), opened(relay.address):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["teacher.mode=server"], r"teacher.servers is \[\] and teacher.mode is \"server\""),
        (['teacher.servers=["a:1"]'], 'teacher.mode is "local": set teacher.mode=server'),
        (["teacher.mode=server", 'teacher.servers=["a:1","a:1"]'], "names a server twice"),
        (["teacher.mode=server", 'teacher.servers=["a"]'], "'a' is no address of a server, expected HOST:PORT"),
        (["teacher.mode=server", 'teacher.servers=["a:1"]', "teacher.path=null"], "teacher.path is null and"),
        (["teacher.timeout=0"], "teacher.timeout is 0"),
    ],
)
def test_settings_without_meaning(settings, message):
    with pytest.raises(InputError, match=message):
        tiny_config(*settings)


def test_the_command_without_key_or_with_a_teacher_that_is_the_student_ends_with_2():
    command = [sys.executable, "-m", "opd.teacher_server", "--config", "configs/tiny_self.json", "--listen", "a:1"]
    environment = {name: value for name, value in os.environ.items() if name != KEY}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and ended.stderr == (
        f"error: {KEY} is not set. Set it to a secret, the same one here and where the trainer runs.\n"
    )
    with pytest.raises(InputError, match="the teacher is the student, which its run alone has"):
        teacher_server.open_server(load_config("configs/tiny_self.json")[0])
    sharded = replace(tiny_config(), teacher=replace(tiny_config().teacher, placement="sharded"))
    with pytest.raises(
        InputError, match=r"teacher\.placement is 'sharded', and a server holds its teacher on one device"
    ):
        teacher_server.open_server(sharded)


def test_a_taken_address_is_said_and_sigterm_ends_a_server_that_answers():
    with server() as (address, process), opened(address) as teacher:
        with pytest.raises(InputError, match="cannot listen there"):
            teacher_server.command(["--config", "configs/tiny.json", "--listen", address])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which the command has set in this process
        teacher.hidden_states(batches_of(2))
        assert end(process, signal.SIGTERM) == 128 + signal.SIGTERM


# --- what a server refuses --------------------------------------------------------------------------------------------
def asked(address, request, tensors=None):
    """The server's answer to a request that no trainer sends."""
    host, port = address.split(":")
    with Client((host, int(port)), authkey=b"secret") as line:
        line.recv_bytes()
        line.send_bytes(request)
        if tensors is not None:
            line.send_bytes(tensors)
        return json.loads(line.recv_bytes())


def test_a_server_refuses_what_it_cannot_read_and_goes_on(addresses):
    states = json.dumps({"do": "states"}).encode()
    ids, place = torch.ones(1, 4, dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    good = {"input_ids": ids, "rows": place - 2, "columns": place}
    faults = {
        "no JSON object": (b"\x80\x04K\x01.", None),  # a pickle
        "expected 'head' or 'states'": (b'{"do": "weights"}', None),
        "cannot be read": (states, b"x" * 100),
        "input_ids go from 1 to 99": (states, save(good | {"input_ids": torch.tensor([[1, 99]]).int()})),
        "columns go from 4 to 4": (states, save(good | {"columns": place + 2})),
        "rows go from -1": (states, save(good | {"rows": place - 3})),
        "position_ids has the shape": (states, save(good | {"position_ids": torch.ones(1, 2).int()})),
        "2 x 2000 tokens, expected at most 2048": (states, save(good | {"input_ids": torch.ones(2, 2000).int()})),
        "made for 128 positions": (states, save(good | {"input_ids": torch.ones(1, 129).int()})),
        "expected (B, T), (N,), (N,)": (states, save(good | {"rows": ids.clone()})),
    }
    for message, (request, tensors) in faults.items():
        assert message in asked(addresses[0], request, tensors)["refused"]
    assert asked(addresses[0], states, save(good)) == {"done": True}


def test_a_server_breaks_off_who_sends_too_much_and_refuses_who_has_no_key(addresses):
    host, port = addresses[0].split(":")
    with Client((host, int(port)), authkey=b"secret") as line:
        line.recv_bytes()
        line.send_bytes(b'{"do": "states"}')
        with pytest.raises((EOFError, OSError)):
            line.send_bytes(b"x" * (MOST_IDS + 1))
            line.recv_bytes()
    with socket.create_connection((host, int(port))) as silent, opened(addresses[0]) as teacher:  # keeps nobody out
        assert silent and len(teacher.hidden_states(batches_of(2)))


# --- runs -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """A few of the training problems, because all of them take seconds to read."""
    path = tmp_path_factory.mktemp("problems") / "train.jsonl"
    path.write_text("".join(Path("data/tiny/pairs/chain/train.jsonl").read_text().splitlines(keepends=True)[:64]))
    return f'data.train=["{path}"]'


RUN = (
    "optim.steps=4",
    "optim.warmup_steps=1",
    "rollout.prompts_per_step=8",
    "eval.limit=2",
    "eval.every=0",
    "checkpoint.every=2",
    "log.token_dump_every=0",
)


def with_servers(*addresses):
    return ("teacher.mode=server", f"teacher.servers={json.dumps(addresses)}", "teacher.timeout=20")


def final_weights(run):
    return (run / "checkpoints/step_000004/model.safetensors").read_bytes()


def test_a_run_with_servers_is_the_run_with_a_local_teacher_in_two_phases_too(addresses, problems, tmp_path, capsys):
    settings = (*RUN, problems)
    near = trained(tmp_path / "near", *settings, plain=True)
    far = trained(tmp_path / "far", *settings, "engine.phases=2", *with_servers(*addresses), plain=True)
    assert final_weights(near) == final_weights(far)
    step_0 = [json.loads((run / "eval/step_000000/summary.json").read_text())["tiny"] for run in (near, far)]
    assert step_0[0]["reverse_kl"] == step_0[1]["reverse_kl"] > 0
    assert "the teacher is elsewhere and samples nothing" in capsys.readouterr().err
    assert not (far / "eval/teacher").exists() and (near / "eval/teacher").exists()


def test_a_run_whose_server_is_gone_stops_and_continues_as_if_nothing_had_been(problems, tmp_path, monkeypatch):
    settings = (*RUN, problems, "eval.benchmarks=[]")
    near = trained(tmp_path / "near", *settings, plain=True)
    monkeypatch.setattr(served, "CONNECTING", 0.3)
    original = training.update
    with server() as (address, process):

        def update(run):
            if run.step == 2:
                end(process)
            original(run)

        monkeypatch.setattr(training, "update", update)
        with pytest.raises(RunError, match="Checkpoints are intact"):
            trained(tmp_path / "far", *settings, *with_servers(address), plain=True)
    monkeypatch.setattr(training, "update", original)
    monkeypatch.setattr(served, "CONNECTING", 20)
    with (
        server(f"teacher.path={moved_teacher(tmp_path)}") as (address, _),
        pytest.raises(InputError, match=r"weights with the digest .* have taught this run, and the teacher servers"),
    ):
        trained(tmp_path / "far", *settings, *with_servers(address), plain=True)
    with server() as (address, _):  # another address is the same run
        far = trained(tmp_path / "far", *settings, *with_servers(address), plain=True)
    assert final_weights(near) == final_weights(far)


def test_doctor_and_evaluation_ask_servers(addresses, problems, tmp_path, capsys):
    assert not doctor.examine(config_of(*addresses, settings=[problems]))
    assert f"teacher servers {addresses[0]}, {addresses[1]}: the same teacher" in capsys.readouterr().out
    figures = []
    for settings in ((), with_servers(*addresses)):
        out = tmp_path / str(len(figures))
        words = ["--config", "configs/tiny.json", *(word for s in settings for word in ("--set", s))]
        evaluate.command(
            [*words, "--model", "data/tiny/pairs/chain/student", "--limit", "8", "--out", str(out / "eval")]
        )
        summary = json.loads((out / "eval/summary.json").read_text())["tiny"]
        figures.append((summary["reverse_kl"], summary["mean_at_k"]))
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_analysis_asks_servers(addresses, tmp_path):
    words = ["--config", "configs/tiny.json", *(word for s in with_servers(*addresses) for word in ("--set", s))]
    analyze.command([*words, "--prompts", "4", "--oracle-tokens", "4", "--out", str(tmp_path / "page")])
    assert (tmp_path / "page/analysis.html").exists()


def test_doctor_says_what_is_wrong_with_the_servers(problems, monkeypatch, capsys):
    monkeypatch.setattr(served, "CONNECTING", 0.1)
    address = free_address()
    assert doctor.examine(config_of(address, settings=[problems])) == [f"teacher servers {address}"]
    assert f"mend  teacher servers {address}: teacher.servers: the teacher server" in capsys.readouterr().out


def test_the_plan_has_the_head_of_a_teacher_elsewhere_and_nothing_else_of_it():
    near, far = (plan.plan_of(config, CPU, 1, None, 1) for config in (tiny_config(), config_of("a:1")))
    assert near.phases["update"].keys() - far.phases["update"].keys() == {"teacher"}
    hidden, rows = 96, 35
    assert far.phases["update"]["teacher head"] == 4 * hidden * rows
    assert "activations" not in far.phases["teacher"] and far.seconds["teacher"] == 0


def test_only_config_and_tokenizer_of_the_teacher_need_be_on_the_trainers_machine(addresses, tmp_path):
    shutil.copytree(TEACHER, tmp_path / "teacher")
    (tmp_path / "teacher/model.safetensors").unlink()
    with opened(*addresses, settings=[f"teacher.path={tmp_path / 'teacher'}"]) as teacher:
        assert len(teacher.hidden_states(batches_of(2)))


def test_the_digest_of_weights_sees_one_number_of_a_small_parameter_and_any_training(tmp_path):
    lm = models.load(tiny_config().teacher, CPU, "teacher")
    before = weights_digest(lm)
    assert before == weights_digest(models.load(tiny_config().teacher, CPU, "teacher"))
    assert before != weights_digest(
        models.load(tiny_config(f"teacher.path={moved_teacher(tmp_path)}").teacher, CPU, "t")
    )
