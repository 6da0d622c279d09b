"""The process that has vLLM: it generates for one trainer at a time, with the weights that trainer gives it.

    OPD_VLLM_KEY=SECRET python -m opd.vllm_server --listen 0.0.0.0:8500

A trainer starts one beside itself, or is told in rollout.servers where some run, on other GPUs or other hosts. In a
process of its own, because then a crash or a hang of vLLM costs its rollouts and not the run, and its packages need not
be the trainer's. A server knows nothing about a run: model, lengths and memory come with the first message. Each
trainer gets a fresh process, and one that is gone takes it along, so no GPU stays occupied.

What travels is JSON and safetensors, never a pickle. Only who knows the key is listened to; nothing is encrypted.
"""

import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from opd.cli import InputError, Parser, main, number_argument

KEY = "OPD_VLLM_KEY"
SHUTDOWN = 20  # seconds that a server has to put vLLM away


def address_of(text: str) -> tuple[str, int] | str:
    """HOST:PORT, or the path of a Unix socket. Raises InputError."""
    if text.startswith("/"):
        return text
    host, colon, port = text.rpartition(":")
    if not colon or not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise InputError(
            f"{text[:80]!r} is no address of a vLLM server, expected HOST:PORT, for example 10.0.0.2:8500."
        )
    return host, int(port)


class Scratch:
    """A new folder for `size` bytes of weights, in shared memory where there is room; locked while its process lives.

    What processes that were killed have left is removed: it would occupy memory until the machine restarts.
    """

    def __init__(self, size: int):
        roots = [Path("/dev/shm"), Path(tempfile.gettempdir())]
        with (roots[-1] / f"opd-weights-{os.getuid()}.lock").open("w") as one_at_a_time:
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            for left in (p for root in roots for p in root.glob("opd-weights-*") if p.is_dir()):
                with suppress(FileNotFoundError, PermissionError, BlockingIOError):  # its owner was faster, or lives
                    handle = os.open(left, os.O_RDONLY)
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        shutil.rmtree(left, ignore_errors=True)
                    finally:
                        os.close(handle)
            root = next((r for r in roots if r.is_dir() and shutil.disk_usage(r).free > 1.1 * size), roots[-1])
            self.path = Path(tempfile.mkdtemp(prefix="opd-weights-", dir=root))
            self.handle = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self.handle, fcntl.LOCK_EX)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.handle)


class Weights:
    """What vLLM's worker (one per GPU of a tensor-parallel group) gets besides its own methods."""

    def load_files(self, folder: str) -> None:
        """Takes all weights of a folder of safetensors files, by the one route of vLLM 0.32 that was found exact."""
        self.reload_weights(weights_iterator=_tensors(Path(folder)))


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)


