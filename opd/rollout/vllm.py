"""vLLM as the trainer sees it: token ids in, token ids out, with the trainer's weights, and not believed.

It runs in processes of its own (opd.vllm_server): beside each trainer process on its device, with tensor parallelism
one for several of them, or on other GPUs and hosts (rollout.servers). The requests of an update are dealt over all of
them. They are seeded, so a response does not depend on the server that generates it, nor on a restart of that server.

After every update vLLM gets the trainer's weights, all of them by name, by the one route that was found exact; two
others are silently wrong (a tied LM head that is not named stays the old one). So logprobs of a fixed probe are
compared, and a difference ends the run.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from opd.errors import RunError
from opd.models import LanguageModel
from opd.rollout import Decoding, Probe
from opd.rollout.connection import ServerConnection
from opd.rollout.fleet import Fleet
from opd.rollout.ranks import all_rollouts
from opd.rollout.wire import Scratch
from opd.seeds import derive_seed
from opd.wire import ServerLost

# Nats, of the mean difference of a logprob. In bfloat16 single tokens differ by 0.3 where nothing is wrong: vLLM rounds
# what layers add up, autocast does not. Measured on SmolLM2-135M: mean 0.06, and 0.63 with two neighbouring layers
# swapped.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
BUCKET = 2**28  # bytes of weights that are brought together at once


class VllmSampler:
    """Samples a model with vLLM. Every process has one of these, and shares its servers with the others.

    Args:
        lm: the model whose responses it samples, for device, dtype and EOS ids.
        section: names the model for the servers, which load it before they get the weights.
        longest: tokens of the longest prompt and response together.
    Raises:
        InputError: as Fleet.
    """

    def __init__(self, lm: LanguageModel, section: StudentSection | TeacherSection, config: Config, longest: int):
        self.lm, self.tolerance = lm, TOLERANCE[lm.compute_dtype]
        size = plan.size_without_weights(section, lm.name)
        self.weights_bytes = (size.parameters + size.head) * lm.compute_dtype.itemsize
        self.scratch: Scratch | None = None  # the weights given last; the first process of a machine has it
        model = {
            "model": section.path,
            "revision": section.revision,
            "dtype": str(lm.compute_dtype).removeprefix("torch."),
            "max_model_len": longest,
            "max_num_seqs": config.rollout.batch_size,
            "gpu_memory_utilization": config.rollout.gpu_memory,
            "tensor_parallel_size": config.rollout.tensor_parallel,
        }
        self.fleet = Fleet(model, config.rollout, lm.device)

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
        requests = [
            {"id": place, "prompt": prompt.token_ids, "seed": derive_seed(*seed) % 2**31}
            for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        failed: RunError | None = None
        responses: dict[int, tuple[int, ...]] = {}
        try:
            self.fleet.wake()
            responses = _Generation(self.fleet, requests, self._settings(decoding, vocab_size), advance).generate()
        except RunError as error:
            failed = error
        if distributed.largest(failed is not None):
            raise failed or RunError("vLLM of another process has failed. Look at its message; checkpoints are intact.")
        return all_rollouts(prompts, responses, self.lm.eos_ids, advance)

    def _settings(self, decoding: Decoding, vocab_size: int) -> dict[str, Any]:
        """What all requests have in common."""
        rows = self.lm.model.get_output_embeddings().out_features  # known of a model that is put away, too
        top_k = {} if decoding.top_k is None else {"top_k": decoding.top_k}
        return {
            "never": list(range(vocab_size, rows)),  # padded vocabulary rows
            "sampling": {
                "temperature": decoding.temperature,
                "top_p": decoding.top_p,
                **top_k,
                "max_tokens": decoding.max_response_tokens,
                "stop_token_ids": list(self.lm.eos_ids),
            },
        }

    def take(self, named_weights: Callable[[], Iterable[tuple[str, Tensor]]], probe: Probe | None = None) -> float:
        """As Sampler.take: gives all servers the weights, and wakes them.

        The first process of a machine writes the weights for all servers of the machine.
        """
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            self._remove_weights()
            self.scratch = Scratch(self.weights_bytes)
            _write_weights(named_weights(), self.lm.compute_dtype, self.scratch)
        else:
            for _ in named_weights():  # under ZeRO-3 all processes gather each weight together
                pass
        folder = distributed.from_first_of_machine(str(self.scratch.path) if self.scratch else "")
        distributed.wait()
        self.fleet.give(Path(folder))
        return 0.0 if probe is None else self.check_parity(probe)

    def sleep(self) -> None:
        """As Sampler.sleep."""
        self.fleet.sleep()

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """Per server of this process, and sequence: the logprobs of every token but the first, (n - 1,); nats."""

        def ask(server: ServerConnection) -> list[Tensor]:
            server.send(do="logprobs", sequences=[list(ids) for ids in sequences])
            return [torch.tensor(values) for values in server.receive()["logprobs"]]

        return [self.fleet.call(server, ask) for server in self.fleet.servers]

    def check_parity(self, probe: Probe) -> float:
        """The largest difference of a logprob of the probe, any server against the trainer, in nats.

        Raises RunError, with both numbers, where the mean difference is beyond the tolerance of the dtype.
        """
        mean = worst = 0.0
        message = "another process's vLLM does not have the trainer's weights"
        for server, parts in zip(self.fleet.servers, self.logprobs(probe.sequences), strict=True):
            logprobs = torch.cat(parts)
            difference = (logprobs - probe.logprobs).abs().nan_to_num(torch.inf)
            where = int(difference.argmax())
            worst = max(worst, difference[where].item())
            if difference.mean().item() >= mean:
                mean = difference.mean().item()
                message = (
                    f"{server.name} does not have the trainer's weights: on a fixed probe logprobs are {mean:.6f} nats "
                    f"apart on average (tolerance {self.tolerance:g}); at the worst it has {logprobs[where]:.6f} and "
                    f"the trainer {probe.logprobs[where]:.6f}"
                )
        if not distributed.largest(mean) <= self.tolerance:
            raise RunError(
                f"{message}, so its samples would not be on-policy. Checkpoints are intact; set "
                "rollout.engine=transformers in a new run, and report this."
            )
        return distributed.largest(worst)

    def close(self) -> None:
        """As Sampler.close."""
        self.fleet.close()
        self._remove_weights()

    def _remove_weights(self) -> None:
        scratch, self.scratch = self.scratch, None
        if scratch is not None:
            scratch.remove()


class _Generation:
    """The responses that this process's servers generate, while they do so.

    Args:
        requests: of all processes; the server of number n generates every response whose id is n, modulo their total.
        settings: what the requests have in common.
        advance: as of Sampler.sample; it may raise to stop.
    """

    def __init__(
        self,
        fleet: Fleet,
        requests: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        advance: Callable[[int, int], None],
    ):
        self.fleet, self.settings, self.advance = fleet, settings, advance
        self.requests = {server: requests[number :: fleet.total] for number, server in fleet.numbered.items()}
        self.busy = [server for server, requests in self.requests.items() if requests]
        self.responses: dict[int, tuple[int, ...]] = {}  # finished ones by id; the EOS that ended one is part of it

    def generate(self) -> dict[int, tuple[int, ...]]:
        """The responses by id. Whatever it raises, the servers have stopped and stay usable.

        Raises RunError when a server is lost for the second time, and what `advance` raises.
        """
        try:
            for server in self.busy:
                self.fleet.call(server, self._ask)
            while self.busy:
                for server in list(self.busy):
                    self._hear(server)
        except BaseException:
            for server in self.busy:
                server.stop()
            raise
        return self.responses

    def _ask(self, server: ServerConnection) -> None:
        """Asks for what is not finished, which after a restart is the rest."""
        rest = [request for request in self.requests[server] if request["id"] not in self.responses]
        server.send(do="generate", requests=rest, **self.settings)

    def _hear(self, server: ServerConnection) -> None:
        """Takes at least one answer of a server; one that is lost is restarted and asked again."""
        try:
            self._receive(server)
        except ServerLost as lost:
            self.fleet.restart(server, lost)
            self.fleet.call(server, self._ask)

    def _receive(self, server: ServerConnection) -> None:
        """Takes one answer and all that have come besides."""
        while True:
            answer = server.receive(waiting=partial(self.advance, 0, 0))
            if "done" in answer:
                self.busy.remove(server)
                return
            self.responses.update({place: tuple(ids) for place, ids in answer["finished"]})
            self.advance(len(answer["finished"]), answer["new"])
            if not server.has_answer():
                return


def _write_weights(named_weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, scratch: Scratch) -> None:
    """Writes weights as safetensors files of about BUCKET bytes. Raises RunError when they do not fit."""
    for number, bucket in enumerate(_buckets(named_weights, dtype)):
        path = scratch.path / f"{number:05}.safetensors"
        try:
            save_file(bucket, path)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"the weights for vLLM, {scratch.size / 2**30:.1f} GiB, do not fit: {path} cannot be written "
                f"({error}). Checkpoints are intact; make room in /dev/shm or in the folder TMPDIR names, and start "
                "the same command again."
            ) from error


def _buckets(named_weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Copies of weights in host memory, by name; a bucket is emptied before the next one is filled."""
    bucket: dict[str, Tensor] = {}
    held = 0
    for name, tensor in named_weights:
        bucket[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        held += bucket[name].nbytes
        if held >= BUCKET:
            yield bucket
            bucket.clear()
            held = 0
    if bucket:
        yield bucket
