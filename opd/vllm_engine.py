"""vLLM as the trainer sees it: token ids in, token ids out, with the trainer's weights, and not believed.

It runs in processes of its own (opd.vllm_server): beside each trainer process on its device, with tensor parallelism
one for several of them, or on other GPUs and hosts (rollout.servers). The requests of an update are dealt over all of
them.

After every update it gets the trainer's weights, all of them by name, by the one route that was found exact; two others
are silently wrong (a tied LM head that is not named stays the old one). So logprobs of a fixed probe are compared, and
a difference ends the run. A server that dies or falls silent is started once more, or connected to again, gets the
weights, and continues with the responses that were not finished; they are seeded, so nothing depends on it. The second
time the run ends, with its checkpoints intact.
"""

import gc
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from opd import distributed, plan
from opd.cli import InputError, RunError
from opd.config import ROOT, Config, Student, Teacher
from opd.data import Prompt
from opd.models import LanguageModel
from opd.rollout import Decoding, own_logprobs
from opd.vllm_server import KEY, SHUTDOWN, Scratch, address_of, limit

# Nats, of the mean difference of a logprob. In bfloat16 single tokens differ by 0.3 where nothing is wrong: vLLM rounds
# what layers add up, autocast does not. Measured on SmolLM2-135M: mean 0.06, and 0.63 with two neighbouring layers
# swapped.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
BUCKET = 2**28  # bytes of weights that are brought together at once
LOADING = 3600  # seconds that a server may take to load a model
CONNECTING = 120  # seconds until a server that is told to be somewhere must be there


class ServerLost(Exception):
    """A server died, failed or fell silent; the text says which."""


class _Server:
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
                [_python(), "-m", "opd.vllm_server", "--listen", address, "--child-of", str(os.getpid())],
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