class Server:
    """Answers one trainer. Every message is a JSON object with `do`; every answer a JSON object."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.llm: Any = None
        self.asleep = False
        self.received: Scratch | None = None  # weights that came through the connection

    def say(self, **answer: Any) -> None:
        self.connection.send_bytes(json.dumps(answer).encode())

    def serve(self) -> None:
        """Until the trainer closes. An error of vLLM is told, and ends the process: what state it is in nobody
        knows."""
        try:
            while True:
                message = json.loads(self.connection.recv_bytes())
                match message.pop("do"):
                    case "open":
                        self.open(**message)
                    case "weights":
                        self.weights(**message)
                    case "generate":
                        self.generate(**message)
                    case "logprobs":
                        self.logprobs(**message)
                    case "sleep":
                        self.sleep()
                    case "stop":
                        pass  # of responses that have just ended by themselves
                    case "close":
                        return
        finally:
            if self.received is not None:
                self.received.remove()
            if self.llm is not None:
                self.llm.llm_engine.engine_core.shutdown()

    def open(self, model: dict[str, Any], threads: int) -> None:
        import torch

        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            torch.set_num_threads(threads)
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # requests are then added before the first step of the engine, so batches, and their rounding, repeat
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            import vllm
        except ImportError as error:
            return self.say(missing=f"{sys.executable}: {error}")
        self.vllm = vllm
        try:
            self.llm = vllm.LLM(
                **model,
                generation_config="vllm",
                enforce_eager=on_cpu,
                enable_sleep_mode=not on_cpu,
                seed=0,
                disable_log_stats=True,
                worker_extension_cls="opd.vllm_server.Weights",
            )
        except Exception as error:  # what a model it does not know raises depends on the model
            return self.say(refused=f"{type(error).__name__}: {error}")
        self.sleeps = not on_cpu
        return self.say(done=True)

    def sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=2)  # nothing is kept: the weights come back from the trainer
            self.asleep = True
        self.say(done=True, asleep=self.asleep)

    def weights(self, folder: str | None, files: int, size: int) -> None:
        """Wakes vLLM, if it sleeps, and gives it weights: from a folder of this machine, else sent as `files`
        messages."""
        if folder is None:
            self.received = Scratch(size)
            for number in range(files):
                (self.received.path / f"{number:05}.safetensors").write_bytes(self.connection.recv_bytes())
                self.say(received=number)
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("load_files", args=(folder or str(self.received.path),))
        if self.asleep:  # the larger part of its memory, only when loading is over
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache of the weights before is in use")
        if self.received is not None:
            self.received.remove()
            self.received = None
        self.say(done=True)

    def generate(self, requests: list[dict[str, Any]], sampling: dict[str, Any], never: list[int]) -> None:
        """Says after every step how many tokens it gave and which responses are finished; stops when a message comes.

        `never` are the ids that are not sampled; they are few (padded vocabulary rows).
        """
        engine = self.llm.llm_engine
        excluded = dict.fromkeys(never, -100.0)  # nats
        for request in requests:
            parameters = self.vllm.SamplingParams(
                **sampling,
                seed=request["seed"],
                logit_bias=excluded or None,
                detokenize=False,
                output_kind=self.vllm.sampling_params.RequestOutputKind.DELTA,
            )
            engine.add_request(
                str(request["id"]), self.vllm.TokensPrompt(prompt_token_ids=request["prompt"]), parameters
            )
        running: dict[str, list[int]] = {str(request["id"]): [] for request in requests}
        while engine.has_unfinished_requests() and not self.connection.poll():
            new, finished = 0, []
            for output in engine.step():
                ids = output.outputs[0].token_ids
                running[output.request_id].extend(ids)
                new += len(ids)
                if output.finished:
                    finished.append([int(output.request_id), running.pop(output.request_id)])
            self.say(new=new, finished=finished)
        engine.abort_request(list(running))
        self.say(done=True)

    def logprobs(self, sequences: list[list[int]]) -> None:
        """Of every token but the first of each sequence, given those before it; nats."""
        parameters = self.vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [self.vllm.TokensPrompt(prompt_token_ids=ids) for ids in sequences]
        outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        found = [
            [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, sequences, strict=True)
        ]
        self.say(done=True, logprobs=found)


def end_with(connection: Connection) -> None:
    """Ends this process and its workers when the other side is gone, whatever vLLM is doing at that moment."""
    gone = select.poll()
    gone.register(connection.fileno(), select.POLLRDHUP | select.POLLHUP | select.POLLERR)

    def watch() -> None:
        gone.poll()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """The same for who started this process, also before anyone has connected."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def limit(connection: Connection, seconds: int) -> None:
    """A read that has begun, and a write, fail with BlockingIOError after so long; 0: never. A host that vanished
    without a word is noticed within two minutes."""
    with socket.socket(fileno=os.dup(connection.fileno())) as raw:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            raw.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, 0))
        if raw.family in (socket.AF_INET, socket.AF_INET6):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
                raw.setsockopt(socket.IPPROTO_TCP, option, value)


def _accepted(address: tuple[str, int] | str, key: bytes) -> Connection:
    """The first who knows the key; nobody else can connect then."""
    try:
        listener = Listener(address)
    except OSError as error:
        raise InputError(
            f"--listen {address}: cannot listen there ({error}). Give another address, or stop who has it."
        ) from None
    with listener:
        while True:
            connection = listener.accept()
            try:
                limit(connection, SHUTDOWN)  # who connects and says nothing does not keep others out
                deliver_challenge(connection, key)
                answer_challenge(connection, key)
                limit(connection, 0)
                return connection
            except (AuthenticationError, OSError, EOFError) as error:
                connection.close()
                print(f"vLLM server: refused a connection ({error})", file=sys.stderr, flush=True)


def _serve_one(address: tuple[str, int] | str, key: bytes, parent: int) -> None:
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # vLLM prints
    _end_with_parent(parent)
    connection = _accepted(address, key)
    end_with(connection)
    server = Server(connection)
    try:
        server.serve()
    except (EOFError, ConnectionError):
        os.killpg(0, signal.SIGKILL)
    except Exception as error:
        server.say(failed=f"{type(error).__name__}: {error}")
        raise


def command(arguments: list[str]) -> None:
    cli = Parser("python -m opd.vllm_server", "Generates for trainers, with vLLM.")
    cli.add_argument("--listen", required=True, metavar="HOST:PORT", help="where trainers connect (rollout.servers)")
    cli.add_argument(
        "--child-of",
        type=number_argument(1),
        metavar="PID",
        help="end after one trainer, or with that process; for our own use",
    )
    options = cli.parse_args(arguments)
    address, key = address_of(options.listen), os.environ.get(KEY, "")
    if not key:
        raise InputError(f"{KEY} is not set. Set it to a secret, the same one here and where the trainer runs.")
    if options.child_of:
        return _serve_one(address, key.encode(), options.child_of)
    print(f"vLLM server: listening on {options.listen}", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    while True:  # a fresh process for every trainer, and after every crash
        child = subprocess.Popen(
            [sys.executable, "-m", "opd.vllm_server", *arguments, "--child-of", str(os.getpid())],
            start_new_session=True,
        )
        try:
            if child.wait() == 2:
                sys.exit(2)  # it has said what is wrong
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # its workers too, where it crashed
        time.sleep(1)


if __name__ == "__main__":
    main(command)
