"""The trainer's end of the line to one vLLM server."""

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from opd.cli import address_of
from opd.config import ROOT
from opd.errors import InputError
from opd.rollout.wire import KEY, SHUTDOWN, limit

LOADING = 3600  # seconds that a server may take to load a model
CONNECTING = 120  # seconds until a server that is told to be somewhere must be there


class ServerLost(Exception):
    """A server died, failed or fell silent; the text says which."""


class ServerConnection:
    """One vLLM: of this process's own, or somewhere else."""

    def __init__(self, model: dict[str, Any], where: str | None, gpus: str | None, threads: int, timeout: int):
        self.model, self.where, self.gpus, self.threads, self.timeout = model, where, gpus, threads, timeout
        self.name = f"the vLLM server {where}" if where else "vLLM"
        self.asleep = False
        self.folder: tempfile.TemporaryDirectory | None = None  # of the socket of a process of ours
        self.process: subprocess.Popen | None = None
        self.connection: Connection | None = None

    def start(self) -> None:
        """Starts or connects to it and has it load the model; `receive(LOADING)` says how that went. Raises
        ServerLost."""
        address, key = self.where, os.environ.get(KEY, "")
        if address is None:
            self.folder = tempfile.TemporaryDirectory(prefix="opd-vllm-")  # nobody else may open it
            address, key = f"{self.folder.name}/socket", secrets.token_hex()
            self.process = subprocess.Popen(
                [python_of_vllm(), "-m", "opd.vllm_server", "--listen", address, "--child-of", str(os.getpid())],
                env=self._environment(key),
                start_new_session=True,
            )
        self._connect(address_of(address), key.encode())
        self.asleep = False
        self.send(do="open", model=self.model, threads=self.threads)

    def _environment(self, key: str) -> dict[str, str]:
        launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
        found = {
            name: value for name, value in os.environ.items() if name not in launcher and "TORCHELASTIC" not in name
        }
        found |= {KEY: key, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        if self.gpus is None:
            found["OMP_NUM_THREADS"] = str(self.threads)
        else:
            found["CUDA_VISIBLE_DEVICES"] = self.gpus
        return found

    def _connect(self, address: tuple[str, int] | str, key: bytes) -> None:
        until = time.monotonic() + (CONNECTING if self.process is None else LOADING)
        while True:
            try:
                self.connection = Client(address)
                limit(self.connection, self.timeout)
                answer_challenge(self.connection, key)
                return deliver_challenge(self.connection, key)
            except AuthenticationError:
                raise InputError(f"{self.name} does not accept the key: {KEY} is another one there.") from None
            except (OSError, EOFError) as error:
                if self.process is not None and self.process.poll() is not None:
                    raise ServerLost(f"its process {self._ended()} before it was ready") from None
                if time.monotonic() > until:
                    raise ServerLost(f"nobody there has time for this run ({error})") from None
                time.sleep(0.1)

    def _ended(self) -> str:
        code = self.process.wait(SHUTDOWN)
        return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"

    def send(self, **message: Any) -> None:
        self._send(json.dumps(message).encode())

    def _send(self, data: bytes) -> None:
        try:
            self.connection.send_bytes(data)
        except OSError as error:
            raise ServerLost(self._why(error)) from None

    def receive(self, patience: int | None = None, waiting: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The next answer. Raises ServerLost when there is none within the time, or it is that something failed.

        `waiting` is called every second until it comes, and may raise.
        """
        until = time.monotonic() + (patience or self.timeout)
        try:
            while not self.connection.poll(min(1.0, patience or self.timeout)):
                waiting()
                if time.monotonic() >= until:
                    why = f"{patience} s" if patience else f"{self.timeout} s (rollout.timeout)"
                    raise ServerLost(f"it gave no sign of life for {why}")
            answer = json.loads(self.connection.recv_bytes())
        except (OSError, EOFError) as error:
            raise ServerLost(self._why(error)) from None
        if "failed" in answer:
            raise ServerLost(f"it failed with {answer['failed']}")
        return answer

    def _why(self, error: BaseException) -> str:
        if self.process is None:
            return f"the connection is lost ({type(error).__name__})"
        with suppress(subprocess.TimeoutExpired):
            return f"its process {self._ended()}"
        return f"its process does not answer ({type(error).__name__})"

    def give(self, folder: Path) -> None:
        """Hands over the weights that lie in `folder`; wakes it."""
        files = sorted(folder.glob("*.safetensors"))
        here = self.where is None
        size = sum(path.stat().st_size for path in files)
        self.send(do="weights", folder=str(folder) if here else None, files=len(files), size=size)
        for path in () if here else files:
            self._send(path.read_bytes())
            self.receive()
        self.receive()
        self.asleep = False

    def sleep(self) -> None:
        """Frees its GPU's memory, weights included; `give` wakes it. A server somewhere else, or on a CPU, stays
        awake."""
        if self.where is None and not self.asleep:
            self.send(do="sleep")
            self.asleep = self.receive()["asleep"]

    def end(self) -> None:
        """At once, in whatever state it is."""
        if self.connection is not None:
            self.connection.close()  # who sees that ends
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.folder.cleanup()

    def close(self) -> None:
        """With time to put vLLM away."""
        with suppress(ServerLost, OSError, EOFError):
            self.send(do="close")
            if self.connection.poll(SHUTDOWN):
                self.connection.recv_bytes()  # its end
        self.end()


def python_of_vllm() -> str:
    """Where vLLM is: with the trainer, or in an environment of its own, as on a CPU."""
    own = ROOT / ".venv-vllm" / "bin" / "python"
    return str(own) if importlib.util.find_spec("vllm") is None and own.exists() else sys.executable
