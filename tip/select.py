"""The two mechanics that turn scores into a selection, keep the top or sample without replacement; and an overlap.

A rollout of m tokens keeps floor(retention * m) of them, which may be 0. With budget "per_update" the whole update
counts as one rollout. Rows are sorted by (sequence_id, position), as in TokenStats.

Shapes: N tokens of the update; G groups, which are the rollouts or the one update.
"""

import torch
from torch import Tensor


def top(score_N: Tensor, sequence_id_N: Tensor, retention: float, budget: str = "per_rollout") -> Tensor:
    """Keeps the tokens of highest score, and of equal scores the earlier token. Returns (N,) bool.

    Raises:
        ValueError: a score is NaN.
    """
    if score_N.isnan().any():
        raise ValueError(f"{int(score_N.isnan().sum())} of {len(score_N)} scores are NaN, expected numbers")
    group_N = sequence_id_N if budget == "per_rollout" else torch.zeros_like(sequence_id_N)
    by_score_N = score_N.argsort(descending=True, stable=True)
    order_N = by_score_N[group_N[by_score_N].argsort(stable=True)]  # group after group, each by falling score
    size_G = group_N.unique(return_counts=True)[1]
    rank_N = torch.arange(len(score_N)) - (size_G.cumsum(0) - size_G).repeat_interleave(size_G)
    budget_G = (retention * size_G.double() + 1e-9).floor()  # in floats 0.29 * 100 lies just below 29
    kept_N = torch.zeros(len(score_N), dtype=torch.bool)
    kept_N[order_N] = rank_N < budget_G.repeat_interleave(size_G)
    return kept_N


def sample(
    score_N: Tensor, sequence_id_N: Tensor, retention: float, generator: torch.Generator, budget: str = "per_rollout"
) -> Tensor:
    """Draws tokens one after another without replacement, each with probability proportional to its score (>= 0).

    The top of log score + Gumbel noise is such a draw. A token of score 0 is drawn only when no other is left. Every
    row takes one random number, in row order, so micro-batches and ranks do not change the result. Returns (N,) bool.

    Raises:
        ValueError: a score is negative or NaN.
    """
    if not (score_N >= 0).all():
        raise ValueError(f"{int((~(score_N >= 0)).sum())} of {len(score_N)} scores are negative or NaN, expected >= 0")
    uniform_N = torch.rand(len(score_N), generator=generator, dtype=torch.float64)
    gumbel_N = -(-uniform_N.clamp(min=1e-300).log()).clamp(min=1e-300).log()
    log_N = score_N.double().clamp(min=1e-300).log()
    log_N[score_N == 0] = -1e6  # below the logarithm of every float above 0; the noise then orders these tokens
    return top(log_N + gumbel_N, sequence_id_N, retention, budget)


def jaccard(a_N: Tensor, b_N: Tensor) -> float:
    """Intersection over union of two sets of tokens, (N,) bool; 1 when both are empty."""
    union = (a_N | b_N).sum().item()
    return (a_N & b_N).sum().item() / union if union else 1.0
