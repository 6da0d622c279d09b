"""Sampling with transformers, in this process. Responses are token ids, and they are never re-tokenised.

Sampling is by inverse transform: token t of a response is the quantile of u_t in the student's distribution, and u
comes from a generator that is seeded by what the response *is* (run seed, step, place), not by when it is computed.
So a response does not depend on its batch, and a resumed run repeats it. Under bfloat16 compute the distribution is
that of the bfloat16 forward pass with its head, while scoring projects the same states in float32; on the embedded
pair the two differ by about 0.001 in total variation.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from opd import distributed
from opd.data import Prompt, Rollout
from opd.models import LanguageModel
from opd.rollout import Decoding, Probe
from opd.rollout.ranks import all_rollouts
from opd.seeds import generator

NOT_FINITE = "the model's logits are not finite"


class TransformersSampler:
    """Samples a model of this process. It reads the model's own weights, so it need not take any.

    Args:
        batch_size: responses that a process generates together.
    """

    def __init__(self, lm: LanguageModel, batch_size: int):
        self.lm, self.batch_size = lm, batch_size

    def sample(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        vocab_size: int,
        seeds: Sequence[tuple[int | str, ...]],
        advance: Callable[[int, int], None] = lambda responses, tokens: None,
    ) -> list[Rollout]:
        """As Sampler.sample. `advance` is called after each generated position, and after each batch."""
        mine, idle_rounds = self._batches(prompts)
        responses: dict[int, tuple[int, ...]] = {}
        failed: FloatingPointError | None = None
        for number, places in enumerate([*mine, *[[0]] * idle_rounds]):
            idle = number >= len(mine)
            batch = _Batch([prompts[i] for i in places], [seeds[i] for i in places], decoding, vocab_size)
            try:
                generated = _generate(self.lm, batch, _say_nothing if idle else advance)
            except FloatingPointError as error:
                failed = error
                if not self.lm.sharded:
                    break
                continue  # the other processes need this one's forward passes
            if not idle:
                responses.update(zip(places, generated, strict=True))
                advance(len(generated), 0)
        if distributed.largest(failed is not None):
            raise failed or FloatingPointError(f"{NOT_FINITE} on another process")
        return all_rollouts(prompts, responses, self.lm.eos_ids, advance)

    def _batches(self, prompts: Sequence[Prompt]) -> tuple[list[list[int]], int]:
        """This process's batches of places, long prompts together, and the rounds in which it has none.

        A model that is split over the processes runs on all of them or on none, so an idle process generates as well.
        """
        ranks = distributed.world_size()
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].token_ids))
        size = min(self.batch_size, -(-len(order) // ranks))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        mine = batches[distributed.rank() :: ranks]
        return mine, -(-len(batches) // ranks) - len(mine) if self.lm.sharded else 0

    def take(self, named_weights: Callable[[], Iterable[tuple[str, Tensor]]], probe: Probe | None = None) -> float:
        """As Sampler.take; there is nothing to take, and nothing that could differ."""
        return 0.0

    def sleep(self) -> None:
        """As Sampler.sleep; its memory is the model's."""

    def close(self) -> None:
        """As Sampler.close; it holds nothing."""


def _say_nothing(responses: int, tokens: int) -> None:
    """Stands for `advance` in a round whose responses are dropped."""


