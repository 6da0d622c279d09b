"""TokenStats -> axes in [0, 1] for scores (TIP, arXiv 2604.14084, section on Soft-OR).

h is student entropy divided by ln V, in [0, 1]; d is KL(P_S || P_T) in nats. Clips and thresholds act on these; each
axis is then mapped to [0, 1] by where the column's values lie. *Which* values is the scope of the normalisation: those
of the update itself, or, with scope running, an average over earlier updates.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from opd.hooks import TokenStats

GRID = 1001  # quantiles that are kept of an update


@dataclass(frozen=True)
class Spread:
    """Where the values of a column lie: ascending (K,) float64 points at the equally spaced quantile levels 0 to 1.

    Of an update these are its own sorted values, so quantiles are exact (linear interpolation).
    """

    points: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Spread":
        return cls(values.double().sort().values)

    @property
    def mean(self) -> float:
        """Within the points also after rounding, so that nothing lies above the mean of equal values."""
        return self.points.mean().clamp(self.points[0], self.points[-1]).item() if len(self.points) else math.nan

    def quantile(self, q: float) -> float:
        points = self.points.numpy()
        if not len(points):
            return math.nan
        return float(np.interp(q * (len(points) - 1), np.arange(len(points)), points))

    def place(self, values: Tensor) -> Tensor:
        """Rank in [0, 1]; equal values share the mean of their places; 0 everywhere when all points are equal."""
        if len(self.points) < 2 or self.points[0] == self.points[-1]:
            return torch.zeros(len(values), dtype=torch.float64)
        below, upto = (torch.searchsorted(self.points, values.double(), right=right) for right in (False, True))
        return ((below + upto - 1).double() / 2 / (len(self.points) - 1)).clamp(0, 1)

    def clipped(self, maximum: float) -> "Spread":
        return Spread(self.points.clamp(max=maximum))

    def on_grid(self) -> "Spread":
        """The same by GRID points, whatever the number of values."""
        places = np.linspace(0, len(self.points) - 1, GRID)
        return Spread(torch.from_numpy(np.interp(places, np.arange(len(self.points)), self.points.numpy())))

    def blended(self, newer: "Spread", decay: float) -> "Spread":
        """Quantile by quantile: decay * this + (1 - decay) * newer; both on the grid."""
        return Spread(decay * self.points + (1 - decay) * newer.points)


def normalise(values: Tensor, spread: Spread, how: str) -> Tensor:
    """Maps a column to [0, 1] in float64, so that near ties keep their order; 0 everywhere when the range is empty.

    "minmax" (paper): (x - min) / (max - min); "quantile": (x - q05) / (q95 - q05), cut; "rank": its place.
    """
    if not len(values) or not len(spread.points):
        return torch.zeros(len(values), dtype=torch.float64)
    if how == "rank":
        return spread.place(values)
    low, high = (0.0, 1.0) if how == "minmax" else (0.05, 0.95)
    low, high = spread.quantile(low), spread.quantile(high)
    if high <= low:
        return torch.zeros(len(values), dtype=torch.float64)
    return ((values.double() - low) / (high - low)).clamp(0, 1)


def soft_or(h: Tensor, d: Tensor) -> Tensor:
    """h + d - h d of two axes in [0, 1]: high where either is, without counting both twice.

    Computed as a + b (1 - a), a the larger: exactly 1 where either is 1. Clipped axes have many such tokens, and a cut
    among them must fall by position, not by the rounding of the other axis, which differs between processes.
    """
    larger, smaller = torch.maximum(h, d), torch.minimum(h, d)
    return larger + smaller * (1 - larger)


class AxisSettings(Protocol):
    """The settings that axes and rules read; tip.config.TipConfig has and documents them."""

    entropy_clip_quantile: float | None
    divergence_clip_quantile: float | None
    normalization: str
    quadrant_threshold: str
    quadrant_entropy: float | None
    quadrant_divergence: float | None
    quadrants: tuple[int, ...]
    product_alpha: float
    product_gamma: float


class Axes:
    """What rules read besides the raw statistics: columns clipped and mapped to [0, 1] as the configuration says.

    Args:
        memory: column -> its spread over earlier updates; None: the spread of these very rows.
    """

    def __init__(self, stats: TokenStats, config: AxisSettings, memory: Mapping[str, Spread] | None = None):
        self.stats, self.config, self.memory = stats, config, memory

    def spread(self, name: str) -> Spread:
        """Where the values of a TokenStats field lie."""
        return self.memory[name] if self.memory else Spread.of(vars(self.stats)[name])

    def unit(self, name: str) -> Tensor:
        """Any TokenStats field by its 5th to 95th percentile: clip((z - q05) / (q95 - q05), 0, 1), (N,) float64."""
        return normalise(vars(self.stats)[name], self.spread(name), "quantile")

    @cached_property
    def h(self) -> Tensor:
        """H(P_S) / ln V, clipped; (N,) float64."""
        return self._clipped("student_entropy", self.config.entropy_clip_quantile)[0] / math.log(self.stats.vocab_size)

    @cached_property
    def d(self) -> Tensor:
        """KL(P_S || P_T), clipped; (N,) float64, nats."""
        return self._clipped("reverse_kl", self.config.divergence_clip_quantile)[0]

    @cached_property
    def entropy(self) -> Tensor:
        """h mapped to [0, 1]; (N,) float64."""
        values, spread = self._clipped("student_entropy", self.config.entropy_clip_quantile)
        return normalise(values, spread, self.config.normalization)

    @cached_property
    def divergence(self) -> Tensor:
        """d mapped to [0, 1]; (N,) float64."""
        values, spread = self._clipped("reverse_kl", self.config.divergence_clip_quantile)
        return normalise(values, spread, self.config.normalization)

    def thresholds(self) -> tuple[float, float]:
        """Above which h and d are high: their means, quantiles, or the numbers of the configuration."""
        how, at_h, at_d = (
            self.config.quadrant_threshold,
            self.config.quadrant_entropy,
            self.config.quadrant_divergence,
        )
        if how == "absolute":
            return at_h, at_d
        h = self._clipped("student_entropy", self.config.entropy_clip_quantile)[1]
        d = self._clipped("reverse_kl", self.config.divergence_clip_quantile)[1]
        high = h.mean, d.mean
        if how == "quantile":
            high = h.quantile(at_h), d.quantile(at_d)
        return high[0] / math.log(self.stats.vocab_size), high[1]

    def _clipped(self, name: str, q: float | None) -> tuple[Tensor, Spread]:
        values, spread = vars(self.stats)[name].double(), self.spread(name)
        if q is None or not len(spread.points):
            return values, spread
        maximum = spread.quantile(q)
        return values.clamp(max=maximum), spread.clipped(maximum)
