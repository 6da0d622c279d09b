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


def quantile_range(values: Tensor) -> Tensor:
    """clip((x - q05) / (q95 - q05), 0, 1), in float64; 0 everywhere when the two percentiles are equal."""
    values = values.double()
    if not len(values):
        return values
    low, high = quantile(values, 0.05), quantile(values, 0.95)
    return ((values - low) / (high - low)).clamp(0, 1) if high > low else torch.zeros_like(values)


def rank(values: Tensor) -> Tensor:
    """Place among all values, in [0, 1]; equal values share the mean of their places."""
    if len(values) < 2:
        return torch.zeros(len(values), dtype=torch.float64)
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    return (first + (counts - 1) / 2).double()[inverse] / (len(values) - 1)


def normalise(values: Tensor, how: str) -> Tensor:
    """An axis mapped to [0, 1]: "minmax" (paper), "quantile" or "rank"."""
    return {"minmax": min_max, "quantile": quantile_range, "rank": rank}[how](values)


def soft_or(h: Tensor, d: Tensor) -> Tensor:
    """h + d - h d of two axes in [0, 1]: high where either is, without counting both twice."""
    return h + d - h * d