class VllmEngine:
    """vLLM beside the trainer, or elsewhere; every process has one of these, and of the servers none, one or several.

    Args:
        lm: the model whose responses it samples, for device, dtype and EOS ids.
        section: names the model for the servers, which load it before they get the weights.
        longest: tokens of the longest prompt and response together.
    Raises:
        InputError: vLLM is not installed, or does not take the model, or nothing is where rollout.servers says.
    """

    def __init__(self, lm: LanguageModel, section: Student | Teacher, config: Config, longest: int):
        self.lm, self.tolerance = lm, TOLERANCE[lm.compute_dtype]
        rollout = config.rollout
        model = {
            "model": section.path,
            "revision": section.revision,
            "dtype": str(lm.compute_dtype).removeprefix("torch."),
            "max_model_len": longest,
            "max_num_seqs": rollout.batch_size,
            "gpu_memory_utilization": rollout.gpu_memory,
            "tensor_parallel_size": rollout.tensor_parallel,
        }
        group = rollout.tensor_parallel
        # torchrun's name, and that of the deepspeed launcher
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or distributed.world_size())
        if not rollout.servers and distributed.world_size() > 1 and here % group:
            raise InputError(
                f"rollout.tensor_parallel is {group} and this machine has {here} processes: expected a divisor of "
                "them, since each group of so many GPUs has a vLLM."
            )
        self.total = len(rollout.servers) or max(distributed.world_size() // group, 1)
        threads, timeout = torch.get_num_threads(), rollout.timeout
        if rollout.servers:
            if KEY not in os.environ:
                raise InputError(f"rollout.servers is set and {KEY} is not: set it to the key that the servers have.")
            self.numbers = range(distributed.rank(), self.total, distributed.world_size())
            self.servers = [_Server(model, rollout.servers[i], None, threads, timeout) for i in self.numbers]
        else:
            number, member = divmod(distributed.rank(), group)
            self.numbers = range(number, number + 1) if member == 0 else range(0)
            self.servers = [_Server(model, None, _gpus(lm.device, group), threads, timeout) for _ in self.numbers]
        size = plan.size_without_weights(section, lm.name)
        self.size = (size.parameters + size.head) * lm.compute_dtype.itemsize
        self.restarted = False
        self.scratch: Scratch | None = None  # of the machine's first process
        self.folder: Path | None = None  # the weights given last
        self.open()

    def open(self) -> None:
        """Starts the servers, with the weights of the section. Every process calls it. Raises InputError."""
        self.folder = None
        if self.lm.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # what torch keeps for later a vLLM would take for occupied
        distributed.wait()  # one vLLM may lie on the GPUs of several processes
        failed: InputError | None = None
        try:
            for work in (_Server.start, self._opened):  # all load at the same time
                for server in self.servers:
                    work(server)
        except InputError as error:
            failed = error
        except ServerLost as lost:
            failed = InputError(f"rollout.engine is 'vllm', and {server.name} did not start: {lost}.")
        except BaseException:
            for server in self.servers:
                server.end()
            raise
        if distributed.largest(failed is not None):
            for server in self.servers:
                server.end()
            raise failed or InputError("rollout.engine is 'vllm', and that of another process did not start.")

    def _opened(self, server: _Server) -> None:
        answer = server.receive(LOADING)
        if server.folder is not None:
            server.folder.cleanup()  # the socket is needed no more, and a run that is killed leaves nothing
        if "missing" in answer:
            raise InputError(
                f"rollout.engine is 'vllm', which is not installed ({answer['missing']}). On a GPU it is part of "
                "requirements.txt; on a CPU, bash scripts/setup.sh --vllm makes .venv-vllm. Or set "
                "rollout.engine=transformers."
            )
        if "refused" in answer:
            raise InputError(
                f"rollout.engine is 'vllm', which does not take {server.model['model']!r}: {answer['refused']}"
            )

    def _again(self, server: _Server, lost: ServerLost) -> None:
        """Starts a lost server once more, with the weights it had. Raises RunError the second time."""
        server.end()
        if self.restarted:
            raise RunError(
                f"{server.name} is lost for the second time: {lost}. Checkpoints are intact; mend the cause (its "
                "messages are above; memory is rollout.gpu_memory, patience rollout.timeout) and start the same "
                "command again, or set rollout.engine=transformers in a new run."
            )
        self.restarted = True
        self._say(f"warning: {server.name} is lost: {lost}; starting it once more")
        try:
            server.start()
            self._opened(server)
            if self.folder is not None:
                server.give(self.folder)
        except (ServerLost, InputError) as error:
            server.end()
            raise RunError(f"{server.name} was lost ({lost}) and does not come back: {error}") from None
        self._say(f"{server.name} is back, with the weights it had")

    def _say(self, text: str) -> None:
        """On the console, whichever process it is."""
        who = f"process {distributed.rank()}: " if distributed.world_size() > 1 else ""
        print(f"{who}{text}", file=sys.stderr, flush=True)

    def _surely(self, server: _Server, work: Callable[[], Any]) -> Any:
        while True:
            try:
                return work()
            except ServerLost as lost:
                self._again(server, lost)

    def generate(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        vocab_size: int,
        seeds: Sequence[int],
        progress: Callable[[int, int], None],
    ) -> dict[int, tuple[int, ...]]:
        """This process's share of the responses by place in `prompts`, the EOS that ended one included.

        `progress` may raise to stop; nothing is kept then. Raises RunError when a server is lost for the second time.
        """
        rows = self.lm.model.get_output_embeddings().out_features  # also of a model that is put away
        common = {
            "do": "generate",
            "never": list(range(vocab_size, rows)),  # padded vocabulary rows
            "sampling": {
                "temperature": decoding.temperature,
                "top_p": decoding.top_p,
                "max_tokens": decoding.max_response_tokens,
                "stop_token_ids": list(self.lm.eos_ids),
            },
        }
        found: dict[int, tuple[int, ...]] = {}
        left = {
            server: [i for i in range(len(prompts)) if i % self.total == number]
            for server, number in zip(self.servers, self.numbers, strict=True)
        }

        def ask(server: _Server) -> None:
            left[server] = [i for i in left[server] if i not in found]
            requests = [{"id": i, "prompt": prompts[i].token_ids, "seed": seeds[i]} for i in left[server]]
            server.send(**common, requests=requests)

        def take(server: _Server) -> None:
            """What it has to say, at least one answer."""
            while server in busy:
                answer = server.receive(waiting=partial(progress, 0, 0))
                if "done" in answer:
                    busy.remove(server)
                else:
                    found.update({i: tuple(ids) for i, ids in answer["finished"]})
                    progress(len(answer["finished"]), answer["new"])
                    if not server.connection.poll():
                        return

        busy = [server for server in self.servers if left[server]]
        try:
            for server in busy:
                self._surely(server, lambda server=server: ask(server))
            while busy:
                for server in list(busy):
                    try:
                        take(server)
                    except ServerLost as lost:
                        self._again(server, lost)
                        self._surely(server, lambda server=server: ask(server))
        except BaseException:
            for server in busy:
                self._stop(server)
            raise
        return found

    def _stop(self, server: _Server) -> None:
        """In the middle of its responses. It stays usable; one that does not listen is ended, as the next request
        finds."""
        try:
            server.send(do="stop")
            while "done" not in server.receive(SHUTDOWN):
                pass
        except ServerLost:
            server.end()

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Gives all servers the trainer's weights, and wakes them.

        Args:
            weights: every name that the model knows, the LM head of a tied model as well. Every process iterates, which
                under ZeRO-3 is a collective; the first one of a machine writes them for all of its servers.
        """
        writes = int(os.environ.get("LOCAL_RANK", "0")) == 0
        if writes:
            self._forget()
            self.scratch = Scratch(self.size)
        bucket: dict[str, Tensor] = {}
        held = number = 0
        for name, tensor in weights:
            if not writes:
                continue
            bucket[name] = tensor.detach().to("cpu", self.lm.compute_dtype, copy=True).contiguous()
            held += bucket[name].nbytes
            if held >= BUCKET:
                number = self._write(bucket, number)
                held = 0
        if bucket:
            self._write(bucket, number)
        self.folder = Path(distributed.from_first_of_machine(str(self.scratch.path) if writes else ""))
        distributed.wait()
        for server in self.servers:
            self._surely(server, lambda server=server: server.give(self.folder))

    def _write(self, bucket: dict[str, Tensor], number: int) -> int:
        path = self.scratch.path / f"{number:05}.safetensors"
        try:
            save_file(bucket, path)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"the weights for vLLM, {self.size / 2**30:.1f} GiB, do not fit: {path} cannot be written ({error}). "
                "Checkpoints are intact; make room in /dev/shm or in the folder TMPDIR names, and start the same "
                "command again."
            ) from error
        bucket.clear()
        return number + 1

    def sleep(self) -> None:
        """Leaves the memory of its GPUs to the update. Every process calls it."""
        for server in self.servers:
            self._surely(server, server.sleep)
        distributed.wait()  # also those who have no server, but one on their GPU

    def wake(self) -> None:
        """Servers that sleep get the weights they had. Every process calls it."""
        distributed.wait()
        for server in self.servers:
            if server.asleep:
                self._surely(server, lambda server=server: server.give(self.folder))

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """Per server of this process, and sequence: of every token but the first, given those before it, (n - 1,);
        nats."""

        def ask(server: _Server) -> list[Tensor]:
            server.send(do="logprobs", sequences=[list(ids) for ids in sequences])
            return [torch.tensor(values) for values in server.receive()["logprobs"]]

        return [self._surely(server, lambda server=server: ask(server)) for server in self.servers]

    def check_parity(self, sequences: Sequence[Sequence[int]], own: Tensor) -> float:
        """The largest difference of a logprob of the probe, any server against the trainer, in nats.

        Args:
            own: the trainer's logprobs of the sequences (opd.rollout.own_logprobs), one after the other.
        Raises:
            RunError: with both numbers, where the mean difference is beyond the tolerance of the dtype.
        """
        mean = worst = 0.0
        message = "another process's vLLM does not have the trainer's weights"
        for server, found in zip(self.servers, self.logprobs(sequences), strict=True):
            engine = torch.cat(found)
            difference = (engine - own).abs().nan_to_num(torch.inf)
            where = int(difference.argmax())
            worst = max(worst, difference[where].item())
            if difference.mean().item() >= mean:
                mean = difference.mean().item()
                message = (
                    f"{server.name} does not have the trainer's weights: on a fixed probe logprobs are {mean:.6f} nats "
                    f"apart on average (tolerance {self.tolerance:g}); at the worst it has {engine[where]:.6f} and the "
                    f"trainer {own[where]:.6f}"
                )
        if not distributed.largest(mean) <= self.tolerance:
            raise RunError(
                f"{message}, so its samples would not be on-policy. Checkpoints are intact; set "
                "rollout.engine=transformers in a new run, and report this."
            )
        return distributed.largest(worst)

    def close(self) -> None:
        """Gives the memory back, until the next `open`."""
        for server in self.servers:
            server.close()
        self._forget()

    def _forget(self) -> None:
        scratch, self.scratch = self.scratch, None
        if scratch is not None:
            scratch.remove()


@contextmanager
def sampling(
    lm: LanguageModel,
    section: Student | Teacher,
    config: Config,
    prompts: Sequence[Prompt],
    response: int,
    apart: Callable[[], None] = lambda: None,
) -> Iterator[LanguageModel]:
    """The model, sampled by what rollout.engine says, for as long as the context lasts; it does not change meanwhile.

    Args:
        section: where its weights lie.
        prompts, response: the prompts, and tokens of the longest response.
        apart: called before vLLM starts; the trainer's own model is not used after it.
    Raises:
        InputError: as VllmEngine.
        RunError: vLLM's logprobs are not the model's.
    """
    if config.rollout.engine == "transformers":
        yield lm
        return
    probe = [prompt.token_ids for prompt in prompts[:8]]
    own = own_logprobs(lm, probe)
    apart()
    engine = VllmEngine(lm, section, config, max(len(p.token_ids) for p in prompts) + response)
    try:
        engine.check_parity(probe, own)
        yield replace(lm, sampler=engine)
    finally:
        engine.close()


def _python() -> str:
    """Where vLLM is: with the trainer, or in an environment of its own, as on a CPU."""
    own = ROOT / ".venv-vllm" / "bin" / "python"
    return str(own) if importlib.util.find_spec("vllm") is None and own.exists() else sys.executable


def _gpus(device: torch.device, group: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of a server beside the process of `device`. Raises InputError when there are too few."""
    if device.type == "cpu":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    all_of_them = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    first = device.index or 0
    if first + group > len(all_of_them):
        raise InputError(
            f"rollout.tensor_parallel is {group}, and there are {len(all_of_them) - first} from GPU {first} on. Lower "
            "it."
        )
    return ",".join(all_of_them[first : first + group])
