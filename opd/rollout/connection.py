"""The trainer's end of the line to one vLLM server: in a process of its own beside the trainer, or on another host."""

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from opd.arguments import address_of
from opd.config import ROOT
from opd.errors import InputError
from opd.rollout.wire import KEY, SHUTDOWN
from opd.wire import CONNECTING, ServerLost, connect, receive

LOADING = 3600  # seconds that a server may take to load a model
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


class OwnProcess:
    """A server in a process that this one starts.

    Attributes:
        name: what messages call the server.
        reads_our_files: it runs on this machine, so weights need not travel through the connection.
    Args:
        threads: its CPU threads.
        gpus: its CUDA_VISIBLE_DEVICES; None means that it runs on the CPU.
    """

    name, reads_our_files = "vLLM", True

    def __init__(self, threads: int, gpus: str | None):
        self.threads, self.gpus = threads, gpus
        self.process: subprocess.Popen | None = None
        self.socket_folder: tempfile.TemporaryDirectory | None = None

    def start(self) -> tuple[str, bytes, float]:
        """Its address and key, and the seconds that it may take to answer there."""
        self.socket_folder = tempfile.TemporaryDirectory(prefix="opd-vllm-")  # only this user may open it
        address, key = f"{self.socket_folder.name}/socket", secrets.token_hex()
        self.process = subprocess.Popen(
            [python_of_vllm(), "-m", "opd.vllm_server", "--listen", address, "--child-of", str(os.getpid())],
            env=self._environment(key),
            start_new_session=True,
        )
        return address, key.encode(), LOADING

    def reached(self) -> None:
        """Called when the server has answered: nobody else will connect."""
        self.socket_folder.cleanup()  # a run that is killed later leaves nothing behind

    def check_alive(self) -> None:
        """Raises ServerLost when it is known that the server cannot be reached any more."""
        if self.process.poll() is not None:
            raise ServerLost(f"its process {self._ending()} before it was ready")

    def cause(self, error: BaseException) -> str:
        """Why the connection has failed with this error, for a message."""
        with suppress(subprocess.TimeoutExpired):
            return f"its process {self._ending()}"
        return f"its process does not answer ({type(error).__name__})"

    def end(self) -> None:
        """Ends what this process has started there."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.socket_folder.cleanup()

    def _environment(self, key: str) -> dict[str, str]:
        """The trainer's environment variables but for its launcher's, and with the server's own device."""
        environment = {
            name: value for name, value in os.environ.items() if name not in LAUNCHER and "TORCHELASTIC" not in name
        }
        environment[KEY] = key
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        if self.gpus is None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        else:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus
        return environment

    def _ending(self) -> str:
        """How the process has ended. Raises subprocess.TimeoutExpired when it goes on."""
        code = self.process.wait(SHUTDOWN)
        return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"


class Elsewhere:
    """A server that runs already, as a rule on another host. It is used as OwnProcess is, and nothing of it is ours.

    Args:
        where: its address, an entry of rollout.servers.
    """

    reads_our_files = False

    def __init__(self, where: str):
        self.where, self.name = where, f"the vLLM server {where}"

    def start(self) -> tuple[tuple[str, int] | str, bytes, float]:
        return address_of(self.where), os.environ.get(KEY, "").encode(), CONNECTING

    def reached(self) -> None:
        pass

    def check_alive(self) -> None:
        pass

    def cause(self, error: BaseException) -> str:
        return f"the connection is lost ({type(error).__name__})"

    def end(self) -> None:
        pass


Place = OwnProcess | Elsewhere  # where a vLLM server is


