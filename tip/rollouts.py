"""The factor of a rollout (tip.rollout_weight), by which the token weights of any rule are multiplied.

A rollout with an unknown verdict has the factor 0, so nothing is learnt from it, and it has no say in the factors of
others. Shapes: R rollouts of the update; N tokens.
"""

import torch
from torch import Tensor

from opd.hooks import TokenStats


def rows_of(sequence_id_N: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of every rollout, (R,), and the place of every row's rollout among them, (N,)."""
    _, rollout_N, size_R = torch.unique_consecutive(sequence_id_N, return_inverse=True, return_counts=True)
    return size_R.cumsum(0) - size_R, rollout_N


def factor(stats: TokenStats, how: str, beta: float) -> Tensor:
    """The factor of every token's rollout, (N,) float64 and at least 0, from the verdicts of all rollouts.

    Args:
        how: tip.rollout_weight, except for "none".
        beta: tip.reward_beta.
    """
    first_R, rollout_N = rows_of(stats.sequence_id)
    verdict_R, prompt_R = stats.verdict[first_R].double(), stats.prompt_id[first_R]
    known_R = ~verdict_R.isnan()
    if how == "reward":
        factor_R = (verdict_R / beta).masked_fill(~known_R, -torch.inf).softmax(0)
    elif how == "pass_rate":
        rate_R = _pass_rate(verdict_R, prompt_R, known_R)
        factor_R = rate_R * (1 - rate_R)
    else:
        factor_R = verdict_R if how == "right" else 1 - verdict_R
    return torch.where(known_R, factor_R, 0.0)[rollout_N]


def _pass_rate(verdict_R: Tensor, prompt_R: Tensor, known_R: Tensor) -> Tensor:
    """The mean of the known verdicts of a rollout's prompt."""
    prompts, place_R = prompt_R.unique(return_inverse=True)
    zeros = torch.zeros(len(prompts), dtype=torch.float64)
    right = zeros.index_add(0, place_R, verdict_R.nan_to_num(0.0))
    return (right / zeros.index_add(0, place_R, known_R.double()))[place_R]
