"""What a vLLM server and its trainer do when there is no vLLM, no key, nobody, or suddenly nobody any more."""

import fcntl
import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Client

import pytest
import torch
from helpers import random_lm, tiny_config

from opd.config import ROOT
from opd.errors import InputError, RunError
from opd.rollout import Probe, connection, fleet, server, wire
from opd.rollout.connection import Elsewhere, ServerConnection
from opd.rollout.fleet import gpus_of_server
from opd.rollout.server import accept_trainer
from opd.rollout.vllm import VllmSampler
from opd.rollout.wire import KEY, Scratch
from opd.wire import ServerLost

SERVER = [sys.executable, "-m", "opd.vllm_server", "--listen"]


def process(*arguments, key="secret"):
    environment = {k: v for k, v in os.environ.items() if k != KEY} | ({KEY: key} if key else {})
    return subprocess.Popen(
        [*SERVER, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def connected(path, key=b"secret"):
    until = time.monotonic() + 60
    while True:
        try:
            return Client(path, authkey=key)
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < until
            time.sleep(0.05)


def gone(pid, seconds=20):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return True
        time.sleep(0.05)
    return False


def test_vllm_that_is_not_installed_is_said_and_what_to_do(tiny_pair, monkeypatch):
    monkeypatch.setattr(connection, "python_of_vllm", lambda: sys.executable)
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    config = tiny_config("rollout.engine=vllm")
    with pytest.raises(
        InputError, match=r"which is not installed \(.*No module named 'vllm'\).*setup.sh --vllm.*transformers"
    ):
        VllmSampler(random_lm(0), config.student, config, 64)


def test_a_server_where_nobody_is(tiny_pair, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    monkeypatch.setattr(connection, "CONNECTING", 0.3)
    config = tiny_config("rollout.engine=vllm", 'rollout.servers=["127.0.0.1:9"]')
    with pytest.raises(
        InputError, match=r"the vLLM server 127.0.0.1:9 did not start: nobody there has time for this run"
    ):
        VllmSampler(random_lm(0), config.student, config, 64)


def test_a_server_listens_only_to_who_has_the_key_and_unpickles_nothing(tmp_path, monkeypatch):
    path = str(tmp_path / "socket")
    server = process(path, "--child-of", str(os.getpid()))
    connected_with_wrong_key = False
    try:
        connected(path, b"wrong")
        connected_with_wrong_key = True
    except Exception as error:
        assert type(error).__name__ in ("AuthenticationError", "ConnectionResetError", "EOFError")
    assert not connected_with_wrong_key
    connection = connected(path)
    connection.send({"do": "close"})  # a pickle
    answer = json.loads(connection.recv_bytes())
    assert answer["failed"].startswith("UnicodeDecodeError") or answer["failed"].startswith("JSONDecodeError")
    server.wait(20)
    assert "refused a connection" in server.stderr.read()


def test_a_server_without_a_key_or_with_a_taken_address_says_so(tmp_path):
    refused = process("127.0.0.1:8500", key=None)
    assert refused.wait(60) == 2 and f"{KEY} is not set" in refused.stderr.read()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused = process(f"127.0.0.1:{taken.getsockname()[1]}")
        assert refused.wait(60) == 2 and "cannot listen there" in refused.stderr.read()


@pytest.mark.parametrize("how", ["killed", "closed"])
def test_a_server_ends_with_its_trainer(how, tmp_path):
    """Whatever it is doing: no GPU stays occupied by a run that is gone."""
    path = str(tmp_path / "socket")
    server = process(path, "--child-of", str(os.getpid()))
    connected_in_child = (
        "import sys, time; from multiprocessing.connection import Client\n"
        f"c = Client({path!r}, authkey=b'secret'); print('here', flush=True)\n"
        + ("time.sleep(100)" if how == "killed" else "c.close(); time.sleep(100)")
    )
    until = time.monotonic() + 60
    while not os.path.exists(path):
        assert time.monotonic() < until
        time.sleep(0.05)
    trainer = subprocess.Popen([sys.executable, "-c", connected_in_child], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline().strip() == "here"
    if how == "killed":
        trainer.kill()
    assert gone(server.pid)
    trainer.kill()


def test_a_server_nobody_has_connected_to_ends_with_who_started_it(tmp_path):
    command = [*SERVER, str(tmp_path / "socket"), "--child-of"]
    starts = (
        f"import os, subprocess; print(subprocess.Popen([*{command!r}, str(os.getpid())], start_new_session=True).pid)"
    )
    environment = os.environ | {KEY: "secret"}
    started = subprocess.run([sys.executable, "-c", starts], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert gone(int(started.stdout))


def test_who_connects_and_says_nothing_keeps_nobody_out_and_a_busy_server_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "SHUTDOWN", 1)
    path, found = str(tmp_path / "socket"), []
    thread = threading.Thread(target=lambda: found.append(accept_trainer(path, b"secret")))
    thread.start()
    while not os.path.exists(path):
        time.sleep(0.01)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(path)
        with connected(path) as ours:
            thread.join(20)
            found[0].send_bytes(b"hello")
            assert ours.recv_bytes() == b"hello"
            with pytest.raises((FileNotFoundError, ConnectionRefusedError)):  # at once, not when we have finished
                Client(path)
            found[0].close()


def test_a_server_that_does_not_read_is_lost_after_the_patience(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    path, held = str(tmp_path / "socket"), []
    thread = threading.Thread(target=lambda: held.append(accept_trainer(path, b"secret")))
    thread.start()
    while not os.path.exists(path):
        time.sleep(0.01)
    remote = ServerConnection(Elsewhere(path), {}, 1, 1)
    remote.start()
    thread.join(20)
    with pytest.raises(ServerLost, match=r"the connection is lost \(BlockingIOError\)"):
        remote.send(do="weights", much="x" * 10**8)
    with pytest.raises(ServerLost):
        remote.receive()
    remote.end()
    held[0].close()


def test_a_supervisor_replaces_a_server_and_ends_with_it():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    supervisor = process(f"127.0.0.1:{port}")
    try:
        for _ in range(2):
            connection = connected(("127.0.0.1", port))
            connection.send_bytes(json.dumps({"do": "close"}).encode())
            assert connection.poll(20)
            with pytest.raises(EOFError):
                connection.recv_bytes()
    finally:
        supervisor.terminate()
        assert supervisor.wait(20) == 128 + signal.SIGTERM
    time.sleep(0.2)
    with pytest.raises(ConnectionRefusedError):
        Client(("127.0.0.1", port), authkey=b"secret")


def test_weights_of_killed_processes_are_removed_and_those_of_living_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(wire.tempfile, "gettempdir", lambda: str(tmp_path))
    living = Scratch(10**18)  # more than shared memory has: the temporary folder
    assert living.path.parent == tmp_path
    left = tmp_path / "opd-weights-left"
    left.mkdir()
    (left / "00000.safetensors").write_bytes(b"x")
    other = Scratch(10**18)
    assert not left.exists() and living.path.exists() and other.path.exists()
    held = os.open(living.path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(held)
    for scratch in (living, other):
        scratch.remove()
        assert not scratch.path.exists()


def many_scratches(folder, count):
    tempfile.tempdir = folder
    for _ in range(count):
        Scratch(10**18).remove()


def test_processes_make_and_remove_their_folders_at_the_same_time(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=many_scratches, args=(str(tmp_path), 300)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert not list(tmp_path.glob("opd-weights-*/"))


class Answering(ServerConnection):
    """A server that is there and has said what it thinks of a probe."""

    def __init__(self, place, logprobs):
        super().__init__(place, {}, 1, 1)
        self.answer = {"logprobs": [part.tolist() for part in logprobs]}

    def start(self):
        pass

    def wait_until_loaded(self):
        pass

    def send(self, **message):
        assert message["do"] == "logprobs"

    def receive(self):
        return self.answer


@pytest.mark.parametrize("fault", [None, "nan", "second server"])
def test_parity_sees_every_server_and_what_is_no_number(fault, tiny_pair, monkeypatch):
    trainers = torch.tensor([-1.0, -2.0, -3.0])
    said = {where: [trainers[:2].clone(), trainers[2:].clone()] for where in ("a:1", "b:2")}
    if fault == "nan":
        said["a:1"][0][1] = float("nan")
    elif fault == "second server":
        said["b:2"][1][0] -= 0.5
    monkeypatch.setenv(KEY, "secret")
    monkeypatch.setattr(fleet, "ServerConnection", lambda place, *_: Answering(place, said[place.where]))
    config = tiny_config("rollout.engine=vllm", 'rollout.servers=["a:1", "b:2"]')
    sampler = VllmSampler(random_lm(0), config.student, config, 64)
    probe = Probe([[3, 4, 5], [6, 7]], trainers)
    if fault is None:
        assert sampler.check_parity(probe) == 0
        return
    expected = {
        "nan": r"server a:1 .* it has nan and the trainer -2\.0",
        "second server": r"server b:2 .* has -3\.5\d* and the trainer -3\.0",
    }
    with pytest.raises(RunError, match=expected[fault]):
        sampler.check_parity(probe)


@pytest.mark.parametrize(
    ("visible", "device", "group", "expected"),
    [(None, 0, 1, "0"), ("4,5,6,7", 0, 2, "4,5"), ("4,5,6,7", 2, 2, "6,7"), ("GPU-a,GPU-b", 1, 1, "GPU-b")],
)
def test_a_server_gets_the_gpus_of_its_processes(visible, device, group, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert gpus_of_server(torch.device("cuda", device), group) == expected
    assert gpus_of_server(torch.device("cpu"), 1) is None
    with pytest.raises(InputError, match=r"rollout\.tensor_parallel is 9, and there are"):
        gpus_of_server(torch.device("cuda", device), 9)
