"""Teachers: whatever scores the tokens that the student has sampled.

`local.py` is a model beside the student, whole or split over the processes; `cache.py` keeps its hidden states until
the loss projects them.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from opd.batch import MicroBatch
from opd.loss import Head


class Teacher(Protocol):
    """What the update asks of a teacher. Every process of a run calls both methods."""

    def hidden_states(
        self, batches: Sequence[MicroBatch], advance: Callable[[int, int], None] = lambda batches, tokens: None
    ) -> Sequence[Tensor]:
        """Per micro-batch (N, H_t) states that predict its counted tokens, in host memory or read again from disk.

        They stay valid until the next call. `advance` is called with 1 and a number of tokens after each micro-batch.
        """
        ...

    def head(self, vocab_size: int) -> Head:
        """The LM head that turns these states into logits, cut to the first `vocab_size` ids."""
        ...
