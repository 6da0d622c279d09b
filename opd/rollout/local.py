"""Sampling with transformers, in this process. Responses are token ids, and they are never re-tokenised.

Sampling is by inverse transform: token t of a response is the quantile of u_t in the student's distribution, and u
comes from a generator that is seeded by what the response *is* (run seed, step, place), not by when it is computed.
So a response does not depend on its batch, and a resumed run repeats it. Under bfloat16 compute the distribution is
that of the bfloat16 forward pass with its head, while scoring projects the same states in float32; on the embedded
pair the two differ by about 0.001 in total variation.
"""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from opd import distributed
from opd.data import Prompt, Rollout
from opd.models import LanguageModel
from opd.rollout import Decoding, Probe
from opd.rollout.decode import NOT_FINITE, Decoder, Request
from opd.rollout.ranks import all_rollouts


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
        """As Sampler.sample. `advance` is called after each generated position."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].token_ids))
        mine = order[distributed.rank() :: distributed.world_size()]
        requests = [Request(place, prompts[place], seeds[place]) for place in mine]
        decoder = Decoder(self.lm, requests, decoding, vocab_size, self.batch_size, advance)
        self.lm.run(decoder.run)
        if distributed.largest(decoder.failed):
            raise FloatingPointError(NOT_FINITE if decoder.failed else f"{NOT_FINITE} on another process")
        return all_rollouts(prompts, decoder.responses, self.lm.eos_ids, advance)

    def take(self, named_weights: Callable[[], Iterable[tuple[str, Tensor]]], probe: Probe | None = None) -> float:
        """As Sampler.take; there is nothing to take, and nothing that could differ."""
        return 0.0

    def sleep(self) -> None:
        """As Sampler.sleep; its memory is the model's."""

    def close(self) -> None:
        """As Sampler.close; it holds nothing."""
