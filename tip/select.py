"""Scores -> which tokens are kept: the two mechanics of the paper, top and sampling without replacement.

Rows are sorted by (sequence_id, position), as TokenStats are. A rollout of m tokens keeps floor(retention * m), which
may be 0 for a very short one; with budget "per_update" the whole update is counted as one.
"""

import torch
from torch import Tensor


def top(score: Tensor, sequence_id: Tensor, retention: float, budget: str = "per_rollout") -> Tensor:
    """Keeps the highest scores; of equal scores the earlier token. Returns (N,) bool.

    Raises:
        ValueError: a score is NaN.
    """
    if score.isnan().any():
        raise ValueError(f"{int(score.isnan().sum())} of {len(score)} scores are NaN, expected numbers")
    group = sequence_id if budget == "per_rollout" else torch.zeros_like(sequence_id)
    by_score = score.argsort(descending=True, stable=True)
    order = by_score[group[by_score].argsort(stable=True)]
    _, counts = group.unique(return_counts=True)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    allowed = (retention * counts.double() + 1e-9).floor().repeat_interleave(counts)
    kept = torch.zeros(len(score), dtype=torch.bool)
    kept[order] = torch.arange(len(score)) - first < allowed
    return kept


def sample(
    weight: Tensor, sequence_id: Tensor, retention: float, generator: torch.Generator, budget: str = "per_rollout"
) -> Tensor:
    """Draws tokens one after another without replacement, each with probability proportional to `weight` (>= 0).

    The top of log weight + Gumbel noise is such a draw. A token of weight 0 is drawn only when nothing else is left.
    Returns (N,) bool. One draw per row in row order, so the result does not depend on micro-batches or ranks.

    Raises:
        ValueError: a weight is negative or NaN.
    """
    if not (weight >= 0).all():
        raise ValueError(f"{int((~(weight >= 0)).sum())} of {len(weight)} weights are negative or NaN, expected >= 0")
    uniform = torch.rand(len(weight), generator=generator, dtype=torch.float64)
    gumbel = -(-uniform.clamp(min=1e-300).log()).clamp(min=1e-300).log()
    weight = weight.double()
    last_resort = -1e6  # far below any log weight of a float, so these come last, in random order among themselves
    key = torch.where(weight > 0, weight.clamp(min=1e-300).log(), torch.full_like(weight, last_resort)) + gumbel
    return top(key, sequence_id, retention, budget)
