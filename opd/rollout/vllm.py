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
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from opd import distributed, plan
from opd.config import Config, StudentSection, TeacherSection
from opd.data import Prompt, Rollout
from opd.errors import InputError, RunError
from opd.models import LanguageModel
from opd.rollout import Decoding, Probe
from opd.rollout.connection import LOADING, ServerConnection, ServerLost
from opd.rollout.ranks import all_rollouts
from opd.rollout.wire import KEY, SHUTDOWN, Scratch
from opd.seeds import derive_seed

# Nats, of the mean difference of a logprob. In bfloat16 single tokens differ by 0.3 where nothing is wrong: vLLM rounds
# what layers add up, autocast does not. Measured on SmolLM2-135M: mean 0.06, and 0.63 with two neighbouring layers
# swapped.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
BUCKET = 2**28  # bytes of weights that are brought together at once


class VllmSampler:
    """vLLM beside the trainer, or elsewhere; every process has one of these, and of the servers none, one or several.

    Args:
        lm: the model whose responses it samples, for device, dtype and EOS ids.
        section: names the model for the servers, which load it before they get the weights.
        longest: tokens of the longest prompt and response together.
    Raises:
        InputError: vLLM is not installed, or does not take the model, or nothing is where rollout.servers says.
    """

    def __init__(self, lm: LanguageModel, section: StudentSection | TeacherSection, config: Config, longest: int):
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
            self.servers = [ServerConnection(model, rollout.servers[i], None, threads, timeout) for i in self.numbers]
        else:
            number, member = divmod(distributed.rank(), group)
            self.numbers = range(number, number + 1) if member == 0 else range(0)
            self.servers = [
                ServerConnection(model, None, _gpus(lm.device, group), threads, timeout) for _ in self.numbers
            ]
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
            for work in (ServerConnection.start, self._opened):  # all load at the same time
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

    def _opened(self, server: ServerConnection) -> None:
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

    def _restart(self, server: ServerConnection, lost: ServerLost) -> None:
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

    def _with_restart(self, server: ServerConnection, work: Callable[[], Any]) -> Any:
        while True:
            try:
                return work()
            except ServerLost as lost:
                self._restart(server, lost)

    def sample(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        vocab_size: int,
        seeds: Sequence[tuple[int | str, ...]],
        advance: Callable[[int, int], None] = lambda responses, tokens: None,
    ) -> list[Rollout]:
        """As Sampler.sample; vLLM draws with generators of its own, one seed for each response.

        Raises RunError, on every process, when a server is lost for the second time.
        """
        self._wake()
        numbers = [derive_seed(*seed) % 2**31 for seed in seeds]
        failed: RunError | None = None
        responses: dict[int, tuple[int, ...]] = {}
        try:
            responses = self._generate(prompts, decoding, vocab_size, numbers, advance)
        except RunError as error:
            failed = error
        if distributed.largest(failed is not None):
            raise failed or RunError("vLLM of another process has failed. Look at its message; checkpoints are intact.")
        return all_rollouts(prompts, responses, self.lm.eos_ids, advance)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        vocab_size: int,
        seeds: Sequence[int],
        advance: Callable[[int, int], None],
    ) -> dict[int, tuple[int, ...]]:
        """This process's share of the responses by place in `prompts`; the EOS that ended one is part of it.

        `advance` may raise to stop; nothing is kept then.
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

        def ask(server: ServerConnection) -> None:
            left[server] = [i for i in left[server] if i not in found]
            requests = [{"id": i, "prompt": prompts[i].token_ids, "seed": seeds[i]} for i in left[server]]
            server.send(**common, requests=requests)

        def take(server: ServerConnection) -> None:
            """What it has to say, at least one answer."""
            while server in busy:
                answer = server.receive(waiting=partial(advance, 0, 0))
                if "done" in answer:
                    busy.remove(server)
                else:
                    found.update({i: tuple(ids) for i, ids in answer["finished"]})
                    advance(len(answer["finished"]), answer["new"])
                    if not server.connection.poll():
                        return

        busy = [server for server in self.servers if left[server]]
        try:
            for server in busy:
                self._with_restart(server, lambda server=server: ask(server))
            while busy:
                for server in list(busy):
                    try:
                        take(server)
                    except ServerLost as lost:
                        self._restart(server, lost)
                        self._with_restart(server, lambda server=server: ask(server))
        except BaseException:
            for server in busy:
                self._stop(server)
            raise
        return found

    def _stop(self, server: ServerConnection) -> None:
        """In the middle of its responses. It stays usable; one that does not listen is ended, as the next request
        finds."""
        try:
            server.send(do="stop")
            while "done" not in server.receive(SHUTDOWN):
                pass
        except ServerLost:
            server.end()

    def take(self, named_weights: Callable[[], Iterable[tuple[str, Tensor]]], probe: Probe | None = None) -> float:
        """As Sampler.take: gives all servers the weights, and wakes them.

        Every process iterates over the weights, which under ZeRO-3 is a collective; the first process of a machine
        writes them for all of its servers.
        """
        writes = int(os.environ.get("LOCAL_RANK", "0")) == 0
        if writes:
            self._forget()
            self.scratch = Scratch(self.size)
        bucket: dict[str, Tensor] = {}
        held = number = 0
        for name, tensor in named_weights():
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
            self._with_restart(server, lambda server=server: server.give(self.folder))
        return 0.0 if probe is None else self.check_parity(probe)

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
            self._with_restart(server, server.sleep)
        distributed.wait()  # also those who have no server, but one on their GPU

    def _wake(self) -> None:
        """Servers that sleep get the weights they had. Every process calls it."""
        distributed.wait()
        for server in self.servers:
            if server.asleep:
                self._with_restart(server, lambda server=server: server.give(self.folder))

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """Per server of this process, and sequence: of every token but the first, given those before it, (n - 1,);
        nats."""

        def ask(server: ServerConnection) -> list[Tensor]:
            server.send(do="logprobs", sequences=[list(ids) for ids in sequences])
            return [torch.tensor(values) for values in server.receive()["logprobs"]]

        return [self._with_restart(server, lambda server=server: ask(server)) for server in self.servers]

    def check_parity(self, probe: Probe) -> float:
        """The largest difference of a logprob of the probe, any server against the trainer, in nats.

        Raises RunError, with both numbers, where the mean difference is beyond the tolerance of the dtype.
        """
        mean = worst = 0.0
        message = "another process's vLLM does not have the trainer's weights"
        for server, found in zip(self.servers, self.logprobs(probe.sequences), strict=True):
            engine = torch.cat(found)
            difference = (engine - probe.logprobs).abs().nan_to_num(torch.inf)
            where = int(difference.argmax())
            worst = max(worst, difference[where].item())
            if difference.mean().item() >= mean:
                mean = difference.mean().item()
                message = (
                    f"{server.name} does not have the trainer's weights: on a fixed probe logprobs are {mean:.6f} nats "
                    f"apart on average (tolerance {self.tolerance:g}); at the worst it has {engine[where]:.6f} and the "
                    f"trainer {probe.logprobs[where]:.6f}"
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
