"""The four quadrants of tokens, and what a selection does to each (TIP, arXiv 2604.14084).

Q1 uncertain and wrong, Q2 uncertain but right, Q3 overconfident and wrong (the blind spot of entropy), Q4 solved.
"High" is strictly above a threshold, by default the mean of the (clipped) axis over the update; the paper states none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tip.scores import Axes


@dataclass(frozen=True)
class Quadrants:
    quadrant: Tensor  # (N,) int64 in 1..4
    threshold_entropy: float  # of h = H(P_S) / ln V
    threshold_divergence: float  # nats


def quadrants(h: Tensor, d: Tensor, thresholds: tuple[float, float]) -> Quadrants:
    """Assigns each token by its axes h (normalised entropy) and d (nats), both (N,) and already clipped."""
    high_h, high_d = h.double() > thresholds[0], d.double() > thresholds[1]
    quadrant = torch.where(high_d, torch.where(high_h, 1, 3), torch.where(high_h, 2, 4))
    return Quadrants(quadrant, *thresholds)


def of(axes: Axes) -> Quadrants:
    """The quadrants of the rows, with the configuration's clips and thresholds."""
    return quadrants(axes.h, axes.d, axes.thresholds())


def describe(found: Quadrants, d: Tensor, kept: Tensor) -> dict[str, float]:
    """Metrics of a selection. For each quadrant: its share of tokens, its share of the divergence mass (unclipped d),
    and which share of its tokens was kept; `tip/mass_covered` is the share of the divergence mass that was kept."""
    total = d.sum().item()
    metrics = {
        "tip/threshold_entropy": found.threshold_entropy,
        "tip/threshold_divergence": found.threshold_divergence,
        "tip/mass_covered": d[kept].sum().item() / total if total > 0 else 1.0,
    }
    for q in (1, 2, 3, 4):
        inside = found.quadrant == q
        metrics[f"tip/share_q{q}"] = inside.double().mean().item()
        metrics[f"tip/mass_q{q}"] = d[inside].sum().item() / total if total > 0 else 0.0
        metrics[f"tip/kept_q{q}"] = kept[inside].double().mean().item() if inside.any() else 0.0
    return metrics