class _Batch:
    """Prompts that are generated together: their left-padded ids, and the random numbers of each response.

    The attention mask hides the padding.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[tuple[int | str, ...]],
        decoding: Decoding,
        vocab_size: int,
    ):
        self.prompts, self.decoding, self.vocab_size = prompts, decoding, vocab_size
        self.longest = max(len(p.token_ids) for p in prompts)
        self.uniforms_BT: Tensor | None = None
        if decoding.temperature > 0:
            length = decoding.max_response_tokens
            rows = [torch.rand(length, generator=generator(*seed), dtype=torch.float64) for seed in seeds]
            self.uniforms_BT = torch.stack(rows)

    def inputs(self, pad_id: int) -> tuple[Tensor, Tensor]:
        ids_BT = torch.full((len(self.prompts), self.longest), pad_id)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(self.prompts):
            ids_BT[row, self.longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask_BT[row, self.longest - len(prompt.token_ids) :] = 1
        return ids_BT, mask_BT


@torch.no_grad()
def _generate(lm: LanguageModel, batch: _Batch, advance: Callable[[int, int], None]) -> list[tuple[int, ...]]:
    pad_id = lm.eos_ids[0]
    ids_BT, mask_BT = batch.inputs(pad_id)
    draw = _InverseTransform(batch, lm, advance)
    config = GenerationConfig(
        max_new_tokens=batch.decoding.max_response_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=list(lm.eos_ids),
    )
    with _generation_config(lm, config), lm.precision():
        output_BT = lm.run(
            lambda: lm.model.generate(
                ids_BT.to(lm.device),
                attention_mask=mask_BT.to(lm.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([draw]),
                synced_gpus=lm.sharded and distributed.world_size() > 1,  # each runs until the last has ended
            )
        )
    if not draw.finite:
        raise FloatingPointError(NOT_FINITE)
    responses = []
    for row in output_BT[:, batch.longest :].tolist():
        end = next((t for t, token in enumerate(row) if token in lm.eos_ids), len(row) - 1)
        responses.append(tuple(row[: end + 1]))
    return responses


@contextmanager
def _generation_config(lm: LanguageModel, config: GenerationConfig):
    """Hides the checkpoint's own generation settings while it generates, and puts them back for saving.

    `generate` fills unset options (repetition penalty, top_k, ...) from them, which would bend the sampled distribution
    away from the student's own.
    """
    shipped = lm.model.generation_config
    lm.model.generation_config = config
    try:
        yield
    finally:
        lm.model.generation_config = shipped


class _InverseTransform(LogitsProcessor):
    """Chooses the token and leaves only it finite, so that greedy search picks it."""

    def __init__(self, batch: _Batch, lm: LanguageModel, advance: Callable[[int, int], None]):
        self.decoding, self.vocab_size, self.advance = batch.decoding, batch.vocab_size, advance
        self.uniforms_BT = None if batch.uniforms_BT is None else batch.uniforms_BT.to(lm.device)
        self.position = 0
        self.finite, self.lockstep = True, lm.sharded
        self.eos = torch.tensor(lm.eos_ids, device=lm.device)
        self.running_B = torch.ones(len(batch.prompts), dtype=torch.bool, device=lm.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits_BV = scores[:, : self.vocab_size].float()
        if not logits_BV.amax(-1).isfinite().all():
            if not self.lockstep:
                raise FloatingPointError(NOT_FINITE)
            self.finite = False  # the other processes need this one's forward passes; it fails when the batch has ended
            logits_BV = torch.zeros_like(logits_BV)
        if self.uniforms_BT is None:
            token_B1 = logits_BV.argmax(-1, keepdim=True)
        else:
            probs_BV = (logits_BV / self.decoding.temperature).softmax(-1).double()
            token_B1 = quantile_token(probs_BV, self.uniforms_BT[:, self.position], self.decoding.top_p)
        self.position += 1
        self.advance(0, int(self.running_B.sum()))
        self.running_B &= ~torch.isin(token_B1[:, 0], self.eos)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)


def quantile_token(probs_BV: Tensor, uniform_B: Tensor, top_p: float) -> Tensor:
    """The token at quantile `uniform_B` of each row of `probs_BV`, within its nucleus; (B, 1) int64.

    The nucleus is the smallest set of likeliest tokens whose probability reaches top_p; ids keep their own order.
    """
    if top_p < 1:
        ordered_BV, ids_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        outside_BV = ordered_BV.cumsum(-1) - ordered_BV >= top_p
        probs_BV = probs_BV.masked_fill(outside_BV.gather(1, ids_BV.argsort(-1)), 0)
    cumulative_BV = probs_BV.cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    # The target stays strictly below the total, so that rounding never chooses an id of probability 0 at the end.
    below_total_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    target_B1 = torch.minimum(uniform_B[:, None] * total_B1, below_total_B1)
    return torch.searchsorted(cumulative_BV, target_B1, right=True)
