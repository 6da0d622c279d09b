"""The side of the line that has vLLM: it answers one trainer (python -m opd.vllm_server starts it)."""

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from opd.rollout.wire import SHUTDOWN, Scratch
from opd.wire import Address, admit, listen


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
    """Answers one trainer. Every message is a JSON object with `do`; every answer is a JSON object."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.vllm: Any = None  # the module, once `open` has imported it
        self.llm: Any = None
        self.can_sleep = False
        self.asleep = False

    def say(self, **answer: Any) -> None:
        self.connection.send_bytes(json.dumps(answer).encode())

    def serve(self) -> None:
        """Answers until the trainer closes. An error of vLLM ends it, since vLLM's state is not known after one."""
        works = (self.open, self.weights, self.sent_weights, self.generate, self.logprobs, self.sleep)
        by_name = {work.__name__: work for work in works}
        try:
            while True:
                message = json.loads(self.connection.recv_bytes())
                do = message.pop("do")
                if do == "close":
                    return
                if do != "stop":  # the responses that it should have stopped had just ended by themselves
                    by_name[do](**message)
        finally:
            if self.llm is not None:
                self.llm.llm_engine.engine_core.shutdown()

    def open(self, model: dict[str, Any], threads: int) -> None:
        """Loads a model. Says `missing` where vLLM is not installed, and `refused` where it does not take the model."""
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
        self.vllm, self.can_sleep = vllm, not on_cpu
        try:
            self.llm = vllm.LLM(
                **model,
                generation_config="vllm",
                enforce_eager=on_cpu,
                # vLLM 0.32 rewinds the generator of a prompt that it has read in part, which a CPU's cannot do
                enable_chunked_prefill=not on_cpu,
                enable_sleep_mode=self.can_sleep,
                seed=0,
                disable_log_stats=True,
                worker_extension_cls="opd.rollout.server.Weights",
            )
        except Exception as error:  # what vLLM raises for a model that it does not know depends on the model
            return self.say(refused=f"{type(error).__name__}: {error}")
        return self.say(done=True)

    def sleep(self) -> None:
        """Frees vLLM's GPU memory, and says whether it is free; a CPU's vLLM cannot sleep."""
        if self.can_sleep:
            self.llm.sleep(level=2)  # vLLM keeps nothing: the weights come back from the trainer
            self.asleep = True
        self.say(done=True, asleep=self.asleep)

    def weights(self, folder: str) -> None:
        """Gives vLLM the weights in a folder of this machine, and wakes it."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("load_files", args=(folder,))
        if self.asleep:  # the cache, the larger part of its memory, comes only when loading is over
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache of the weights before is in use")
        self.say(done=True)

    def sent_weights(self, files: int, size: int) -> None:
        """As `weights`, of weights that follow as so many messages of `size` bytes together; acknowledges each."""
        scratch = Scratch(size)
        try:
            for number in range(files):
                (scratch.path / f"{number:05}.safetensors").write_bytes(self.connection.recv_bytes())
                self.say(received=number)
            self.weights(str(scratch.path))
        finally:
            scratch.remove()

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
            prompt = self.vllm.TokensPrompt(prompt_token_ids=request["prompt"])
            engine.add_request(str(request["id"]), prompt, parameters)
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
        """Says the logprobs of every token but the first of each sequence, given those before it; nats."""
        parameters = self.vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [self.vllm.TokensPrompt(prompt_token_ids=ids) for ids in sequences]
        outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        logprobs = [
            [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, sequences, strict=True)
        ]
        self.say(done=True, logprobs=logprobs)


def serve_one(address: Address, key: bytes, parent: int) -> None:
    """Answers the first trainer that knows the key, and ends with it and with the process `parent`.

    Raises InputError when the address cannot be had.
    """
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # vLLM prints to what carries results alone
    end_with_parent(parent)
    connection = accept_trainer(address, key)
    end_with_trainer(connection)
    server = Server(connection)
    try:
        server.serve()
    except (EOFError, ConnectionError):
        os.killpg(0, signal.SIGKILL)
    except Exception as error:
        server.say(failed=f"{type(error).__name__}: {error}")
        raise


def accept_trainer(address: Address, key: bytes) -> Connection:
    """The connection of the first trainer that knows the key; from then on no other can connect.

    Raises InputError when the address cannot be had.
    """
    with listen(address) as listener:
        while True:
            connection = listener.accept()
            try:
                admit(connection, key, SHUTDOWN)
                return connection
            except (AuthenticationError, OSError, EOFError) as error:
                connection.close()
                print(f"vLLM server: refused a connection ({error})", file=sys.stderr, flush=True)


def end_with_trainer(connection: Connection) -> None:
    """Ends this process and its workers when the trainer is gone, whatever vLLM is doing at that moment."""
    gone = select.poll()
    gone.register(connection.fileno(), select.POLLRDHUP | select.POLLHUP | select.POLLERR)
    _end_after(gone.poll)


def end_with_parent(parent: int) -> None:
    """Ends this process and its workers when the process that started it is gone, connected or not."""

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(1)

    _end_after(wait)


def _end_after(wait: Callable[[], object]) -> None:
    """Ends this process and its workers when `wait` returns, which a thread calls."""

    def watch() -> None:
        wait()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
