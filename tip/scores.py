"""TokenStats -> normalised axes and importance scores (TIP, arXiv 2604.14084, section on Soft-OR).

h is student entropy divided by ln V, in [0, 1]; d is KL(P_S || P_T) in nats. Clips and thresholds act on these; each
axis is then mapped to [0, 1] by minimum and maximum over all response tokens of the update. All (N,) tensors.
"""

import math

import numpy as np
import torch
from torch import Tensor

from opd.hooks import TokenStats


def quantile(values: Tensor, q: float) -> float:
    """By linear interpolation, of any number of values (torch.quantile stops at 16 million)."""
    return float(np.quantile(values.double().numpy(), q))


def clip_at_quantile(values: Tensor, q: float | None) -> Tensor:
    """min(values, their q-quantile); unchanged where q is None or there are no values."""
    return values if q is None or not len(values) else values.clamp(max=quantile(values, q))


def entropy_axis(stats: TokenStats, clip_quantile: float | None) -> Tensor:
    """h, clipped: H(P_S) / ln V."""
    return clip_at_quantile(stats.student_entropy / math.log(stats.vocab_size), clip_quantile)


def divergence_axis(stats: TokenStats, clip_quantile: float | None) -> Tensor:
    """d in nats, clipped."""
    return clip_at_quantile(stats.reverse_kl, clip_quantile)


def min_max(values: Tensor) -> Tensor:
    """(x - min) / (max - min), in float64 so that near ties keep their order; 0 everywhere when max = min."""
    values = values.double()
    if not len(values) or values.max() == values.min():
        return torch.zeros_like(values)
    return (values - values.min()) / (values.max() - values.min())


def soft_or(h: Tensor, d: Tensor) -> Tensor:
    """h + d - h d of two axes in [0, 1]: high where either is, without counting both twice."""
    return h + d - h * d