class ServerConnection:
    """The trainer's end of the line to one vLLM server.

    Args:
        place: where the server is, and how it is reached and ended.
        model: the arguments of vllm.LLM that depend on the run.
        threads: CPU threads that it may use.
        timeout: seconds without a sign of life after which it counts as lost.
    """

    def __init__(self, place: Place, model: dict[str, Any], threads: int, timeout: int):
        self.place, self.model, self.threads, self.timeout = place, model, threads, timeout
        self.name = place.name
        self.asleep = False
        self.connection: Connection | None = None

    def start(self) -> None:
        """Reaches the server and asks it to load the model, which `wait_until_loaded` waits for.

        Raises:
            InputError: the server has another key.
            ServerLost: there is no server, or it is lost at once.
        """
        self._connect(*self.place.start())
        self.asleep = False
        self.send(do="open", model=self.model, threads=self.threads)

    def wait_until_loaded(self) -> None:
        """Raises InputError when the server has no vLLM or its vLLM does not take the model, and ServerLost."""
        answer = self.receive(LOADING)
        self.place.reached()
        if "missing" in answer:
            raise _not_installed(answer["missing"])
        if "refused" in answer:
            raise InputError(
                f"rollout.engine is 'vllm', which does not take {self.model['model']!r}: {answer['refused']}"
            )

    def send(self, **message: Any) -> None:
        """Raises ServerLost when the server does not read for `timeout` seconds, or is gone."""
        self._send_bytes(json.dumps(message).encode())

    def receive(self, patience: int | None = None, waiting: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The next answer.

        Args:
            patience: seconds to wait for it; None means `timeout`.
            waiting: called every second until it comes, and may raise.
        Raises:
            ServerLost: no answer comes within the time, or the answer is that something has failed.
        """
        seconds = patience or self.timeout
        allowance = f"{seconds} s" if patience else f"{seconds} s (rollout.timeout)"
        try:
            answer = json.loads(receive(self.connection, seconds, allowance, waiting))
        except (OSError, EOFError) as error:
            raise ServerLost(self.place.cause(error)) from None
        if "failed" in answer:
            raise ServerLost(f"it failed with {answer['failed']}")
        return answer

    def has_answer(self) -> bool:
        """Whether `receive` would return without waiting."""
        return self.connection.poll()

    def give(self, folder: Path) -> None:
        """Hands over the weights that lie in `folder`, and wakes the server. Raises ServerLost."""
        if self.place.reads_our_files:
            self.send(do="weights", folder=str(folder))
        else:
            files = sorted(folder.glob("*.safetensors"))
            self.send(do="sent_weights", files=len(files), size=sum(path.stat().st_size for path in files))
            for path in files:
                self._send_bytes(path.read_bytes())
                self.receive()
        self.receive()
        self.asleep = False

    def sleep(self) -> None:
        """Frees the GPU memory of the server, weights included, until `give` wakes it. Raises ServerLost.

        Only a server of this machine sleeps, and only on a GPU: any other takes no memory that the update could use.
        """
        if self.place.reads_our_files and not self.asleep:
            self.send(do="sleep")
            self.asleep = self.receive()["asleep"]

    def stop(self) -> None:
        """Breaks its responses off. The server stays usable; one that does not listen is ended, and started again by
        the next request."""
        try:
            self.send(do="stop")
            while "done" not in self.receive(SHUTDOWN):
                pass
        except ServerLost:
            self.end()

    def end(self) -> None:
        """Ends the server at once, in whatever state it is: a server that loses its trainer ends itself."""
        if self.connection is not None:
            self.connection.close()
        self.place.end()

    def close(self) -> None:
        """Ends the server, and gives it time to put vLLM away."""
        with suppress(ServerLost, OSError, EOFError):
            self.send(do="close")
            if self.connection.poll(SHUTDOWN):
                self.connection.recv_bytes()  # raises EOFError when the server has ended
        self.end()

    def _connect(self, address: tuple[str, int] | str, key: bytes, patience: float) -> None:
        try:
            self.connection = connect(address, key, self.timeout, patience, self.place.check_alive)
        except AuthenticationError:
            raise InputError(f"{self.name} does not accept the key: {KEY} is another one there.") from None

    def _send_bytes(self, data: bytes) -> None:
        try:
            self.connection.send_bytes(data)
        except OSError as error:
            raise ServerLost(self.place.cause(error)) from None


def _not_installed(detail: str) -> InputError:
    return InputError(
        f"rollout.engine is 'vllm', which is not installed ({detail}). On a GPU it is part of requirements.txt; on a "
        "CPU, bash scripts/setup.sh --vllm makes .venv-vllm. Or set rollout.engine=transformers."
    )


def check_installed() -> None:
    """Raises InputError when a vLLM that this process starts would find no vLLM."""
    if python_of_vllm() == sys.executable and importlib.util.find_spec("vllm") is None:
        raise _not_installed("there is no module vllm, and no .venv-vllm")


def python_of_vllm() -> str:
    """The Python that has vLLM: the trainer's, or that of an environment of its own, as on a CPU."""
    separate = ROOT / ".venv-vllm" / "bin" / "python"
    return str(separate) if importlib.util.find_spec("vllm") is None and separate.exists() else sys.executable
