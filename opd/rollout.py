"""Student sampling: prompts -> responses, as token ids that are kept and never re-tokenised.

The only file that knows the generation engine. Sampling is by inverse transform: response token t of a rollout is the
quantile of u_t in the student's distribution, with u from a generator seeded by what the rollout *is* (run seed, step,
sequence id), not by when it is computed. So a rollout does not depend on its batch, and a resumed run repeats it.
Under bfloat16 compute, the distribution is that of the bfloat16 forward pass, head included; scoring projects the same
states in float32 (the two differ by about 0.001 in total variation on the embedded pair).

vLLM generates in this process with weights of its own. After every update it gets the trainer's by the one route that was
found exact; two others are silently wrong (a tied LM head that is not named stays the old one). So nothing is believed:
logprobs of a fixed probe are compared, and a difference ends the run.
"""

import gc
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from opd import distributed
from opd.cli import InputError, RunError
from opd.config import Config, Student, Teacher
from opd.data import Prompt, Rollout
from opd.models import LanguageModel
from opd.seeds import derive_seed, generator


@dataclass(frozen=True)
class Decoding:
    """How responses are drawn; temperature 0 is greedy."""

    temperature: float
    top_p: float
    max_response_tokens: int


def sample(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    vocab_size: int,
    batch_size: int,
    seeds: Sequence[tuple[int | str, ...]],
    progress: Callable[[int, int], None] = lambda responses, tokens: None,
) -> list[Rollout]:
    """One response per prompt (repeat a prompt for several), in order; `sequence_id` is the place in `prompts`.

    Several processes share the work, and each gets all responses.

    Raises FloatingPointError, on every rank, when logits are not finite.

    Args:
        vocab_size: only ids below are sampled, so never a padded vocabulary row.
        batch_size: responses that a process generates together; long prompts are batched with long ones.
        seeds: per response, what seeds its randomness.
        progress: called after each generated position with 0 responses and the tokens it gave, and after each batch
            with its responses and 0 tokens; may raise to stop where there is one process. Other processes' responses
            are told at the end.
    """
    if lm.sampler is not None:
        numbers = [derive_seed(*seed) % 2**31 for seed in seeds]
        responses = lm.sampler.generate(prompts, decoding, vocab_size, numbers, progress)
        return [_rollout(i, prompt, responses[i], lm) for i, prompt in enumerate(prompts)]
    ranks = distributed.world_size()
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].token_ids))
    size = min(batch_size, -(-len(order) // ranks))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    mine = batches[distributed.rank() :: ranks]
    # a model that is split over the ranks runs on all of them: who has no batch left repeats the first, for nothing
    spare = -(-len(batches) // ranks) - len(mine) if lm.sharded else 0
    found: dict[int, tuple[int, ...]] = {}
    failed: FloatingPointError | None = None
    for number, chosen in enumerate([*mine, *[batches[0]] * spare]):
        try:
            responses = _generate(
                lm, [prompts[i] for i in chosen], decoding, vocab_size, [seeds[i] for i in chosen],
                progress if number < len(mine) else lambda responses, tokens: None,
            )  # fmt: skip
        except FloatingPointError as error:
            failed = error
            if not lm.sharded:
                break
            continue
        if number < len(mine):
            found.update(zip(chosen, responses, strict=True))
            progress(len(responses), 0)
    if distributed.largest(failed is not None):
        raise failed or FloatingPointError("the model's logits are not finite on another process")
    own = sum(map(len, found.values()))
    responses = _of_all_ranks(found)
    if ranks > 1:
        progress(len(prompts) - len(found), sum(map(len, responses.values())) - own)
    return [_rollout(i, prompt, responses[i], lm) for i, prompt in enumerate(prompts)]


def _rollout(place: int, prompt: Prompt, response: tuple[int, ...], lm: LanguageModel) -> Rollout:
    return Rollout(place, prompt, response, "stop" if response[-1] in lm.eos_ids else "length")


def _of_all_ranks(found: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """Responses by place in the prompts, from whoever generated them."""
    places = [place for place, ids in found.items() for _ in ids]
    tokens = [token for ids in found.values() for token in ids]
    columns = {"place": torch.tensor(places, dtype=torch.long), "token": torch.tensor(tokens, dtype=torch.long)}
    joined, _ = distributed.gather_rows(columns)
    responses: dict[int, list[int]] = {}
    for place, token in zip(joined["place"].tolist(), joined["token"].tolist(), strict=True):
        responses.setdefault(place, []).append(token)
    return {place: tuple(ids) for place, ids in responses.items()}


@torch.no_grad()
def _generate(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    vocab_size: int,
    seeds: Sequence[tuple[int | str, ...]],
    progress: Callable[[int, int], None],
) -> list[tuple[int, ...]]:
    longest = max(len(p.token_ids) for p in prompts)
    pad = lm.eos_ids[0]  # masked on the left; on the right it only follows a response's end
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask[row, longest - len(prompt.token_ids) :] = 1
    sampler = _InverseTransform(decoding, vocab_size, seeds, lm, progress)
    config = GenerationConfig(
        max_new_tokens=decoding.max_response_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=list(lm.eos_ids),
    )
    with _own_generation_config(lm, config), lm.precision():
        output = lm.run(
            lambda: lm.model.generate(
                ids.to(lm.device),
                attention_mask=mask.to(lm.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
                synced_gpus=lm.sharded and distributed.world_size() > 1,  # until the last rank's responses have ended
            )
        )
    if not sampler.finite:
        raise FloatingPointError("the model's logits are not finite")
    responses = []
    for row in output[:, longest:].tolist():
        end = next((t for t, token in enumerate(row) if token in lm.eos_ids), len(row) - 1)
        responses.append(tuple(row[: end + 1]))
    return responses


@contextmanager
def _own_generation_config(lm: LanguageModel, config: GenerationConfig):
    """`generate` fills unset options (repetition penalty, top_k, ...) from the checkpoint's file, which would bend the
    sampled distribution away from the student's own; the checkpoint's file is put back for saving."""
    own = lm.model.generation_config
    lm.model.generation_config = config
    try:
        yield
    finally:
        lm.model.generation_config = own


class _InverseTransform(LogitsProcessor):
    """Chooses the token and leaves only it finite, so that greedy search picks it."""

    def __init__(
        self,
        decoding: Decoding,
        vocab_size: int,
        seeds: Sequence[tuple[int | str, ...]],
        lm: LanguageModel,
        progress: Callable[[int, int], None],
    ):
        self.decoding, self.vocab_size, self.progress = decoding, vocab_size, progress
        self.position = 0
        self.finite, self.lockstep = True, lm.sharded
        self.eos = torch.tensor(lm.eos_ids, device=lm.device)
        self.running = torch.ones(len(seeds), dtype=torch.bool, device=lm.device)
        if decoding.temperature > 0:
            length = decoding.max_response_tokens
            draws = [torch.rand(length, generator=generator(*seed), dtype=torch.float64) for seed in seeds]
            self.uniforms = torch.stack(draws).to(lm.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores[:, : self.vocab_size].float()
        if not logits.amax(-1).isfinite().all():
            if not self.lockstep:
                raise FloatingPointError("the model's logits are not finite")
            self.finite = False  # the other ranks need this one's forward passes; said when the batch has ended
            logits = torch.zeros_like(logits)
        if self.decoding.temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            probs = (logits / self.decoding.temperature).softmax(-1).double()
            token = quantile_token(probs, self.uniforms[:, self.position], self.decoding.top_p)
        self.position += 1
        self.progress(0, int(self.running.sum()))
        self.running &= ~torch.isin(token[:, 0], self.eos)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def quantile_token(probs: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """The token at quantile `uniform` (B,) of each row of `probs` (B, V), within its nucleus; (B, 1) int64.

    The nucleus is the smallest set of likeliest tokens whose probability reaches top_p; ids in their own order.
    """
    if top_p < 1:
        ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        probs = probs.masked_fill(outside.gather(1, ids.argsort(-1)), 0)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # strictly below the total, so that rounding never chooses an id of probability 0 behind the last possible one
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}  # nats, of the largest difference of a logprob


class VllmEngine:
    """vLLM beside the trainer, in its process and on its device.

    Args:
        lm: the model whose responses it samples, for device, dtype and EOS ids.
        weights: where the weights that `lm` has now lie.
        longest: tokens of the longest prompt and response together.
    Raises:
        InputError: vLLM is not installed, or does not take the model.
    """

    def __init__(self, lm: LanguageModel, weights: Student | Teacher, config: Config, longest: int):
        self.lm, self.tolerance = lm, TOLERANCE[lm.compute_dtype]
        on_cpu = lm.device.type == "cpu"
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # weights go over without a copy through a socket
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if on_cpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or it would set the trainer's threads
        threads = torch.get_num_threads()
        try:
            import vllm
        except ImportError:
            raise InputError(
                "rollout.engine is 'vllm' and vLLM is not installed here. On a GPU it is part of requirements.txt, on a CPU of "
                "requirements-cpu-vllm.txt; or set rollout.engine=transformers."
            ) from None
        self.vllm = vllm
        try:
            self.llm = vllm.LLM(
                weights.path, revision=weights.revision, dtype=str(lm.compute_dtype).removeprefix("torch."),
                max_model_len=longest, max_num_seqs=config.rollout.batch_size,
                gpu_memory_utilization=config.rollout.gpu_memory, generation_config="vllm",
                enforce_eager=on_cpu, enable_sleep_mode=not on_cpu, seed=0, disable_log_stats=True,
            )  # fmt: skip
        except Exception as error:  # what a model it does not know raises depends on the model
            raise InputError(f"rollout.engine is 'vllm', which does not take {weights.path!r}: {error}") from error
        torch.set_num_threads(threads)

    def generate(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        vocab_size: int,
        seeds: Sequence[int],
        progress: Callable[[int, int], None],
    ) -> list[tuple[int, ...]]:
        """Responses in order, the EOS that ended one included. `progress` may raise to stop; nothing is kept then."""
        rows = self.lm.model.get_output_embeddings().out_features
        allowed = None if rows == vocab_size else list(range(vocab_size))  # never a padded vocabulary row
        engine = self.llm.llm_engine
        for i, prompt in enumerate(prompts):
            parameters = self.vllm.SamplingParams(
                temperature=decoding.temperature, top_p=decoding.top_p, max_tokens=decoding.max_response_tokens,
                seed=seeds[i], stop_token_ids=list(self.lm.eos_ids), allowed_token_ids=allowed, detokenize=False,
            )  # fmt: skip
            engine.add_request(str(i), self.vllm.TokensPrompt(prompt_token_ids=list(prompt.token_ids)), parameters)
        found: dict[int, tuple[int, ...]] = {}
        told = dict.fromkeys(range(len(prompts)), 0)
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    i, ids = int(output.request_id), tuple(output.outputs[0].token_ids)
                    if output.finished:
                        found[i] = ids
                    progress(int(output.finished), len(ids) - told[i])
                    told[i] = len(ids)
        finally:
            engine.abort_request([str(i) for i in told if i not in found])
        return [found[i] for i in range(len(prompts))]

    def sync(self) -> None:
        """Gives the engine the trainer's weights, all of them by name: the LM head of a tied model as well."""
        weights = list(self.lm.model.state_dict().items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Leaves the GPU's memory to the update."""
        if self.lm.device.type == "cuda":
            self.llm.sleep(level=2)  # the weights come back with the next sync

    def wake(self) -> None:
        if self.lm.device.type == "cuda":
            self.llm.wake_up()

    def close(self) -> None:
        """Gives its memory back: the next run of the process has an engine of its own."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Of every token but the first of each sequence, given those before it; nats."""
        parameters = self.vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [self.vllm.TokensPrompt(prompt_token_ids=list(ids)) for ids in sequences]
        outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        return [
            torch.tensor([at[token].logprob for at, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)])
            for output, ids in zip(outputs, sequences, strict=True)
        ]

    def check_parity(self, prompts: Sequence[Prompt], step: int) -> float:
        """The largest difference of a logprob of the probe, engine against trainer, in nats.

        Raises RunError with both numbers where it is beyond the tolerance of the dtype.
        """
        sequences = [prompt.token_ids for prompt in prompts]
        engine = torch.cat(self.logprobs(sequences))
        trainer = torch.cat([own_logprobs(self.lm, ids) for ids in sequences])
        difference = (engine - trainer).abs()
        worst = int(difference.nan_to_num(torch.inf).argmax())
        if not difference[worst] <= self.tolerance:
            raise RunError(
                f"after step {step}: vLLM does not have the trainer's weights: of a fixed probe it gives a token the logprob "
                f"{engine[worst]:.6f} and the trainer {trainer[worst]:.6f} (tolerance {self.tolerance:g}), so rollouts would "
                "not be on-policy. Checkpoints are intact; set rollout.engine=transformers in a new run, and report this."
            )
        return difference[worst].item()


@torch.no_grad()
def own_logprobs(lm: LanguageModel, ids: Sequence[int]) -> Tensor:
    """The trainer's logprobs of every token of a sequence but the first, (n - 1,), on the CPU."""
    inputs = torch.tensor(ids, device=lm.device)[None]
    with lm.precision():
        logits = lm.model(input_ids=inputs, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, inputs[0, 1:, None])[:, 0].cpu()
