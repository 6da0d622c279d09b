"""Rollouts: what turns prompts into the student's responses.

`local.py` samples with transformers in this process; `decode.py` is its loop over the tokens, and `kv_cache.py` its
cache, whose rows come and go. `vllm.py` asks vLLM, which has processes of its own. `fleet.py` is the set of these,
`connection.py` is the trainer's end of the line to one, `server.py` is the other end, and `wire.py` is what both ends
share. `ranks.py` brings the responses of all processes together, `choose.py` opens the sampler that a configuration
names.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from opd.data import Prompt, Rollout


@dataclass(frozen=True)
class Decoding:
    """How responses are drawn; temperature 0 is greedy."""

    temperature: float
    top_p: float
    max_response_tokens: int
    top_k: int | None = None  # only so many of the likeliest tokens are drawn; None: all. It comes before top_p


@dataclass(frozen=True)
class Probe:
    """Token sequences and what the trainer's own model says of them, to be compared with what a sampler says."""

    sequences: Sequence[Sequence[int]]
    logprobs: Tensor  # of every token but the first of each sequence, one sequence after the other; nats


class Sampler(Protocol):
    """Samples responses. Every process of a run calls every method, and they share the work."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        vocab_size: int,
        seeds: Sequence[tuple[int | str, ...]],
        advance: Callable[[int, int], None] = lambda responses, tokens: None,
    ) -> list[Rollout]:
        """One response per prompt, in order, on every process; `sequence_id` is the place in `prompts`.

        A prompt is repeated to get several responses.

        Args:
            vocab_size: only ids below are sampled, so a padded vocabulary row never is.
            seeds: per response, what seeds its randomness (opd.seeds).
            advance: called with a number of finished responses and a number of new tokens; where there is one process,
                it may raise to stop.
        Raises:
            FloatingPointError: on every process, when logits are not finite.
            RunError: on every process, when the sampler is lost.
        """
        ...

    def take(self, named_weights: Callable[[], Iterable[tuple[str, Tensor]]], probe: Probe | None = None) -> float:
        """Takes the student's present weights, and with a probe checks that it has them.

        Args:
            named_weights: gives every weight under every name it has (opd.engine.Engine.named_weights).
        Returns:
            the largest difference of a logprob on the probe, in nats; 0 without one.
        Raises:
            RunError: when the sampler's logprobs are not the student's, or the sampler is lost.
        """
        ...

    def sleep(self) -> None:
        """Leaves its device memory to others until the next `take` or `sample`."""
        ...

    def close(self) -> None:
        """Gives everything back that it holds."""
        ...
