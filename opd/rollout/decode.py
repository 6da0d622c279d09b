"""The decode loop: responses of one model, token by token, without a row that computes nothing.

A finished response leaves the batch, and a waiting prompt takes its place. So the work follows the tokens, and not the
longest response of a batch. transformers' `generate` runs every batch to its longest response, and its continuous
batching draws with generators that all requests share; here every response has random numbers of its own.

Shapes: B responses that are generated at the moment, V sampled vocabulary, T columns of the cache.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from opd import distributed
from opd.data import Prompt
from opd.models import LanguageModel
from opd.rollout import Decoding
from opd.rollout.graph import FixedStep, can_be_fixed, try_to_fix
from opd.rollout.kv_cache import can_be_joined, empty_cache, join, keep_rows
from opd.seeds import generator

NOT_FINITE = "the model's logits are not finite"
FREE = 8  # rows leave and enter when they are an eighth of the batch, because either copies the cache
STEADY = 4  # tokens after which a batch that has kept its rows is worth a CUDA graph
BLOCK = 512  # vocabulary entries whose probability is summed at once


@dataclass(frozen=True)
class Request:
    """A response to generate."""

    place: int  # what the result calls it
    prompt: Prompt
    seed: tuple[int | str, ...]


@dataclass
class _Row:
    """A response that is being generated."""

    request: Request
    uniforms: list[float]  # a random number for every token; empty: greedy
    tokens: list[int]
    ended: bool = False

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.request.prompt.token_ids) + len(self.tokens)


class Decoder:
    """Generates responses, at most `size` of them at a time.

    Args:
        requests: the longest prompts first.
        vocab_size: only ids below it are sampled.
        advance: called after every token with a number of finished responses and one of new tokens; it may raise.
    """

    def __init__(
        self,
        lm: LanguageModel,
        requests: Sequence[Request],
        decoding: Decoding,
        vocab_size: int,
        size: int,
        advance: Callable[[int, int], None],
    ):
        self.lm, self.decoding, self.vocab_size, self.size, self.advance = lm, decoding, vocab_size, size, advance
        self.accepted = inspect.signature(lm.model.forward).parameters.keys()
        self.waiting = list(requests)
        self.rows: list[_Row] = []
        self.cache = empty_cache(lm.model)
        self.columns = 0  # that the cache holds
        self.steady = 0  # tokens since rows entered or left
        self.fixable = "position_ids" in self.accepted
        self.fixed: FixedStep | None = None
        self.responses: dict[int, tuple[int, ...]] = {}
        self.failed = False  # logits were not finite

    def run(self) -> None:
        """Generates all responses, into `responses`.

        Each round makes one forward pass. A model that is split over the processes runs on all of them or on none, so
        a process that has finished goes on until all have.
        """
        lockstep = self.lm.sharded and distributed.world_size() > 1
        with self.lm.computing(), torch.no_grad():
            while distributed.largest(self.busy) if lockstep else self.busy:
                if not self.busy:
                    self._forward([self.lm.eos_ids[:1]], [1], empty_cache(self.lm.model), 0)
                elif self._can_admit():
                    self._admit()
                else:
                    self._go_on()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.rows) and not self.failed

    def _can_admit(self) -> bool:
        if not self.rows:
            return True
        return bool(self.waiting) and _many(self.size - len(self.rows), self.size) and can_be_joined(self.cache)

    def _admit(self) -> None:
        """Reads waiting prompts, draws the first token of their responses, and adds them to the batch."""
        free = self.size - len(self.rows)
        requests, self.waiting = self.waiting[:free], self.waiting[free:]
        prompts, cache = [request.prompt.token_ids for request in requests], empty_cache(self.lm.model)
        logits_BV = self._forward(prompts, list(map(len, prompts)), cache, 0)
        if self.rows:
            self._release()
            join(self.cache, cache)
        else:
            self.cache, self.columns = cache, len(prompts[0])
        new = [_Row(request, self._uniforms(request), []) for request in requests]
        self.rows += new
        self.steady = 0
        self._draw(new, logits_BV)

    def _go_on(self) -> None:
        """Draws one more token of every response in the batch."""
        lengths = [row.length for row in self.rows]
        if self.fixed is None and self.fixable and self.steady >= STEADY and can_be_fixed(self.lm, self.cache):
            self.fixed = try_to_fix(self.lm, self.cache, lengths, self.columns)
            self.fixable = self.fixed is not None
        if self.fixed is None:
            logits_BV = self._forward([row.tokens[-1:] for row in self.rows], lengths, self.cache, self.columns)
        else:
            logits_BV = self.fixed([row.tokens[-1] for row in self.rows])[:, : self.vocab_size].float()
        self.columns += 1
        self.steady += 1
        if self.fixed and not self.fixed.free:
            self._release()
        self._draw(self.rows, logits_BV)

    def _release(self) -> None:
        """Lets the cache change: its buffers grow with the next token, or rows leave or enter."""
        if self.fixed:
            for layer in self.cache.layers:
                layer.hold(self.columns)
        self.fixed = None

    def _forward(
        self, tokens: Sequence[Sequence[int]], lengths: Sequence[int], cache: DynamicCache, held: int
    ) -> Tensor:
        """The (B, V) float32 logits behind the last column.

        Args:
            tokens: of every row those that the cache does not hold; they end at the last column.
            lengths: of every row how many columns, from the last one back, are its own. The mask hides the others.
            held: columns that the cache holds.
        """
        width, device, pad_id = max(map(len, tokens)), self.lm.device, self.lm.eos_ids[0]
        ids_BT = torch.tensor([[pad_id] * (width - len(ids)) + list(ids) for ids in tokens], device=device)
        positions_BT = torch.tensor(lengths, device=device)[:, None] - torch.arange(held + width, 0, -1, device=device)
        # a model without rotary positions takes no position_ids
        optional = {"position_ids": positions_BT[:, held:].clamp(min=0), "logits_to_keep": 1}
        logits_BTV = self.lm.model(
            input_ids=ids_BT,
            attention_mask=(positions_BT >= 0).long(),
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self.accepted},
        ).logits
        return logits_BTV[:, -1, : self.vocab_size].float()

    def _uniforms(self, request: Request) -> list[float]:
        if self.decoding.temperature == 0:
            return []
        count = self.decoding.max_response_tokens
        return torch.rand(count, generator=generator(*request.seed), dtype=torch.float64).tolist()

    def _draw(self, rows: Sequence[_Row], logits_BV: Tensor) -> None:
        """Draws the next token of these rows from their logits."""
        if not logits_BV.amax(-1).isfinite().all():
            self.failed = True
            return
        if self.decoding.temperature == 0:
            token_B1 = logits_BV.argmax(-1, keepdim=True)
        else:
            probs_BV = (logits_BV / self.decoding.temperature).softmax(-1)
            numbers = [0.0 if row.ended else row.uniforms[len(row.tokens)] for row in rows]
            uniform_B = torch.tensor(numbers, dtype=torch.float64, device=probs_BV.device)
            token_B1 = quantile_token(probs_BV, uniform_B, self.decoding.top_p, self.decoding.top_k)
        running = [row for row in rows if not row.ended]
        for row, token in zip(rows, token_B1[:, 0].tolist(), strict=True):
            if not row.ended:
                row.tokens.append(token)
                row.ended = token in self.lm.eos_ids or len(row.tokens) == self.decoding.max_response_tokens
        ended = [row for row in running if row.ended]
        self.responses.update((row.request.place, tuple(row.tokens)) for row in ended)
        self._drop_ended()
        self.advance(len(ended), len(running))

    def _drop_ended(self) -> None:
        """Drops the rows that have ended, once they are many. Until then they are computed in vain."""
        left = [k for k, row in enumerate(self.rows) if not row.ended]
        if not left:
            self.rows, self.fixed = [], None
        elif _many(len(self.rows) - len(left), len(self.rows)):
            self._release()
            self.rows, self.steady = [self.rows[k] for k in left], 0
            longest = max(row.length - 1 for row in self.rows)  # the cache does not hold the token just drawn
            hidden = self.columns - longest if can_be_joined(self.cache) else 0
            keep_rows(self.cache, left, hidden, self.lm.device)
            self.columns -= hidden


def _many(rows: int, batch: int) -> bool:
    """Whether rows of a batch are worth a copy of the cache."""
    return rows >= max(1, batch // FREE)


def _outside(probs_BV: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """The tokens that are not drawn, (B, V) bool.

    The nucleus is the smallest set of likeliest tokens whose probability reaches top_p, which is a share of what the
    top k have together. Of equally likely tokens the one with the smaller id comes first.
    """
    ordered_BV, ids_BV = probs_BV.double().sort(dim=-1, descending=True, stable=True)
    outside_BV = torch.zeros_like(ordered_BV, dtype=torch.bool)
    if top_k is not None:
        outside_BV[:, top_k:] = True
        ordered_BV = ordered_BV.masked_fill(outside_BV, 0)
        ordered_BV = ordered_BV / ordered_BV.sum(-1, keepdim=True)
    if top_p < 1:
        outside_BV |= ordered_BV.cumsum(-1) - ordered_BV >= top_p
    return outside_BV.gather(1, ids_BV.argsort(-1))


def quantile_token(probs_BV: Tensor, uniform_B: Tensor, top_p: float, top_k: int | None = None) -> Tensor:
    """The token at quantile `uniform_B` of each row of `probs_BV`, within top k and nucleus; (B, 1) int64.

    Ids keep their own order. Probabilities are summed in float64, first by blocks of the vocabulary and then within the
    block of the token, which is cheaper than the running sum of the whole vocabulary.
    """
    if top_p < 1 or top_k is not None:
        probs_BV = probs_BV.masked_fill(_outside(probs_BV, top_p, top_k), 0)
    missing = -probs_BV.shape[1] % BLOCK
    blocks_BKW = torch.nn.functional.pad(probs_BV, (0, missing)).unflatten(1, (-1, BLOCK))
    upto_BK = blocks_BKW.sum(-1, dtype=torch.float64).cumsum(-1)
    total_B1 = upto_BK[:, -1:]
    # The target stays strictly below each sum, so that rounding never chooses an id of probability 0 at an end.
    below_total_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    target_B1 = torch.minimum(uniform_B[:, None] * total_B1, below_total_B1)
    block_B1 = torch.searchsorted(upto_BK, target_B1, right=True)
    before_B1 = torch.where(block_B1 > 0, upto_BK.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    block_BW = blocks_BKW[torch.arange(len(probs_BV), device=probs_BV.device), block_B1[:, 0]]
    inside_BW = before_B1 + block_BW.double().cumsum(-1)
    below_end_B1 = torch.nextafter(inside_BW[:, -1:], torch.zeros_like(total_B1))
    return BLOCK * block_B1 + torch.searchsorted(inside_BW, torch.minimum(target_B1, below_end_B1), right=True)
