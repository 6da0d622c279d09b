"""Teachers: a teacher scores the tokens that the student has sampled.

`local.py` is a model in the student's processes, whole or split over them. `self.py` says which model that is where the
student teaches itself. `served.py` asks servers, which run `server.py` and hold the model. `cache.py` keeps the hidden
states until the loss projects them to logits. `choose.py` is the teacher that a configuration names.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from opd.batch import MicroBatch
from opd.loss import Head


class Teacher(Protocol):
    """What the update asks of a teacher. Every process of a run calls its methods."""

    def hidden_states(
        self, batches: Sequence[MicroBatch], advance: Callable[[int, int], None] = lambda batches, tokens: None
    ) -> Sequence[Tensor]:
        """The states that predict the N counted tokens of each micro-batch, (N, H_t), in host memory or on disk.

        They stay valid until the next call. `advance` is called after each micro-batch with 1 and its N.
        """
        ...

    def head(self, vocab_size: int) -> Head:
        """The LM head that projects these states to the logits of the first `vocab_size` ids."""
        ...

    @property
    def packed_row(self) -> int:
        """As LanguageModel.packed_row."""
        ...

    def in_memory(self) -> "Teacher":
        """The same teacher with another place for its states, which are in host memory alone."""
        ...

    def close(self) -> None:
        """Ends what belongs to this teacher: it is not asked again."""
        ...
