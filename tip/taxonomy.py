"""The four quadrants of tokens, and what a selection does to each (TIP, arXiv 2604.14084).

Q1 is uncertain and wrong, Q2 uncertain but right, Q3 confident but wrong, and Q4 solved. Entropy alone cannot see Q3.
The paper does not say where an axis becomes high. Here it is high above a threshold, by default above its mean.

Shapes: N tokens of the update.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tip.scores import Axes


@dataclass(frozen=True)
class Quadrants:
    quadrant: Tensor  # (N,) int64, from 1 to 4
    threshold_entropy: float  # of h = H(P_S) / ln V
    threshold_divergence: float  # of d, the divergence of tip.axis, in its unit


def assign(h_N: Tensor, d_N: Tensor, thresholds: tuple[float, float]) -> Quadrants:
    """The quadrants of tokens with normalised entropy h and divergence d, both already clipped."""
    high_h_N, high_d_N = h_N.double() > thresholds[0], d_N.double() > thresholds[1]
    quadrant_N = torch.where(high_d_N, torch.where(high_h_N, 1, 3), torch.where(high_h_N, 2, 4))
    return Quadrants(quadrant_N, *thresholds)


def of(axes: Axes) -> Quadrants:
    """The quadrants of the tokens, with the clips and thresholds of the configuration."""
    return assign(axes.h, axes.d, axes.thresholds())


def describe(quadrants: Quadrants, d_N: Tensor, kept_N: Tensor) -> dict[str, float]:
    """The metrics of a selection, given the divergence without a clip and (N,) bool of what is kept.

    A quadrant has a share of the tokens, a share of the sum of divergence, and a share of its tokens that is kept.
    `tip/mass_covered` is the kept tokens' share of the sum of divergence.
    """
    total = d_N.sum().item()
    metrics = {
        "tip/threshold_entropy": quadrants.threshold_entropy,
        "tip/threshold_divergence": quadrants.threshold_divergence,
        "tip/mass_covered": covered(d_N, kept_N),
    }
    for q in (1, 2, 3, 4):
        inside_N = quadrants.quadrant == q
        metrics[f"tip/share_q{q}"] = inside_N.double().mean().item()
        metrics[f"tip/mass_q{q}"] = d_N[inside_N].sum().item() / total if total > 0 else 0.0
        metrics[f"tip/kept_q{q}"] = kept_N[inside_N].double().mean().item() if inside_N.any() else 0.0
    return metrics


def covered(column_N: Tensor, kept_N: Tensor) -> float:
    """The part of the sum of a column that the kept tokens hold; 1 where the sum is 0."""
    total = column_N.sum().item()
    return column_N[kept_N].sum().item() / total if total > 0 else 1.0
