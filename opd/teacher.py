"""Teacher scoring: the hidden states of the response positions, kept in host memory until the loss projects them.

Hidden states, not logits: H_t numbers a token instead of V (a factor 30 to 100), exact, and the teacher's body can
leave the device before the student's backward pass starts.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from opd.batch import MicroBatch
from opd.models import LanguageModel


@torch.no_grad()
def score(
    teacher: LanguageModel,
    micro_batches: Sequence[MicroBatch],
    progress: Callable[[int, int], None] = lambda batches, tokens: None,
) -> list[Tensor]:
    """Per micro-batch (N, H_t) hidden states in the teacher's dtype, on the CPU."""
    found = []
    for batch in micro_batches:
        states = teacher.run(partial(teacher.states, batch, torch.arange(len(batch.token_ids))))
        found.append(states.cpu())
        progress(1, len(batch.token_ids))
    return found
