"""Student sampling: prompts -> responses, as token ids that are kept and never re-tokenised.

Sampling is by inverse transform: response token t of a rollout is the quantile of u_t in the student's distribution,
with u from a generator seeded by what the rollout *is* (run seed, step, sequence id), not by when it is computed. So a
rollout does not depend on its batch, and a resumed run repeats it. Under bfloat16 compute, the distribution is that of
the bfloat16 forward pass, head included; scoring projects the same states in float32 (the two differ by about 0.001 in
total variation on the embedded pair). vLLM (opd.vllm_engine) draws with generators of its own, one seed for each
response.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from opd import distributed
from opd.cli import RunError
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
        return _from_vllm(lm, prompts, decoding, vocab_size, seeds, progress)
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
                lm,
                [prompts[i] for i in chosen],
                decoding,
                vocab_size,
                [seeds[i] for i in chosen],
                progress if number < len(mine) else lambda responses, tokens: None,
            )
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
    return _joined(lm, prompts, found, progress)


def _from_vllm(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    vocab_size: int,
    seeds: Sequence[tuple[int | str, ...]],
    progress: Callable[[int, int], None],
) -> list[Rollout]:
    numbers = [derive_seed(*seed) % 2**31 for seed in seeds]
    failed: RunError | None = None
    try:
        found = lm.sampler.generate(prompts, decoding, vocab_size, numbers, progress)
    except RunError as error:
        failed = error
    if distributed.largest(failed is not None):
        raise failed or RunError("vLLM of another process has failed. Look at its message; checkpoints are intact.")
    return _joined(lm, prompts, found, progress)


def _joined(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    found: dict[int, tuple[int, ...]],
    progress: Callable[[int, int], None],
) -> list[Rollout]:
    """The rollouts of all ranks, of which this one has found some."""
    own = sum(map(len, found.values()))
    responses = _of_all_ranks(found)
    if distributed.world_size() > 1:
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


@torch.no_grad()
def own_logprobs(lm: LanguageModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The model's own logprobs of every token but the first of each sequence, given those before it, one sequence after
    the other, on the CPU; nats. Every rank calls it."""

    def one(ids: Tensor) -> Tensor:
        with lm.precision():
            return lm.model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()

    found = []
    for sequence in sequences:
        ids = torch.tensor(sequence, device=lm.device)
        logits = lm.run(partial(one, ids))
        found.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].cpu())
    return torch.cat(found)
