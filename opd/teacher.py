"""Teacher scoring: the hidden states of the response positions, kept in host memory until the loss projects them.

Hidden states, not logits: H_t numbers a token instead of V (a factor 30 to 100), exact, and the teacher's body can
leave the device before the student's backward pass starts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from opd.batch import MicroBatch
from opd.models import LanguageModel


@torch.no_grad()
def score(teacher: LanguageModel, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Per micro-batch (N, H_t) hidden states in the teacher's dtype, on the CPU."""
    return [teacher.states(batch, torch.arange(len(batch.token_ids))).cpu() for batch in micro_batches]
